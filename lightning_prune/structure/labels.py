"""Labels that ride on tensors, and the ledger of what they met; knows no operator and no model.

An *atom* is one index along one dimension of one parameter or buffer. A label says, for every index along one dimension
of a tensor, which atom that slice of the tensor stands for. Atoms that meet must leave together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "INERT", "PINNED", "Attribute", "Choice", "Cost", "Equation", "Label", "Labels", "Ledger", "Literally", "Pass",
    "Ran", "Role", "SlotRange",
]  # fmt: skip

# What a trace makes thousands of is not frozen, which would take three times as long; nothing is ever written on it.

Atoms = NDArray[np.int64]
Role = Literal["producer", "consumer", "contracted", "reduced"]
Kind = tuple[type, str, int]
Literally = tuple[Kind, int]
"""Kind of an operator (see :class:`Ran`) and dimension of its output: a size that does not follow its labels."""

PINNED = 0
"""The atom that may never leave: what meets it stays."""
INERT = 1
"""The atom that stands for nothing: what meets it is not affected."""


@dataclass(eq=False, slots=True)
class Label:
    """Which atom each index along one dimension stands for, ``(size,)``.

    A conditional label holds atoms of a :class:`Choice`, which count only where their alternative is taken.
    """

    atoms: Atoms
    conditional: bool = False


@dataclass(eq=False, slots=True)
class Labels:
    """The labels of one tensor: dimension -> labels along it; a dimension without labels has a fixed size.

    ``weight`` says that the tensor was made from parameters and constants alone, ``blank`` that it holds one value
    everywhere and waits to be filled, ``hollow`` that its entries were not computed, ``constant`` that it was made from
    constants alone. ``positions`` are labels of the dimension in which the entries are positions.
    """

    dims: dict[int, tuple[Label, ...]] = field(default_factory=dict)
    weight: bool = True
    blank: bool = False
    hollow: bool = False
    constant: bool = False
    positions: tuple[Label, ...] = ()

    def at(self, dim: int) -> tuple[Label, ...]:
        """Return the labels along a dimension, none for a dimension of fixed size."""
        return self.dims.get(dim, ())


@dataclass(eq=False, slots=True)
class Ran:
    """One operator that ran during a trace: what the verification of a cut needs to know of it.

    Attributes:
        func: The operator.
        path: Path of the module that was running.
        kind: Class of the innermost module around it that is none of torch.nn, the way from there to the module that
            was running, and how many operators had run in that before: where blocks of a network repeat, so does this.
        taken: Labels of the tensors among its arguments, in order.
        entering: Shapes of these.
        plain: Its other arguments, with None where a tensor stood.
        made: Labels of its outputs, filled in when its rule has been applied.
        leaving: Shapes of these.
        decisions: Outputs that the code may go on by, if it goes on by any.
        foreign: Those of the tensors among its arguments, by place, that are neither the model's nor made by operators.
    """

    func: Any
    path: str
    kind: Kind
    taken: Sequence[Labels]
    entering: Sequence[Sequence[int]]
    plain: tuple[Any, ...]
    made: list[Labels] = field(default_factory=list)
    leaving: list[Sequence[int]] = field(default_factory=list)
    decisions: dict[int, Tensor] = field(default_factory=dict)
    foreign: dict[int, Tensor] | None = None


class Pass(NamedTuple):
    """One run of the model in a trace: in train mode or not, on which inputs, with gradients recorded or not.

    The model is called twice where its second call may read what the first one left on its modules.
    """

    training: bool
    inputs: Any
    gradients: bool = False
    calls: int = 1


@dataclass(eq=False, slots=True)
class SlotRange:
    """The atoms ``start .. start + size`` that stand for one dimension of a parameter or buffer."""

    tensor: str
    dim: int
    start: int
    size: int


@dataclass(eq=False)
class Choice:
    """A place where the channels of one dimension can leave in several ways, of which the model can follow only one.

    ``alternatives`` maps each way to blocks of conditional atoms ``(size,)``, each beside the atoms that it stands for,
    ``(n, size)``: what stands in one column leaves together.
    """

    alternatives: dict[Hashable, list[tuple[Atoms, Atoms]]]
    where: str


@dataclass(eq=False, slots=True)
class Attribute:
    """A number held by a module that follows how many indices keep all their labels.

    ``index`` is the entry that follows where the attribute is a tuple of sizes. Where ``number`` is given, it is what
    code makes of the attribute, and the one that has to be so many.
    """

    module: str
    name: str
    labels: tuple[Label, ...]
    index: int | None = None
    where: str = ""
    number: Any = None


@dataclass(eq=False, slots=True)
class Equation:
    """A size that code worked out from other numbers: as many indices must keep all their labels as it then gives.

    A plain ``number`` remembers nothing that could change, so that it cannot change either.
    """

    labels: tuple[Label, ...]
    number: Any
    where: str


@dataclass(eq=False, slots=True)
class Cost:
    """Multiply-adds of an operator: ``factor`` times, for each of ``sizes``, how many indices keep all their labels.

    ``at`` is the operator's place in ``ran``.
    """

    operator: str
    at: int
    factor: int
    sizes: tuple[tuple[Label, ...], ...]


class Ledger:
    """What a trace writes down: which atoms there are, which of them met, and which may not leave."""

    def __init__(self, first_atom: int = 2) -> None:
        """Start an empty ledger whose first atom has the given number."""
        self.size = first_atom
        self.slots: list[SlotRange] = []
        self.blocks: dict[int, Atoms] = {}  # by ``id``, what :meth:`own` labelled
        self.pairs: list[tuple[Atoms, Atoms]] = []
        self.together: list[tuple[Atoms, Atoms]] = []
        self.pins: list[tuple[Atoms, str]] = []
        self.choices: dict[Hashable, Choice] = {}
        self.attributes: list[Attribute] = []
        self.equations: list[Equation] = []
        self.counts: list[
            tuple[int, str, tuple[Label, ...]]
        ] = []  # of those arguments that no shape of an output shows
        self.numbers = True  # whether numbers remember where they come from
        self.reals = 0  # how often code made a real number of one that remembers, such as the root of a width
        self.lengths: dict[Hashable, Label] = {}
        self.decided: list[str] = []  # paths of modules whose code read entries of tensors that data went into
        self.given: dict[tuple[str, int], list[Any]] = {}  # what another trace decided, to decide alike
        self.unseen: set[str] = set()  # parameters and buffers that no operator took
        self.idle: list[str] = []  # parameters of those that go with nothing that an operator took
        self.guessed: list[str] = []  # tensors that no operator took, and that go with those of a sibling
        self.whole: list[Atoms] = []
        self.costs: list[Cost] = []  # of one call in eval mode
        self.needed: set[int] = set()  # places in ``ran`` of the operators that the outputs in eval mode depend on
        self.roles: dict[Role, list[Atoms]] = {"producer": [], "consumer": [], "contracted": [], "reduced": []}
        self.statistics: list[Atoms] = []
        self.hollow = True  # whether the traced model runs where nothing is computed
        self.ran: list[Ran] = []
        self.passes: list[Pass] = []
        self.in_steps = False  # whether layers ran by other operators than they do by themselves
        self.untrained = ""  # why train mode could not be traced, if it could not
        self.literals: frozenset[Literally] = frozenset()  # sizes that are known to be numbers in the code
        self._chosen: dict[str, int] = {}
        self.running: tuple[str, Any] = ("", None)  # path of the module and the operator at hand, for reasons

    def state(self) -> dict[str, Any]:
        """Return everything that is written down so far, for :meth:`restore_`."""
        saved = {name: copy(value) for name, value in vars(self).items()}
        saved["roles"] = {role: list(atoms) for role, atoms in self.roles.items()}
        saved["given"] = {place: list(decisions) for place, decisions in self.given.items()}
        return saved

    def restore_(self, state: Mapping[str, Any]) -> None:
        """Forget what was written down since."""
        vars(self).update(state)

    @property
    def where(self) -> str:
        """Say what is being traced."""
        path, operator = self.running
        return f"{path or 'the model'}, {operator.overloadpacket}" if operator is not None else ""

    def register(self, name: str, tensor: Tensor) -> Labels:
        """Hand out one atom per index of every dimension of a parameter or buffer."""
        dims: dict[int, tuple[Label, ...]] = {}
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                self.slots.append(SlotRange(name, dim, self.size, size))
                dims[dim] = (self.own(self._hand_out(size)),)
        return Labels(dims)

    def own(self, atoms: Atoms) -> Label:
        """Label an index of a parameter or buffer each; none of the atoms is another's of these."""
        self.blocks[id(atoms)] = atoms
        return Label(atoms)

    def meet(self, a: Atoms, b: Atoms) -> None:
        """Write down that atoms of ``a`` and ``b`` (broadcast together) must leave together."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        self.pairs.append((a, b) if a.ndim == 1 else (a.ravel(), b.ravel()))

    def pin(self, labels: Iterable[Label], reason: str) -> None:
        """Write down that nothing of these labels may leave, and why."""
        for label in labels:
            self.pins.append((label.atoms, f"{reason} ({self.where})" if self.where else reason))

    def tie(self, sides: Sequence[tuple[Label, ...]], reason: str) -> tuple[Label, ...]:
        """Tie the labels of several tensors along one shared dimension, and return what the result carries.

        A side without labels has a fixed size, which pins the others.
        """
        if not all(sides):
            for side in sides:
                self.pin(side, reason)
            return ()
        pairs = _alike(sides)
        if pairs is not None:
            for mine, other in pairs:
                self.together.append((mine.atoms, other.atoms))
                self.meet(mine.atoms, other.atoms)
            certain = [side for side in sides if not any(label.conditional for label in side)]
            if certain:
                return certain[0]
        else:  # one side hangs on whichever of the other's is taken
            for mine in sides[0]:
                for side in sides[1:]:
                    for other in side:
                        self.meet(mine.atoms, other.atoms)
            for side in sides:
                for label in side:
                    if not label.conditional:
                        return (label,)
        return tuple({id(label.atoms): label for side in sides for label in side}.values())

    def split(self, key: Hashable, atoms: Atoms, dims: Sequence[int], names: Sequence[Hashable]) -> list[Label]:
        """Write down a choice: ``atoms`` vary along several ``dims``, and only one of those can shrink.

        Args:
            key: What names the choice within its operator.
            atoms: Atoms of some shape.
            dims: The dimensions of ``atoms`` along which they vary.
            names: One name per alternative.

        Returns:
            One conditional label per entry of ``dims``.
        """
        columns = [np.moveaxis(atoms, dim, -1).reshape(-1, atoms.shape[dim]) for dim in dims]
        return self.choose(key, {name: [column] for name, column in zip(names, columns, strict=True)})

    def choose(self, key: Hashable, alternatives: Mapping[Any, list[Atoms]]) -> list[Label]:
        """Write down a choice.

        Args:
            key: What names the choice within its operator.
            alternatives: For each way, blocks of atoms ``(n, size)`` of which each column leaves together.

        Returns:
            One conditional label ``(size,)`` per block, in order.
        """
        path = self.running[0]  # two traces of one model name their choices alike, whatever else runs between them
        self._chosen[path] = self._chosen.get(path, 0) + 1
        choice = self.choices[path, self._chosen[path], key] = Choice({}, self.where)
        labels = []
        for name, blocks in alternatives.items():
            choice.alternatives[name] = []
            for block in blocks:
                columns, places = _distinct(block)
                atoms = self._hand_out(columns.shape[1])
                choice.alternatives[name].append((atoms, columns))
                labels.append(Label(atoms[places], conditional=True))
        return labels

    def use(self, role: Role, labels: Iterable[Label]) -> None:
        """Write down what became of labels.

        A weight made them (``producer``) or was summed over with them (``consumer``), data was summed over with data
        (``contracted``), or a statistic was taken of them (``reduced``).
        """
        self.roles[role].extend(label.atoms for label in labels)

    def mix(self, labels: Iterable[Label]) -> None:
        """Write down that a statistic ran over these labels, so that numbers change when some of them leave."""
        self.statistics.extend(label.atoms for label in labels)

    def fresh(self, size: int) -> Label:
        """Return a label of indices that nothing is known of yet."""
        return Label(self._hand_out(size))

    def held(self, place: Any, size: int) -> Label:
        """Return the label of a number that a module holds, as if it were the length of a tensor of its own."""
        key = (place.module, place.name, place.index)
        if key not in self.lengths:
            self.lengths[key] = Label(self._hand_out(size))
            self.attributes.append(Attribute(place.module, place.name, (self.lengths[key],), place.index, self.where))
        return self.lengths[key]

    def note_real(self) -> None:
        """Write down that code made a real number of one that remembers where it comes from."""
        self.reals += 1

    def is_literal(self, dim: int) -> bool:
        """Return whether the size of a dimension of the output at hand is known to be a number in the code."""
        return bool(self.literals) and (self.ran[-1].kind, dim) in self.literals

    def count(self, argument: str, labels: tuple[Label, ...]) -> None:
        """Write down that an argument of the operator at hand must be the number of indices that keep all these labels.

        What is written down is the operator's place in ``ran``, the argument's name in its schema, and the labels. The
        output's shape does not show such an argument; one that is not written down must stay what it is.
        """
        self.counts.append((len(self.ran) - 1, argument, labels))

    def prefer(self, labels: Iterable[Label]) -> None:
        """Write down that these labels run along a batch of products: of several ways, whole ones of these leave."""
        self.whole.extend(label.atoms for label in labels if label.conditional)

    def _hand_out(self, count: int) -> Atoms:
        start, self.size = self.size, self.size + count
        return np.arange(start, self.size, dtype=np.int64)


def _alike(sides: Sequence[tuple[Label, ...]]) -> list[tuple[Label, Label]] | None:
    """Pair the labels of dimensions that were merged in the same way, such as (channel, position) with itself.

    Indices that share an atom of one label must share an atom of its partner, and no others may. As many indices stay
    on every side only if what stays of each label stays of its partner, so no label meets another one's partner.

    Returns:
        The labels of the first side, each beside its partner on another side. None unless every label has one.
    """
    first, *others = sides
    if any(len(side) != len(first) for side in others):
        return None
    if len(first) == 1:
        return [(first[0], side[0]) for side in others]
    pairs = []
    for side in others:
        free = [(label, _first_places(label)) for label in side]
        for mine in first:
            places = _first_places(mine)
            at = next((at for at, (_, theirs) in enumerate(free) if np.array_equal(places, theirs)), None)
            if at is None:
                return None
            pairs.append((mine, free.pop(at)[0]))
    return pairs


def _first_places(label: Label) -> NDArray[np.int64]:
    """Return for every index the first one that has the same atom, ``(size,)``."""
    _, first, which = np.unique(label.atoms, return_index=True, return_inverse=True)
    return first[which]


def _distinct(columns: Atoms) -> tuple[Atoms, Atoms]:
    """Return each different column once, ``(n, different)``, and which of these every column is, ``(size,)``."""
    if columns.shape[0] and (columns[0, 1:] > columns[0, :-1]).all():  # most are, and sorting columns costs
        return columns, np.arange(columns.shape[1])
    _, first, places = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)  # in the order in which they appear
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return columns[:, first[order]], rank[places.ravel()]
