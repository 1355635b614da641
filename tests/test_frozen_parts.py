"""Layers that no gradient of the training reaches: scored otherwise where that is right, refused where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import FilterPruning, OneShot, PruningError, TaylorFilterPruning, prune_filters
from lightning_prune.measure.unit_statistics import UnitMeans
from tests.runs import Net, fit, net

FOLLOWING_AUTOGRAD = ("taylor", "taylor_activations", "obd", "output_change", "apoz")
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(1))


def layers(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 10), nn.ReLU(), nn.Linear(10, outputs), nn.ReLU())


class Tuned(Net):
    """A backbone and a head on the mean colours, of which a part may be frozen."""

    frozen: tuple[str, ...] = ("backbone",)

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.backbone, self.top = layers(2, 10), layers(10, 3)
        for name in ("first", "norm", "second", "hidden", "drop", "head"):
            delattr(self, name)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, images):
        return self.top(self.backbone(images.mean(dim=(2, 3))))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    def wide(self):
        return [part.out_features for part in self.modules() if isinstance(part, nn.Linear)]


class Readers(Tuned):
    """What reads the units is frozen."""

    frozen = ("top",)


class Makers(Tuned):
    """All but the last layer is frozen."""

    frozen = ("backbone", "top.0")


@pytest.mark.parametrize("criterion", ["l1", *FOLLOWING_AUTOGRAD])
@pytest.mark.parametrize("kind", [Tuned, Readers, Makers])
def test_frozen_layers_are_pruned_in_runs(kind, criterion, recwarn):
    """As much as was asked for leaves, and no warning says that something was left undone."""
    module = net(kind)
    pruning = FilterPruning(0.5, criterion=criterion, schedule=OneShot(1), module=["backbone", "top"], report=False)
    fit(module, pruning, max_epochs=2)
    assert module.wide() == [5, 5, 5, 3]
    assert not any("were due and were made" in str(warning.message) for warning in recwarn)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, _ in module.named_parameters() if name.startswith(kind.frozen)]


class WithoutGrad(nn.Module):
    """Runs its backbone without gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.top = layers(6, 10), layers(10, 3)

    def forward(self, x):
        with torch.no_grad():
            read = self.backbone(x)
        return self.top(read)


class Detached(WithoutGrad):
    """Cuts its backbone off the graph."""

    def forward(self, x):
        return self.top(self.backbone(x).detach())


def pruned(model, criterion, **arguments):
    batches = [X] if criterion in ("output_change", "apoz") else [(X, Y)]
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    data = {} if criterion == "l1" else {"batches": batches, "loss": loss if len(batches[0]) == 2 else None}
    return prune_filters(model, X, 0.4, criterion=criterion, scope="global", progress=False, **data, **arguments)


@pytest.mark.parametrize("criterion", FOLLOWING_AUTOGRAD)
@pytest.mark.parametrize("kind", [WithoutGrad, Detached])
def test_what_gradients_do_not_reach_is_not_taken_for_useless(kind, criterion):
    """Units that the loss depends on and autograd does not show are refused; what the message advises works."""
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruningError, match=r"backbone\.0: no gradient reaches .*ignore=\['backbone\.0'\]"):
        pruned(model, criterion)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pruned(model, criterion, ignore=["backbone.0", "backbone.2"])
    assert [len(model.backbone[0].weight), len(model.backbone[2].weight)] == [10, 10] and len(model.top[0].weight) < 10
    pruned(kind(), "l1")


@pytest.mark.parametrize("form", ["weights", "activations"])
def test_runs_refuse_it_too(form):
    """The optimizer trains all parameters, and no gradient reaches some."""

    class Blind(Tuned):
        frozen = ()

        def forward(self, images):
            return self.top(self.backbone(images.mean(dim=(2, 3))).detach())

    pruning = TaylorFilterPruning(0.4, form=form, scope="global", report=False)
    with (
        pytest.warns(UserWarning, match=r"On the first training batch: backbone\.0: no gradient reaches"),
        pytest.raises(PruningError, match=r"backbone\.0: no gradient reaches"),
    ):
        fit(net(Blind), pruning, max_epochs=2)


@pytest.mark.parametrize("form", ["weights", "activations"])
def test_a_backbone_that_thaws_in_time_is_pruned_with_a_warning(form):
    """Gradients that later epochs show count; that the first batch had none is said."""

    class Thawing(Tuned):
        frozen = ()

        def forward(self, images):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.current_epoch > 0):
                read = self.backbone(images.mean(dim=(2, 3)))
            return self.top(read)

    module = net(Thawing)
    pruning = TaylorFilterPruning(0.4, form=form, scope="global", schedule=OneShot(2), report=False)
    with pytest.warns(UserWarning, match=r"On the first training batch: backbone\.0: no gradient reaches"):
        fit(module, pruning, max_epochs=3)
    assert sum(module.wide()) < sum(net(Thawing).wide())


def test_units_that_the_loss_does_not_need_are_worth_nothing():
    """A branch that only another output shows leaves first, as before."""

    class TwoOutputs(WithoutGrad):
        def forward(self, x):
            read = self.backbone(x)
            return self.top[2](self.top[0](x.repeat(1, 2)[:, :10])), read

    model = TwoOutputs()
    loss = lambda model, batch: F.cross_entropy(model(batch[0])[0], batch[1])  # noqa: E731
    prune_filters(
        model, X, 0.4, criterion="taylor", batches=[(X, Y)], loss=loss, scope="global", target="filters", progress=False
    )
    assert len(model.backbone[0].weight) < 5 and len(model.top[0].weight) > 5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("what, told", [("veiled", "are frozen, so no backward pass"), ("hidden", "a fused kernel")])
def test_messages_say_what_hid_the_units(what, told):
    """Frozen layers are not called fused kernels, and the name in the advice is one of a group."""
    means = UnitMeans({"conv/total": 2})
    means.note(what, ["conv/total"])
    with pytest.raises(PruningError, match=rf"^conv: .*{told}.*ignore=\['conv'\]"):
        means.compute()
