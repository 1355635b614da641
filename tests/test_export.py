"""A slim model leaves for other runtimes as any other does, and computes there what it computes here."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, cli, prune_filters, prune_weights
from lightning_prune.cli import onnx_files
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


SCRIPT = """
from torch import nn

from tests.runs import Known, net


def known():
    return net(Known)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.out(self.hidden(self.words(ids)).relu().mean(1))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "exported_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("exported_script", None)


def saved(kind, folder, pruning=FilterL1Pruning):
    module = net(kind)
    fit(module, pruning(0.5), max_epochs=1).save_checkpoint(folder / "slim.ckpt")
    return module.eval()


def needs_onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")


KNOWN = ("--model", "exported_script.known", "--input-shape", "1,2,6,6")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [(), ("--external-data",)], ids=str)
def test_the_command_writes_onnx(more, script, capsys):
    """The file computes what the slim model does; sizes before and after are those of files, weights beside or not."""
    onnx, runtime = needs_onnx()
    module = saved(Known, script)
    cli.main(["export", "--ckpt-path", "slim.ckpt", "--onnx", "slim.onnx", *KNOWN, *more])
    told = capsys.readouterr().out
    files = sorted(path.name for path in script.iterdir() if path.name.startswith(("slim.onnx", ".onnx")))
    assert files == ["slim.onnx", *(["slim.onnx.data"] if more else [])]
    assert f"{sum((script / name).stat().st_size for name in files):,} bytes; the dense model: " in told
    assert "ONNX Runtime's outputs are PyTorch's up to" in told and ("keep both together" in told) == bool(more)
    held = onnx.load("slim.onnx", load_external_data=True).graph.initializer
    assert tuple(module.first.weight.shape) in {tuple(weight.dims) for weight in held}
    images = torch.randn(1, 2, 6, 6)
    session = runtime.InferenceSession("slim.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_any_batch(script):
    """With --any-batch one file runs on batches of every size; without it, on the one it was written for."""
    _, runtime = needs_onnx()
    module = saved(Known, script)
    for name, more in (("one.onnx", ()), ("any.onnx", ("--any-batch",))):
        cli.main(["export", "--ckpt-path", "slim.ckpt", "--onnx", name, *KNOWN, *more])
    session = runtime.InferenceSession("any.onnx")
    for size in (1, 2, 7):
        images = torch.randn(size, 2, 6, 6)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(images).detach(), rtol=1e-4, atol=1e-5)
    fixed = runtime.InferenceSession("one.onnx")
    with pytest.raises(Exception, match="invalid dimensions"):
        fixed.run(None, {fixed.get_inputs()[0].name: images.numpy()})


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_token_ids_and_of_masked_weights(script, capsys):
    """--tokens gives ids as inputs; of weights that were zeroed, the command says that ONNX stores zeros."""
    needs_onnx()
    from exported_script import Tokens

    module = Tokens()
    prune_weights(module, 0.5)
    torch.save(module.state_dict(), "slim.pt")
    tokens = ("--model", "exported_script.Tokens", "--input-shape", "1,5", "--tokens", "20")
    cli.main(["export", "--ckpt-path", "slim.pt", "--onnx", "slim.onnx", *tokens])
    told = capsys.readouterr().out
    assert "Weights were zeroed, not removed" in told and "up to" in told


@pytest.mark.filterwarnings("ignore")
def test_onnx_that_computes_something_else_is_not_written(script, capsys, monkeypatch):
    """Where ONNX Runtime differs from PyTorch the command ends with status 2, and no file is left."""
    needs_onnx()
    saved(Known, script)
    run = onnx_files.run
    monkeypatch.setattr(onnx_files, "run", lambda model, inputs: run(model, inputs) * 1.01)
    with pytest.raises(SystemExit):
        cli.main(["export", "--ckpt-path", "slim.ckpt", "--onnx", "slim.onnx", *KNOWN])
    assert "differs from PyTorch by 0.0099 of the largest output" in capsys.readouterr().err
    assert not [path for path in script.iterdir() if "onnx" in path.name]


def test_export_is_refused_in_words(script, capsys):
    """A missing checkpoint, file to write, or model is said in one line."""
    torch.save(nn.Linear(2, 2).state_dict(), "slim.pt")
    for given, told in (
        (["--out", "x.safetensors"], "give --ckpt-path"),
        (["--ckpt-path", "slim.pt"], "give --out"),
        (["--ckpt-path", "slim.pt", "--onnx", "a/b.onnx"], "there is no folder a"),
        (["--ckpt-path", "slim.pt", "--onnx", "b.onnx"], "give either --config or --model"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", *given])
        assert told in capsys.readouterr().err


# int8 after pruning


def slim(how):
    """A small network of linear layers, slim or masked, and inputs for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(256, 32)
    if how == "slim":
        prune_filters(model, x[:1], 0.5)
    else:
        prune_weights(model, 0.7)
    return model, x


def assert_near(found, expected):
    """Eight bits lose a few percent of the outputs' spread, no more."""
    error = float((found - expected).square().mean().sqrt() / expected.std())
    assert 0 < error < 0.05, error


@pytest.mark.parametrize("how", ["slim", "masked"])
@pytest.mark.filterwarnings("ignore")
def test_slim_and_masked_models_quantize(how):
    """``quantize_dynamic`` stores a pruned network in eight bits; what was masked is exactly zero there, too."""
    model, x = slim(how)
    expected = model(x).detach()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert_near(quantized(x), expected)
    weight = quantized[2].weight()
    assert tuple(weight.shape) == tuple(model[2].weight.shape)
    assert torch.equal(weight.dequantize() == 0, (model[2].weight == 0) | (weight.int_repr() == 0))
    if how == "masked":
        assert int((weight.int_repr() == 0).sum()) >= int(0.7 * weight.numel())


@pytest.mark.parametrize("how", ["slim", "masked"])
@pytest.mark.filterwarnings("ignore")
def test_torchao_quantizes_what_is_left(how):
    """torchao, which writes into the model's own layers, takes pruned models; masked weights stay zero."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = slim(how)
    expected, zeros = model(x).detach(), model[2].weight == 0
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    assert_near(model(x).detach(), expected)
    assert bool((model[2].weight.dequantize()[zeros] == 0).all())


@pytest.mark.parametrize("how", ["slim", "masked"])
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_quantizes_what_is_left(how, tmp_path):
    """An ONNX file of a pruned model quantizes, to about a quarter of its bytes."""
    _, runtime = needs_onnx()
    quantization = pytest.importorskip("onnxruntime.quantization")
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip(f"onnx infers other shapes than torch {torch.__version__} writes into files for any batch")
    model, x = slim(how)
    written = onnx_files.write_onnx(model, x, tmp_path / "slim.onnx", any_batch=True)
    quantization.quantize_dynamic(written.path, tmp_path / "int8.onnx")
    session = runtime.InferenceSession(tmp_path / "int8.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_near(torch.from_numpy(np.asarray(found)), model(x).detach())
    assert how == "slim" or (tmp_path / "int8.onnx").stat().st_size < 0.6 * written.size


@pytest.mark.parametrize("how", ["slim", "masked"])
@pytest.mark.filterwarnings("ignore")
def test_openvino_takes_what_is_left(how):
    """OpenVINO converts a pruned model as it is, and computes what it does."""
    openvino = pytest.importorskip("openvino")
    model, x = slim(how)
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU")
    found = torch.from_numpy(compiled(x.numpy())[0])
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", ["slim", "masked"])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_takes_what_is_left(how, tmp_path):
    """TorchScript saves and loads a pruned model."""
    model, x = slim(how)
    torch.jit.trace(model, x).save(tmp_path / "slim.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "slim.ts")(x), model(x))
