"""Processes that hold other models than each other are found out at a cut."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_prune import PruningError
from lightning_prune.callbacks.engine.processes import refuse_apart


class Together:
    """Stands for a strategy of several processes, which are threads."""

    root_device = torch.device("cpu")

    def __init__(self, count):
        self.told, self.barrier, self.sent = [None] * count, threading.Barrier(count, timeout=10), []

    def of(self, rank):
        return SimpleNamespace(
            root_device=self.root_device,
            all_gather=lambda tensor: torch.stack(self._exchanged(rank, tensor)),
            broadcast=lambda value, src=0: self._exchanged(rank, value)[src],
        )

    def _exchanged(self, rank, value):
        self.told[rank] = value
        self.sent.append(value)
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found


def compared(*models):
    """Let each model's process compare; return what each raised, and what was sent."""
    together = Together(len(models))
    raised = [None] * len(models)

    def run(rank):
        try:
            refuse_apart("Ours", SimpleNamespace(strategy=together.of(rank)), models[rank])
        except PruningError as error:
            raised[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised, together.sent


def model(width=4, kind=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_equal_models_pass_by_one_small_message(kind):
    """Equal models go on, and two numbers of each process were sent."""
    raised, sent = compared(model(kind=kind), model(kind=kind), model(kind=kind))
    assert raised == [None] * 3
    assert [message.numel() for message in sent] == [2] * 3


def change_a_bit(other):
    other[1].weight.data[1, 2] = torch.nextafter(other[1].weight[1, 2], torch.tensor(9.0))


def exchange_two(other):
    other[1].weight.data[0, [0, 1]] = other[1].weight.data[0, [1, 0]]


@pytest.mark.parametrize("change", [change_a_bit, exchange_two])
def test_other_values_are_told(change):
    """One bit, or two values at each other's place, is found by all processes, which name parameter and process."""
    other = model()
    with torch.no_grad():
        change(other)
    raised, _ = compared(model(), model(), other)
    assert len(set(raised)) == 1
    assert "Ours: after a cut the processes hold different models. The first to differ is 1.weight" in raised[0]
    assert "(2, 4) on process 0, (2, 4) on process 2, with other values" in raised[0] and "sync_dist=True" in raised[0]


def test_other_shapes_are_told():
    """So are other widths, and parameters that one of them lacks."""
    raised, _ = compared(model(), model(3))
    assert len(set(raised)) == 1 and "0.weight: (4, 3) on process 0, (3, 3) on process 1." in raised[0]
    raised, _ = compared(nn.Sequential(*model(), nn.PReLU()), model())
    assert len(set(raised)) == 1 and "2.weight: (1,) on process 0, absent on process 1." in raised[0]


def test_what_ddp_was_told_to_ignore_may_differ():
    """Parameters that DDP leaves to each process are left to each process."""
    one, other = model(), model()
    other[1].bias.data += 1
    one._ddp_params_and_buffers_to_ignore = other._ddp_params_and_buffers_to_ignore = ["1.bias"]
    assert compared(one, other)[0] == [None, None]
