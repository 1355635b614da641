"""Runs the slim model, and beside each of its operators the one of the full model, on what a trace wrote down of it.

Each tensor of the slim model has a *twin*: the tensor of the full model at the same place. Every operator is compared
at once, entry by entry, so that one run of the model's code is enough. What reduces over units gets equal inputs in
both models once only what is left of the full one's is taken: its output is that of the slim model, filled up.

Only equality to rounding passes here. Whatever does not, or cannot be said without running the full model's own code,
raises :class:`OutOfStepError`, and the two models are to be run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.model.tensor_state import updates_nothing, written_by
from lightning_prune.structure.decisions import impose_
from lightning_prune.structure.labels import Ran
from lightning_prune.structure.rules import tensors_among
from lightning_prune.structure.tracer import plain
from lightning_prune.surgery.expected_outputs import Lefts, OtherOperatorsError
from lightning_prune.surgery.reference_run import Reference, filled, is_grouped, silenced
from lightning_prune.surgery.replay import Counted, DifferentError, Exchanges, Facts, Seen, restricted, tensors_of
from lightning_prune.surgery.slim_run import check_count, check_sizes, is_constant

__all__ = ["AllPositionsError", "Lockstep", "OutOfStepError"]

_aten = torch.ops.aten
_TURNS = frozenset({_aten.t, _aten.transpose, _aten.permute, _aten.detach, _aten.alias})
"""Operators that show all entries of their input in another order of dimensions."""
_SIZED = frozenset({_aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.expand, _aten.as_strided_})
"""Operators that are told the sizes of their output."""
_RIDING = "_lightning_prune_twin"
_HUGE = 1e20
_ROUNDING = 1e-5
_ROUNDING_DOUBLE = 1e-12


class OutOfStepError(Exception):
    """What two runs in one cannot tell: the models are to be run one after the other."""


class AllPositionsError(OutOfStepError):
    """On fewer positions the numbers that the full model gives an operator cannot be told."""


class _Twin:
    """A tensor of the full model, and whether what is left of it is known to equal that of the slim one.

    ``full`` is None where both models share the tensor.
    """

    __slots__ = ("equal", "full", "run")

    def __init__(self, full: Tensor | None, equal: bool, run: object) -> None:
        self.full, self.equal, self.run = full, equal, run


class Lockstep(Reference):
    """The run of the slim model with the full one beside it.

    Attributes:
        operators: How many operators ran in both.
    """

    slim = True

    def __init__(
        self,
        ran: list[Ran],
        lefts: Lefts,
        counts: Counted,
        tolerance: float,
        pairs: Iterable[tuple[Tensor, Tensor, bool]],
        instead: Exchanges,
        instead_of_full: Exchanges,
        fewer: bool,
    ) -> None:
        """Prepare a run.

        Args:
            ran: The operators of the trace.
            lefts: What is left of their tensors.
            counts: Arguments that count units.
            tolerance: Of numbers that code works out from widths.
            pairs: Tensors given to the slim model, those of the full one, and whether what is left of these is known to
                be equal.
            instead: Tensors to take in place of others in the slim model.
            instead_of_full: The same for the full one.
            fewer: Whether the inputs hold fewer positions than those of the trace.
        """
        super().__init__(ran, lefts, instead, counts, {}, tolerance)
        self._run = object()
        self._given: dict[int, tuple[Tensor, _Twin]] = {}
        for slim, full, equal in pairs:
            self._given[id(slim)] = slim, _Twin(None if full is slim else full, equal, self._run)
        self._instead_of_full, self.fewer = instead_of_full, fewer
        self._last_written: dict[int, int] = {}  # storage -> ``id`` of the tensor that was written to last
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = self.in_parts(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        try:
            facts = self.facts_of(func)
            if facts.written and updates_nothing(func, args, kwargs):
                facts = facts._replace(written=())
            at = self.next(facts, args)
            if at is None:
                return self._laid_out(facts, args, kwargs)
            return self._both(at, facts, args, kwargs)
        except (DifferentError, OtherOperatorsError, OutOfStepError) as error:
            self.failure = self.failure or error
            raise

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Have both models run on the same tensors, their inputs."""
        for tensor in tensors:
            self._given[id(tensor)] = tensor, _Twin(None, True, self._run)

    def twin_of(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the full model at the place of one of the slim model's.

        Raises:
            OutOfStepError: If it was made in this run, and nothing is known of it.
        """
        twin = self._known(tensor)
        if twin is None or twin.full is None:
            return tensor
        make = self._instead_of_full.get(id(twin.full))
        return twin.full if make is None else make()

    def compare_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Compare what the models return.

        Raises:
            OutOfStepError: If it is not the same.
        """
        for slim in outputs:
            if not _equal(self.twin_of(slim), slim):
                raise OutOfStepError("the models' outputs differ")

    def _known(self, tensor: Tensor) -> _Twin | None:
        """Return the twin of a tensor, None for one that the model's code brings."""
        given = self._given.get(id(tensor))
        if given is not None:
            return given[1]
        twin: _Twin | None = getattr(tensor, _RIDING, None)
        if twin is not None and twin.run is self._run:
            return twin
        if tensor.untyped_storage()._cdata in self._made:
            raise OutOfStepError(f"a tensor came from no operator {tuple(tensor.shape)}")
        return None

    def _both(self, at: int, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run an operator in both models and compare what it returns."""
        ran = self._ran[at]
        values = (*args, *kwargs.values()) if kwargs else args
        tensors = tensors_among(values)
        twins = [self._known(tensor) for tensor in tensors]
        if None in twins:
            self._check_foreign(ran, tensors, twins)
        seen = Seen(plain(values))
        if at in self._counts:
            check_count(ran, seen.plain, *self._counts[at])
        shared = self._shared(ran, facts, twins, seen.plain)
        if facts.written and any(True for _ in written_by(facts.func, (), kwargs)):
            raise OutOfStepError("an operator writes into an argument that it takes by name")
        if facts.written and not shared:
            self._refuse_shared(facts, args)
        out, taken = self._run_slim(at, facts, args, kwargs)
        outputs = tensors_of(out)
        if len(outputs) != len(ran.made):
            raise OutOfStepError("an operator returns another number of tensors")
        if ran.decisions:
            impose_(ran.decisions, outputs)
        for which, tensor in enumerate(outputs):
            check_sizes(ran, which, tensor, self._lefts, self.fewer)
        if shared:
            for tensor in outputs:
                self._lay(tensor, None, True)
        elif facts.reduces and not self._goes_through(ran, facts, seen.plain):
            self._check_given(at, facts, seen)
            if is_grouped(facts, ran.plain):
                values = self._twins_in(args)
                values[0] = silenced(values[0], self._lefts.of(ran.taken[0]))
                full = self.plain_run(facts, _merged(values, ran.plain), kwargs)
                self._lay(out, full, self._alike(at, facts, 0, out, full, tensors[:1]))
            else:
                self._check_equal(ran, tensors, taken, twins)
                for tensor, full in zip(outputs, self._filled_up(ran, facts, args, outputs), strict=True):
                    self._lay(tensor, full, True)
        else:
            numbers = self._numbers_of_full(at, facts, seen, tensors, outputs)
            fulls = self._run_full(at, facts, seen, args, kwargs, numbers)
            if ran.decisions:
                impose_(ran.decisions, fulls)
            for which, (tensor, full) in enumerate(zip(outputs, fulls, strict=True)):
                self._lay(tensor, full, self._alike(at, facts, which, tensor, full, tensors[:1]))
        self.operators += 1
        self.compared += len(outputs)
        if facts.writes:
            self._last_written[args[0].untyped_storage()._cdata] = id(args[0])
        return out

    def _run_slim(self, at: int, facts: Facts, args: Any, kwargs: Any) -> tuple[Any, list[Tensor] | None]:
        """Return what an operator of the slim model returns, and the tensors that it took where those are others."""
        taken = None
        if self._instead:
            args = [self._taken(value) for value in args]
            kwargs = {name: self._taken(value) for name, value in kwargs.items()}
            taken = tensors_among((*args, *kwargs.values()))
        if not facts.draws:
            return self.plain_run(facts, args, kwargs), taken
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise OutOfStepError("the code brings its own random numbers")
        if torch.initial_seed() != self._seed:
            raise OutOfStepError("the code seeds its random numbers")
        return self._drawn(at, facts, args, kwargs), taken

    def _lay(self, tensor: Tensor, full: Tensor | None, equal: bool) -> None:
        if id(tensor) in self._given:
            self._given[id(tensor)] = tensor, _Twin(full, equal, self._run)
        else:
            setattr(tensor, _RIDING, _Twin(full, equal, self._run))

    # What both models share, and what cannot be told

    def _shared(self, ran: Ran, facts: Facts, twins: list[_Twin | None], mine: tuple[Any, ...]) -> bool:
        """Return whether both models run the operator on the very same tensors and numbers."""
        if not twins or facts.draws or any(twin is not None and twin.full is not None for twin in twins):
            return False
        return mine == ran.plain and not any(labels.blank for labels in ran.made)

    def _check_foreign(self, ran: Ran, tensors: list[Tensor], twins: list[_Twin | None]) -> None:
        """Check that tensors which the model's code brings are those that it brought to the trace.

        A tensor that it makes from a number may be another in the slim model.
        """
        for at, (tensor, twin) in enumerate(zip(tensors, twins, strict=True)):
            if twin is None:
                full = (ran.foreign or {}).get(at)
                if full is not tensor and (full is None or not _equal(full, tensor)):
                    told = f"the code brings another tensor ({ran.path}, {ran.func})"
                    raise AllPositionsError(told) if self.fewer else OutOfStepError(told)

    def _refuse_shared(self, facts: Facts, args: Any) -> None:
        """Refuse to write into a tensor that both models share."""
        for position in facts.written:
            value = args[position] if position < len(args) else None
            if value is not None and (not isinstance(value, Tensor) or self.twin_of(value) is value):
                raise OutOfStepError("both models share what is written to")

    def _laid_out(self, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run an operator that lays out memory and that the trace does not have."""
        if facts.packet in _SIZED or len(tensors_among(args)) != 1:
            raise OutOfStepError("the slim model shows a tensor in another way")
        twin = self._known(args[0])
        if twin is None:
            raise OutOfStepError("the code brings another tensor")
        out = self.run(facts.func, args, kwargs)
        full = None if twin.full is None else self.run(facts.func, [self.twin_of(args[0]), *args[1:]], kwargs)
        self._lay(out, full, twin.equal and not self._written_elsewhere(args[0]))
        return out

    # The full model's numbers

    def _numbers_of_full(
        self, at: int, facts: Facts, seen: Seen, tensors: list[Tensor], outputs: list[Tensor]
    ) -> tuple[Any, ...]:
        """Return what the full model gives an operator beside tensors."""
        ran, mine = self._ran[at], seen.plain
        if mine == ran.plain or not self.fewer:
            return ran.plain
        if not facts.pointwise and self._as_on_all(ran, tensors, outputs):
            return ran.plain
        raise AllPositionsError(f"positions and channels look alike ({ran.path}, {facts.packet}: {mine})")

    def _as_on_all(self, ran: Ran, tensors: list[Tensor], outputs: list[Tensor]) -> bool:
        """Return whether all tensors of an operator have the sizes that they would have on all positions."""
        taken = zip(tensors, ran.taken, ran.entering, strict=True)
        made = zip(outputs, ran.made, ran.leaving, strict=True)
        return all(self._lefts.shape(labels, full) == tuple(slim.shape) for slim, labels, full in (*taken, *made))

    def _check_given(self, at: int, facts: Facts, seen: Seen) -> None:
        """Check that a reducing operator gets the numbers that the full model gives it."""
        try:
            self._check_numbers(at, facts, seen, self._ran[at].plain)
        except DifferentError as error:
            if self.fewer:
                raise AllPositionsError(str(error)) from error
            raise

    # Running the full model

    def _goes_through(self, ran: Ran, facts: Facts, mine: tuple[Any, ...]) -> bool:
        """Return whether an operator, which may reduce, sums over nothing that loses units, or constants alone."""
        if all(labels.constant for labels in ran.taken):
            return True
        entering = [self._lefts.of(labels) for labels in ran.taken]
        return any(entering) and self._passes(ran, facts, entering, mine)

    def _run_full(
        self, at: int, facts: Facts, seen: Seen, args: Any, kwargs: Any, numbers: tuple[Any, ...]
    ) -> list[Tensor]:
        """Run an operator on the full model's tensors and numbers."""
        values = self._twins_in(args)
        named = self._twins_in(kwargs.values())
        if numbers != seen.plain:
            values = _merged([*values, *named], numbers)
            if facts.pointwise:
                self._seen = {at: seen}
                values = self._with_constants(at, facts, seen, values, {})
            values, named = values[: len(args)], values[len(args) :]
        keyed = dict(zip(kwargs, named, strict=True))
        if not facts.draws:
            return tensors_of(self.plain_run(facts, values, keyed))
        self.slim = False
        try:
            return tensors_of(self._drawn(at, facts, values, keyed))
        finally:
            self.slim = True

    def _twins_in(self, values: Iterable[Any]) -> list[Any]:
        found = []
        for value in values:
            if isinstance(value, Tensor):
                value = self.twin_of(value)
            elif type(value) in (list, tuple):
                value = self._twins_in(value)
            found.append(value)
        return found

    def _filled_up(self, ran: Ran, facts: Facts, args: Any, outputs: list[Tensor]) -> list[Tensor]:
        """Return what a reducing operator returns in the full model, with what has gone filled in."""
        fulls = [filled(tensor, self._lefts.of(labels)) for tensor, labels in zip(outputs, ran.made, strict=True)]
        taken = dict(zip(map(id, tensors_among(args)), ran.taken, strict=False)) if facts.written else {}
        for position in facts.written:
            value = args[position] if position < len(args) else None
            if value is not None:
                full = self.twin_of(value)
                self.keep(full)
                full.copy_(filled(value, self._lefts.of(taken[id(value)])))
        if facts.writes:
            fulls[0] = self.twin_of(args[0])
        return [full.clone() if full is tensor else full for full, tensor in zip(fulls, outputs, strict=True)]

    # Comparing

    def _check_equal(
        self, ran: Ran, tensors: list[Tensor], taken: list[Tensor] | None, twins: list[_Twin | None]
    ) -> None:
        """Check that a reducing operator takes, in both models, the same of what is left.

        Raises:
            OutOfStepError: If it does not.
        """
        for tensor, slim, twin, labels in zip(tensors, taken or tensors, twins, ran.taken, strict=True):
            left = self._lefts.of(labels)
            if twin is None or twin.full is None:
                if left:
                    raise OutOfStepError("channels leave a tensor that both models share")
            elif not twin.equal or self._written_elsewhere(tensor):
                if not _equal(restricted(self.twin_of(tensor), left), slim):
                    raise OutOfStepError("an operator takes other entries")
                twin.equal = True

    def _written_elsewhere(self, tensor: Tensor) -> bool:
        """Return whether a view of a tensor, or what it is a view of, was written to after it was compared."""
        if not self._last_written:
            return False
        last = self._last_written.get(tensor.untyped_storage()._cdata)
        return last is not None and last != id(tensor)

    def _alike(self, at: int, facts: Facts, which: int, slim: Tensor, full: Tensor, first: list[Tensor]) -> bool:
        """Compare an output; return whether it is known to be equal on what is left.

        Raises:
            OutOfStepError: If it is not.
        """
        ran = self._ran[at]
        labels = ran.made[which]
        left = self._lefts.of(labels)
        if (left or full.shape != slim.shape) and not labels.blank:
            self._compare_shape(ran, which, full, tuple(slim.shape))
        if len(ran.made) == 1 and is_constant(ran, slim):
            self._compare_constant(at, full, float(slim))
            return False
        if facts.shows_only:
            twin = self._known(first[0])
            return facts.packet in _TURNS and twin is not None and twin.equal and not self._written_elsewhere(first[0])
        if facts.unwritten or labels.blank:
            return False
        equal = _equal(restricted(full, left), slim)
        if slim.numel() and (slim.is_floating_point() or slim.is_complex()):
            if not equal:
                raise OutOfStepError(f"an output differs ({ran.path}, {facts.packet})")
            return True
        if slim.numel() or len(ran.made) == 1:  # norms return empty ones, too
            self._note_skipped(ran, facts, which, full)
        return equal


def _merged(values: Iterable[Any], numbers: Iterable[Any]) -> list[Any]:
    """Return arguments with their tensors, and other numbers."""
    found: list[Any] = []
    for value, number in zip(values, numbers, strict=True):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            found.append(_merged(value, number))
        else:
            found.append(number)
    return found


def _equal(full: Tensor, slim: Tensor) -> bool:
    """Return whether tensors are equal to rounding, relative to the largest entry."""
    if full.shape != slim.shape or full.dtype is not slim.dtype:
        return False
    if torch.equal(full, slim):
        return True
    if not (full.is_floating_point() or full.is_complex()):
        return False
    full, slim = full.detach(), slim.detach()
    if full.is_complex():
        full, slim = torch.view_as_real(full.resolve_conj()), torch.view_as_real(slim.resolve_conj())
    ordinary = full.abs() < _HUGE
    if not torch.equal(ordinary, slim.abs() < _HUGE) or not torch.equal(full.isnan(), slim.isnan()):
        return False
    if not torch.equal(full.nan_to_num()[~ordinary].sign(), slim.nan_to_num()[~ordinary].sign()):
        return False
    one, other = full[ordinary], slim[ordinary]
    if not one.numel():
        return True
    rounding = _ROUNDING_DOUBLE if full.dtype is torch.float64 else _ROUNDING
    return float((one - other).abs().max()) <= rounding * float(one.abs().max())
