"""OBSOneShot in a run: when it prunes, that zeros are held, and that the network goes on to work."""

import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune
from lightning_prune import FilterL1Pruning, OBSOneShot, OneShot, PruningError, prune_weights
from lightning_prune.surgery.masks import masks_on
from tests.in_processes import ended
from tests.magnitude import gone_of
from tests.newer_lightning import reading
from tests.runs import IMAGE, Net, assert_same_weights, batches, fit, net, trainer, weights
from tests.test_callback_contract import global_hooks, hooks_of, recipe_hooks

SIZES = {"first.weight": 144, "second.weight": 432, "hidden.weight": 60, "head.weight": 30}
TOTAL = sum(SIZES.values())


def zeros(module):
    return {name: int((module.get_parameter(name) == 0).sum()) for name in SIZES}


def outputs(module):
    with torch.no_grad():
        return torch.cat([module.eval()(images) for images, _ in batches()])


def arguments_of(callback):
    return {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters}


class Spare(Net):
    """Has a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Linear(12, 5)


def test_weights_that_never_run_are_named():
    """What multiplies nothing stays dense: the warning says so, and how to count without it."""
    module, other = Spare(), Spare()
    with pytest.warns(UserWarning, match=r"less than amount is pruned.*spare\.weight: nothing was seen.*ignore="):
        fit(module, OBSOneShot(0.5))
    assert not (module.spare.weight == 0).any()
    callback = OBSOneShot(0.5, ignore=["spare"])
    fit(other, callback)
    assert callback.history.goals[-1].reached == 0.5


def test_after_training_half_of_the_weights_are_zero_and_outputs_hardly_move():
    """By default it happens once, after the last step: half of the weights go, and hardly any of what the net gives."""
    dense, pruned = net(), net()
    fit(dense)
    fit(pruned, OBSOneShot(scope="global"))
    assert sum(zeros(pruned).values()) == TOTAL // 2
    whole = outputs(dense)
    moved = (outputs(pruned) - whole).square().sum()
    assert moved < 0.05 * (whole - whole.mean(dim=0)).square().sum()
    assert torch.equal(pruned.norm.weight, dense.norm.weight)


@pytest.mark.parametrize("asked", [{}, {"pattern": "1:2"}, {"amount": {"second": 0.75}}, {"sequential": True}], ids=str)
def test_zeros_are_held_in_what_training_follows(asked):
    """Pruned before a named epoch, the rest of the training moves what is left and never what has gone."""

    class Watches(OBSOneShot):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((trainer.current_epoch, zeros(pl_module), pl_module.second.weight.detach().clone()))

    seen = []
    model = net()
    fit(model, Watches(epoch=1, **asked))
    assert not any(sum(found.values()) for epoch, found, _ in seen if epoch == 0)
    after = [(found, weight) for epoch, found, weight in seen if epoch > 0]
    assert all(found == after[0][0] for found, _ in after)
    assert not torch.equal(after[0][1], after[-1][1])
    expected = {
        "{}": sum(zeros(model).values()) == TOTAL // 2,
        "{'pattern': '1:2'}": zeros(model) == {name: size // 2 for name, size in SIZES.items()},
        "{'amount': {'second': 0.75}}": zeros(model) == {**dict.fromkeys(SIZES, 0), "second.weight": 324},
    }
    assert expected.get(str(asked), True)
    masked = {name: int((~keep).sum()) for name, keep in masks_on(model).items()}
    assert masked == {name: count for name, count in zeros(model).items() if count}


def test_a_killed_run_resumed_ends_where_the_other_ends(tmp_path):
    """What a checkpoint remembers suffices to go on with the same zeros."""
    whole = net(dropout=0.0)
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, OBSOneShot(epoch=1, scope="global"), saves, enable_checkpointing=True)
    resumed = net(seed=5, dropout=0.0)
    trainer(OBSOneShot(epoch=1, scope="global")).fit(
        resumed, batches(), ckpt_path=tmp_path / "epoch=1.ckpt", **reading(weights_only=True)
    )
    assert_same_weights(resumed, weights(whole))


def test_a_trained_checkpoint_is_pruned_without_training(tmp_path):
    """A checkpoint given to fit, with as many epochs as it has, is pruned and not trained."""
    model = net()
    run = trainer(max_epochs=2)
    run.fit(model, batches())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    other = net(seed=3)
    again = trainer(OBSOneShot(0.4, scope="global"), max_epochs=2)
    again.fit(other, batches(), ckpt_path=tmp_path / "dense.ckpt", **reading(weights_only=True))
    assert again.global_step == run.global_step
    assert sum(zeros(other).values()) == gone_of(0.4)
    whole = outputs(model)
    assert (outputs(other) - whole).square().sum() < 0.05 * (whole - whole.mean(dim=0)).square().sum()


def test_statistics_are_averaged_anew_where_asked():
    """With recalibrate=, BatchNorm's variances are those of the pruned network."""
    plain, averaged = net(), net()
    fit(plain, OBSOneShot(amount=0.8, scope="global"))
    fit(averaged, OBSOneShot(amount=0.8, recalibrate=8, scope="global"))
    assert torch.equal(plain.first.weight, averaged.first.weight)
    assert not torch.equal(plain.norm.running_var, averaged.norm.running_var)


PROCESSES = """
    import os, sys
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, Subset
    from lightning_prune import OBSOneShot
    from tests.runs import Net, images, trainer

    processes, target = int(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    module, rank = Net(dropout=0.0, lr=0.0), int(os.environ.get("LOCAL_RANK", 0))
    data = Subset(images(64), range(rank, 64, processes))
    made = trainer(
        OBSOneShot(0.5, epoch=0, batches=4), max_epochs=1, devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto",
        use_distributed_sampler=False,  # which would shuffle
    )
    made.fit(module, DataLoader(data, 16 // processes))
    if made.is_global_zero:
        torch.save(dict(module.named_parameters()), target)
"""


@pytest.mark.slow
def test_processes_look_at_the_batches_of_all(tmp_path):
    """Two processes that see half of every batch each end where one ends that sees them whole."""
    found = []
    for processes in ("1", "2"):
        target = str(tmp_path / processes)
        run = ended(PROCESSES, tmp_path, processes, target)
        assert run.returncode == 0, run.stdout + run.stderr
        found.append(torch.load(target, weights_only=True))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)  # inputs are multiplied in single precision


def test_contract():
    """It pickles, its repr rebuilds it, and nothing is left on the module but what tells of its masks."""
    callback = OBSOneShot(amount=0.3, epoch=1, solver="exact", ignore=["head"], scope="global")
    rebuilt = eval(repr(callback), {name: getattr(lightning_prune, name) for name in lightning_prune.__all__})
    assert arguments_of(rebuilt) == arguments_of(callback) == arguments_of(pickle.loads(pickle.dumps(callback)))
    model, before = net(), global_hooks()
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    fit(model, callback)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own
    assert global_hooks() == before
    assert sorted((path, name) for path, name, _ in hooks_of(model)) in ([], recipe_hooks(model))
    assert zeros(model)["head.weight"] == 0
    assert [fit.name for fit in callback.fits] == ["first.weight", "second.weight", "hidden.weight"]


@pytest.mark.parametrize(
    "asked", [{"batches": 0}, {"solver": "best"}, {"damping": -0.1}, {"amount": 1.5}, {"epoch": -1}], ids=str
)
def test_bad_arguments_are_refused(asked):
    """Arguments out of range are refused at construction."""
    with pytest.raises(ValueError, match=r"\(" + next(iter(asked)) if "epoch" not in asked else "counted from 0"):
        OBSOneShot(**asked)


@pytest.mark.parametrize("epoch", [None, 1])
@pytest.mark.parametrize(
    "earlier",
    [
        lambda model: fit(model, OBSOneShot(amount=0.6, scope="global")),
        lambda model: prune_weights(model, 0.6, scope="global"),
        lambda model: prune_weights(model, {"hidden": 0.9}),
        lambda model: prune_weights(model, {"hidden.bias": 0.9}),
    ],
    ids=["by itself", "by magnitude", "one layer", "a bias"],
)
def test_masked_weights_stay_zero(earlier, epoch):
    """What is zero already stays zero and counts; as many more go as that takes, and none where enough has gone."""
    for amount in (0.3, 0.8):
        model = net()
        earlier(model)
        masks = masks_on(model)
        weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        gone = sum(int((weight == 0).sum()) for weight in weights)
        fit(model, OBSOneShot(amount=amount, scope="global", epoch=epoch))
        assert masks and all(not model.get_parameter(name).detach()[~keep].any() for name, keep in masks.items())
        asked = math.ceil(amount * sum(weight.numel() for weight in weights))
        assert sum(int((weight == 0).sum()) for weight in weights) == max(gone, asked)


def test_an_epoch_that_never_comes_is_refused():
    """Training that ends before the named epoch is refused before it starts."""
    with pytest.raises(PruningError, match="max_epochs=3"):
        fit(Net(), OBSOneShot(epoch=7, scope="global"))


class Wants(Net):
    """Its forward takes no part of a batch by itself."""

    def forward(self, images, scale):
        return super().forward(images * scale)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        assert self.training
        return F.cross_entropy(self(images, 1.0), labels)


@pytest.mark.parametrize(
    ("kind", "callback", "told"),
    [
        (Net, OBSOneShot(amount=0.999, scope="global"), r"at most 9\d\.\d% can leave"),
        (Wants, OBSOneShot(scope="global"), "Wants.forward accepts nothing"),
        (Wants, FilterL1Pruning(schedule=OneShot(at=1), recalibrate=1, example_inputs=(IMAGE, 1.0)), "accepts nothing"),
    ],
    ids=["amount", "batches", "recalibrate"],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(kind, callback, told):
    """What cannot be done at the end, or before a later epoch, is refused before a step of training."""
    model = net(kind)
    before = weights(model)
    with pytest.raises(PruningError, match=told):
        fit(model, callback)
    assert_same_weights(model, before)


def test_batches_that_are_no_numbers_are_told():
    """Where layers see NaN, that is what the error says, and not that something is singular; nothing is masked."""

    class Blinded(Net):
        def forward(self, images):
            return super().forward(images if self.training else images * float("nan"))

    module = net(Blinded)
    before = weights(module)
    with pytest.raises(PruningError, match=r"first.weight: The Hessian.*holds NaN or infinity, as do the batches"):
        fit(module, OBSOneShot(0.5, epoch=0, scope="global"))
    assert_same_weights(module, before)


def test_without_training_batches_nothing_is_pruned():
    """A fit whose training is switched off ends with a warning, and the weights are as they were."""
    module = net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.warns(UserWarning, match="trained no batch, so it pruned nothing"):
        fit(module, OBSOneShot(0.5, batches=1), limit_train_batches=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
