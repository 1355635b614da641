"""A slim model leaves for other runtimes as any other does, and computes there what it computes here."""

import subprocess
import sys
import warnings

import pytest
import torch

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning
from tests.runs import IMAGE, Attentive, Depthwise, Known, fit, net


def pruned(kind, pruning=FilterL1Pruning):
    module = net(kind)
    fit(module, pruning(0.5), max_epochs=1)
    return module.eval(), torch.randn(2, *IMAGE.shape[1:])


@pytest.mark.parametrize(
    "kind, pruning",
    [(Known, FilterL1Pruning), (Attentive, FilterL1Pruning), (Depthwise, IterativeMagnitudePruning)],
)
@pytest.mark.filterwarnings("ignore")
def test_onnx(kind, pruning, tmp_path):
    """ONNX Runtime gives the outputs of the slim model; the file's weights have its shapes."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, images = pruned(kind, pruning)
    module.to_onnx(tmp_path / "slim.onnx", images, dynamo=True, external_data=False, verbose=False)
    session = runtime.InferenceSession(tmp_path / "slim.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(images).detach(), rtol=1e-4, atol=1e-5)
    shapes = {tuple(weight.dims) for weight in onnx.load(tmp_path / "slim.onnx").graph.initializer}
    assert tuple(module.first.weight.shape) in shapes


def test_exported_and_saved(tmp_path):
    """``torch.export`` takes the slim model, heads and all, and its file gives the outputs."""
    module, images = pruned(Attentive)
    expected = module(images)
    module.trainer = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (images,)), tmp_path / "slim.pt2")
        loaded = torch.export.load(tmp_path / "slim.pt2").module()
    torch.testing.assert_close(loaded(images), expected)


def test_compiled_after_training():
    """A compiled slim model gives the outputs of the slim model."""
    module, images = pruned(Attentive)
    expected = module(images)
    module.trainer = None
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(images), expected)


def test_tensors_come_without_the_package(tmp_path):
    """Where our package is not installed a checkpoint gives its tensors: nothing in it is of our classes."""
    module = net(Depthwise)
    fit(module, FilterL1Pruning(0.5), max_epochs=1).save_checkpoint(tmp_path / "slim.ckpt")
    script = (
        "import sys, torch; sys.modules['lightning_prune'] = None; "
        f"saved = torch.load({str(tmp_path / 'slim.ckpt')!r}, weights_only=True); "
        "print(tuple(saved['state_dict']['first.weight'].shape))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tuple(module.first.weight.shape))
