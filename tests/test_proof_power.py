"""The power of the proof: errors planted in right cuts are caught, and the right cuts beside them are not refused."""

import json
from collections import Counter

import pytest
import torch

from benchmarks.planted.effects import Reference
from benchmarks.planted.subjects import CASES, SETTINGS, Planted, subject_of
from benchmarks.proof import RESULTS, fixed_subjects, task, tried
from lightning_prune.surgery import draft, find_groups

PLACES = {f"{subject.name}, {setting}": number for number, (setting, subject) in enumerate(fixed_subjects())}
FEW = (
    "plain, float32", "Concat, bfloat16", "few_groups, float32", "Bilinear, float64", "fused, bfloat16",
    "kernels made from data, integers", "heads in a config, LayerScale 1e-6", "GPT of 2 layers, float32, GPT-2 init",
)  # fmt: skip


MISSED = json.loads(RESULTS.read_text())["missed"]
EXPLAINED = [miss["network"] + miss["where"] for miss in MISSED]
"""Errors that the benchmark misses, too; its page says why."""


def assert_all_caught(rows):
    missed = [r for r in rows if r["effect"] and not r["caught"] and r["network"] + r["where"] not in EXPLAINED]
    told = "\n".join(f"{r['kind']}: {r['where']} in {r['network']} ({r['setting']}): {r['effect']}" for r in missed)
    assert not missed, f"{len(missed)} of {sum(bool(r['effect']) for r in rows)} errors were missed\n{told}"
    refused = [r for r in rows if r["kind"].startswith("none") and r["caught"]]
    assert not refused, f"right cuts were refused: {refused}"


def test_no_miss_comes_in_by_the_file_of_results():
    """The page of the benchmark explains four, all of one kind."""
    assert len(MISSED) <= 4 and {miss["kind"] for miss in MISSED} <= {"wrong count"}


@pytest.mark.parametrize("name", FEW)
def test_the_proof_catches_errors_planted_in_right_cuts(name):
    """Whatever is wrong with a cut, if it changes what an operator computes, it is disproved."""
    rows = task(PLACES[name])
    assert len(rows) > 5
    assert_all_caught(rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, 700, 4))
def test_the_proof_catches_errors_in_many_networks(number):
    """The same over the small networks, the cases and random programs, in every setting."""
    assert_all_caught(task(number))


@pytest.mark.parametrize("setting", ["float32", "integers", "loss alone"])
def test_whether_an_error_counts_is_decided_without_the_proof(setting):
    """The right cut has no effect that counts; another index in one slot has, whatever the outputs are."""
    subject = subject_of(SETTINGS[setting](CASES["kernels made from data"]))
    model = subject.build()
    structure = find_groups(model, subject.example)
    name, group = next((name, g) for name, g in structure.groups.items() if len(g.slots) > 2)
    stays = torch.arange(group.width).numpy() % 2 == 0
    cut = draft(model, structure, {name: stays})
    reference = Reference(subject, model, cut)
    assert reference.changes(Planted("none", "", cut)) == ""
    tensor = next(iter(cut.kept))

    def edit(tensors):
        tensors[tensor] = tensors[tensor].flip(next(iter(cut.kept[tensor])))

    assert reference.changes(Planted("another order", tensor, cut, edit)) != ""


def test_every_kind_of_error_is_planted():
    """Over a few networks errors of every kind are planted, and most have an effect."""
    kinds: Counter = Counter()
    for name in ("few_groups, float32", "fused, float32", "plain, float64", "heads in a config, float32"):
        subject = fixed_subjects()[PLACES[name]][1]
        kinds.update(r["kind"] for r in tried(subject, "float32", 3) if r["effect"])
    assert kinds.keys() >= {
        "another index", "shifted indices", "other rows", "rows in another order", "one slot not cut",
        "buffer cut elsewhere", "bias cut elsewhere", "a row scaled by 1.1", "stale attribute",
        "heads at the wrong width",
    }  # fmt: skip
