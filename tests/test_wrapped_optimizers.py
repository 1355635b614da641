"""Optimizers that hold another one: its state follows a cut, masks and a rollback as if it stood by itself."""

import pytest
import torch

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
)
from tests.runs import Net, assert_same_weights, fit, net, weights
from tests.test_layer_pruning import Deep


class Around(torch.optim.Optimizer):
    """Steps by the optimizer that it holds; ``shared`` wrappers have its state, too."""

    def __init__(self, base, shared=False):
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups
        if shared:
            self.state = base.state

    def step(self, closure=None):
        return self.base.step(closure)


class Sharp(Around):
    """Sharpness-aware minimization (Foret et al. 2021): a step by the gradient at the worst point nearby."""

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for parameter in parameters:
            self.state[parameter]["before"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05 / float(norm + 1e-12))
        closure()
        for parameter in parameters:
            parameter.copy_(self.state[parameter]["before"])
        self.base.step()
        return loss


def trained_by(wrap, kind=Net, base=torch.optim.Adam):
    class Trained(kind):
        def configure_optimizers(self):
            return wrap(base(self.parameters(), 0.01))

        def validation_step(self, batch, batch_idx):
            self.log("score", float(self.current_epoch < 3))

    return Trained


WAYS = {
    "bare": lambda base: base,
    "around": Around,
    "twice": lambda base: Around(Around(base)),
    "shared": lambda base: Around(base, shared=True),
}
CALLBACKS = {
    "filters": lambda: [FilterL1Pruning(0.5, schedule=Linear(1, 3))],
    "weights": lambda: [IterativeMagnitudePruning(0.5, schedule=Linear(1, 3))],
    "layers": lambda: [LayerPruning(1, schedule=OneShot(1))],
    "guarded": lambda: [FilterL1Pruning(0.5, schedule=Linear(1, 3)), MetricGuard("score", 0.5)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_wrapped_optimizer_trains_as_the_bare_one(callback):
    """Cuts, masks, removed layers and rollbacks: the run under a wrapper is that without it, to the bit."""
    ends = {}
    for way, wrap in WAYS.items():
        module = net(trained_by(wrap, Deep if callback == "layers" else Net), dropout=0.0)
        fit(module, *CALLBACKS[callback](), val=True, max_epochs=6)
        ends[way] = module
    for module in ends.values():
        assert_same_weights(module, weights(ends["bare"]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_sharpness_aware_minimization(base):
    """The state of both optimizers has the shapes of the pruned parameters."""
    module = net(trained_by(Sharp, base=base))
    made = fit(module, FilterL1Pruning(0.5, schedule=Linear(1, 2)), max_epochs=4)
    assert len(module.second.weight) == 3
    for optimizer in (made.optimizers[0], made.optimizers[0].base):
        for parameter, state in optimizer.state.items():
            assert all(value.shape in ((), parameter.shape) for value in state.values() if torch.is_tensor(value))


def test_what_cannot_follow_is_refused_inside_of_a_wrapper():
    """LBFGS keeps one history of all parameters, wherever it stands."""
    with pytest.raises(PruningError, match="LBFGS keeps one history"):
        fit(net(trained_by(Around, base=torch.optim.LBFGS)), FilterL1Pruning(0.5))
