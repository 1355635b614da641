"""Refits, at each pruning step of a run, the weights that sum over pruned units; selects nothing."""

from __future__ import annotations

from dataclasses import replace

from lightning_prune.callbacks.engine.processes import calibration_of
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.measure.products import find_products
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.repair import repaired
from lightning_prune.pruning.report_types import Repair


class ConsumerRepair:
    """Compensates for pruned units on some training batches.

    Attributes:
        batches: How many batches of each process.
        repairs: What was refitted at the last pruning step.
    """

    def __init__(self, batches: int) -> None:
        """Start without repairs."""
        self.batches = batches
        self.repairs: tuple[Repair, ...] = ()

    def repair(self, run: Run, plan: Plan) -> Plan:
        """Return the plan with refitted weights and biases, the same on all processes."""
        with calibration_of(run.trainer, run.module, self.batches, run.own.strategy.traces) as calibration:
            products = find_products(run.module, calibration.batches[0], calibration.forward)
            plan = repaired(plan, products, calibration)
        self.repairs = plan.repairs
        return replace(plan, tensors=run.trainer.strategy.broadcast(plan.tensors))
