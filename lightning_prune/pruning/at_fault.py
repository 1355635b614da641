"""Finds which groups of a cut are wrong, so that the others can be cut; changes nothing."""

from __future__ import annotations

from itertools import chain

from torch import nn

from lightning_prune.structure import Keep, Structure
from lightning_prune.surgery import Disproof, Proof, SlimValues, draft, verify
from lightning_prune.surgery.expected_outputs import Lefts


def groups_at_fault(model: nn.Module, structure: Structure, keep: Keep, failure: Disproof) -> dict[str, str]:
    """Return the groups that must be kept whole so that the cut of the others can be verified, with the reason.

    Blocks of a network that repeat fail alike: groups at the same place in modules of the same class are judged
    together.
    """
    groups = set(failure.groups)
    if failure.kind is not None:
        lefts = Lefts(structure, keep)
        for ran in structure.ledger.ran:
            if ran.kind == failure.kind:
                groups |= lefts.groups(*ran.taken, *ran.made)
    if groups:
        return dict.fromkeys(sorted(groups), failure.reason)
    return _culprits(model, structure, keep)


def _culprits(model: nn.Module, structure: Structure, keep: Keep) -> dict[str, str]:
    """Halve the groups that are cut until those are found that cannot be, beside the others that can."""
    reasons: dict[str, str] = {}

    def search(links: list[tuple[str, ...]], accepted: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        cut = draft(model, structure, {name: keep[name] for link in accepted + links for name in link})
        failure = verify(model, structure, cut, SlimValues(cut, model))
        if isinstance(failure, Proof):
            return links
        if len(links) == 1:
            reasons.update(dict.fromkeys(links[0], failure.reason))
            return []
        half = len(links) // 2
        left = search(links[:half], accepted)
        return left + search(links[half:], accepted + left)

    linked = [link for link in structure.links if not keep[link[0]].all()]
    in_links = set(chain.from_iterable(linked))
    single = [(name,) for name, stays in keep.items() if not stays.all() and name not in in_links]
    search([*single, *linked], [])
    return reasons
