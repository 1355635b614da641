"""Feeds nonsense to callbacks, command line and checkpoints: each case must work, or be refused and leave no trace.

What is refused must say so in words, before an optimizer has stepped or with the model whole, and no hook may stay.
What fails in torch or Lightning without any pruning, too, is counted as such.
"""

import copy
import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from benchmarks.trust.runs import CLASSES, IMAGE, Net, trainer
from benchmarks.trust.soak import hooks_on
from lightning_prune import PruningError, load_from_checkpoint

__all__ = ["KINDS", "attempts", "fuzz_all"]

REFUSALS = (PruningError, ValueError, TypeError, MisconfigurationException)
CALLBACKS = ("FilterL1Pruning", "TaylorFilterPruning", "FilterPruning", "IterativeMagnitudePruning", "OBSOneShot")

# Arguments


def _schedules() -> st.SearchStrategy[Any]:
    number = st.integers(-1, 3)
    made = [
        st.tuples(st.just("OneShot"), st.fixed_dictionaries({"at": number})),
        st.tuples(st.just("Linear"), st.fixed_dictionaries({"start": number, "end": number})),
        st.tuples(st.just("Cubic"), st.fixed_dictionaries({"start": number, "end": number, "every": number})),
        st.tuples(st.just("FewUnits"), st.fixed_dictionaries({"units": number, "every": number})),
    ]
    return st.one_of(st.none(), st.sampled_from([0.5, "linear", {"start": 1}]), *made)


_FRACTIONS = st.one_of(
    st.floats(0, 1), st.sampled_from([0, 0.5, 0.9, 1, 30, -0.1, float("nan"), float("inf"), True, None, "half", [0.5]])
)
_PATTERNS = st.sampled_from(["first", "second", "hidden", "head", "*", "norm", "frist", "", "first.weight"])
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "amount": st.one_of(_FRACTIONS, st.dictionaries(_PATTERNS, _FRACTIONS, max_size=2)),
    "target": st.sampled_from(["filters", "params", "flops", "speed", None]),
    "scope": st.sampled_from(["layer", "global", "all", 1]),
    "schedule": _schedules(),
    "ignore": st.one_of(st.lists(_PATTERNS, max_size=2), st.sampled_from(["head", None, 3])),
    "round_to": st.sampled_from([1, 2, 8, 0, -1, 2.0, True]),
    "min_width": st.one_of(st.integers(-1, 12), st.dictionaries(_PATTERNS, st.integers(0, 5), max_size=2)),
    "max_amount": st.one_of(_FRACTIONS, st.dictionaries(_PATTERNS, _FRACTIONS, max_size=2)),
    "recalibrate": st.sampled_from([0, 1, -1, 1.5, None]),
    "form": st.sampled_from(["weights", "activations", "both"]),
    "criterion": st.sampled_from(["l1", "apoz", "bn_scale", "obd", "best", "torch.abs", None, 3]),
    "parameters": st.one_of(st.none(), st.lists(_PATTERNS, max_size=2), st.just("head")),
    "pattern": st.sampled_from([None, "2:4", "1:2", "4:2", "x", 24]),
    "rewind_to": st.sampled_from([None, 0, 1, 50, -1, 0.5]),
    "control": st.sampled_from([None, "shuffle", "reinitialize", "else"]),
    "mask_gradients": st.sampled_from(["auto", True, False, "no"]),
    "epoch": st.sampled_from([None, 0, 1, 9, -1, 1.5]),
    "solver": st.sampled_from(["exact", "admm", "blocked", "best"]),
    "sequential": st.booleans(),
    "batches": st.sampled_from([1, 2, 0, -3, 1.5, None]),
    "damping": st.sampled_from([0.01, 0.0, -1, float("nan"), None]),
    "flops_penalty": st.sampled_from([0.0, 0.001, -1, float("nan")]),
}
_OWN = {
    "FilterL1Pruning": "amount target scope schedule ignore round_to min_width max_amount recalibrate",
    "TaylorFilterPruning": "amount target scope schedule ignore form flops_penalty min_width recalibrate",
    "FilterPruning": "amount criterion target scope schedule ignore batches max_amount",
    "IterativeMagnitudePruning": "amount scope schedule parameters ignore pattern rewind_to control mask_gradients",
    "OBSOneShot": "amount epoch scope pattern solver sequential batches damping parameters ignore",
}


@st.composite
def _arguments(draw: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Draw a callback and up to three of its arguments, good and bad."""
    name = draw(st.sampled_from(CALLBACKS))
    chosen = draw(st.lists(st.sampled_from(_OWN[name].split()), max_size=3, unique=True))
    return name, {argument: draw(_VALUES[argument]) for argument in chosen}


def _with_arguments(case: tuple[str, dict[str, Any]]) -> str:
    name, given_ = case
    try:
        made = {k: _scheduled(v) if k == "schedule" else v for k, v in given_.items()}
        callback = getattr(lightning_prune, name)(**made)
    except (ValueError, TypeError) as error:
        _promise(bool(str(error)), "an error without words")
        return "refused when made"
    return _fit_or_refuse(Net, [callback], _images())


def _scheduled(value: Any) -> Any:
    return getattr(lightning_prune, value[0])(**value[1]) if isinstance(value, tuple) else value


# Models


class Bare(Net):
    """Without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "norm", "second", "hidden", "drop", "head"):
            delattr(self, name)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :CLASSES].clone().requires_grad_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


class Single(Net):
    """One layer alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "norm", "second", "hidden", "drop"):
            delattr(self, name)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1)[:, :10])


class Shared(Net):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth.weight = self.third.weight

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(images)))))
        x = self.fourth(F.relu(self.third(x))).mean(dim=(2, 3))
        return self.head(self.drop(F.relu(self.hidden(x))))


class Idle(Net):
    """With a layer that nothing runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.empty = nn.Linear(3, 3), nn.Parameter(torch.zeros(0, 4))


class Diverging(Net):
    """With a loss that is no number from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 2 else 1.0)


class Named(Net):
    """Whose forward returns a dict, of which the loss is told apart."""

    def forward(self, images: Tensor) -> Any:
        return {"scores": super().forward(images), "about": "images"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])


def _frozen(module: Net, some: bool = False) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(some and name.startswith("head"))


def _filled(value: float, name: str, module: Net) -> None:
    for own, parameter in module.named_parameters():
        if own.startswith(name):
            with torch.no_grad():
                parameter.view(-1)[:2] = value


_MODELS: dict[str, type[Net]] = {
    kind.__name__.lower(): kind for kind in (Net, Bare, Single, Shared, Idle, Diverging, Named)
}
_CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda module: None,
    "frozen": _frozen,
    "frozen but the head": lambda module: _frozen(module, some=True),
    "NaN": lambda module: _filled(float("nan"), "head", module),
    "infinity": lambda module: _filled(float("inf"), "first", module),
    "zeros": lambda module: _filled(0.0, "", module),
    "on meta": lambda module: module.to("meta"),
    "double": lambda module: module.double(),
    "in eval mode": lambda module: module.eval(),
    "compiled": lambda module: module.compile(backend="eager"),
}


def _images(count: int = 16, batch: int = 4, kind: torch.dtype = torch.float32) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, *IMAGE, generator=generator).to(kind)
    return DataLoader(TensorDataset(images, torch.randint(CLASSES, (count,), generator=generator)), batch)


_DATA: dict[str, Callable[[], Any]] = {
    "images": _images,
    "one": lambda: _images(1, 1),
    "none": lambda: _images(0, 4),
    "integers": lambda: _images(kind=torch.int64),
    "double": lambda: _images(kind=torch.float64),
    "empty batches": lambda: DataLoader([(torch.zeros(0, *IMAGE), torch.zeros(0, dtype=torch.int64))] * 3, None),
    "NaN": lambda: DataLoader([(torch.full((2, *IMAGE), float("nan")), torch.zeros(2, dtype=torch.int64))] * 3, None),
    "tensors alone": lambda: DataLoader(torch.randn(8, *IMAGE), 4),
    "dicts": lambda: DataLoader([{"x": torch.randn(*IMAGE)}] * 4, 2),
}
_MODEL_CASES = st.tuples(
    st.sampled_from(CALLBACKS), st.sampled_from(list(_MODELS)), st.sampled_from(list(_CHANGES)),
    st.one_of(st.just("images"), st.sampled_from(list(_DATA))), st.sampled_from([0, 1, 2]),
)  # fmt: skip


def _with_models(case: tuple[str, str, str, str, int]) -> str:
    name, model, change, data, start = case
    schedule: dict[str, Any] = {"epoch": start} if name == "OBSOneShot" else {
        "schedule": lightning_prune.OneShot(max(start, int(name == "TaylorFilterPruning")))
    }  # fmt: skip
    callback = getattr(lightning_prune, name)(0.5, **schedule)
    return _fit_or_refuse(_MODELS[model], [callback], _DATA[data](), _CHANGES[change])


# The command line

_WORDS = st.sampled_from(
    ["0.5", "1.5", "-1", "nan", "null", "half", "{first: 0.5}", "[1, 2]", "true", "''", "{class_path: Linear}", "layer",
     "{class_path: OneShot, init_args: {at: 1}}", "{class_path: Linear, init_args: {start: 3, end: 1}}", "global"]
)  # fmt: skip
_YAML = st.tuples(
    st.sampled_from([*CALLBACKS, "MetricGuard", "FilterL2Pruning"]),
    st.dictionaries(st.sampled_from(["amount", "scope", "schedule", "ignore", "amont", "monitor", "drop"]), _WORDS),
)


def _with_yaml(case: tuple[str, dict[str, str]]) -> str:
    name, told = case
    given_ = "".join(f"        {key}: {value}\n" for key, value in told.items()) or "        {}\n"
    text = f"trainer:\n  logger: false\n  callbacks:\n    - class_path: {name}\n      init_args:\n{given_}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        said = io.StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(said):
                cli = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={path}"])
        except SystemExit:
            assert said.getvalue().strip(), "an exit without words"
            return "refused by the command line"
        except (ValueError, TypeError) as error:
            _promise(bool(str(error)), "an error without words")
            return "refused when made"
    assert any(type(callback).__name__ == name for callback in cli.trainer.callbacks)
    return "works"


# Checkpoints

_BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda saved: None,
    "no weights": lambda saved: saved.pop("state_dict"),
    "no loops": lambda saved: saved.pop("loops"),
    "no callbacks": lambda saved: saved.pop("callbacks"),
    "no optimizers": lambda saved: saved.pop("optimizer_states"),
    "no version": lambda saved: saved.pop("pytorch-lightning_version"),
    "a weight less": lambda saved: saved["state_dict"].pop("hidden.weight"),
    "a weight more": lambda saved: saved["state_dict"].update({"more": torch.ones(2)}),
    "another rank": lambda saved: saved["state_dict"].update({"hidden.weight": torch.ones(3)}),
    "another width": lambda saved: saved["state_dict"].update({"hidden.weight": torch.ones(4, 9)}),
    "no recipe": lambda saved: saved["state_dict"]._metadata[""].pop("lightning_prune", None),
    "no metadata": lambda saved: saved.update(state_dict=dict(saved["state_dict"])),
    "state of ours broken": lambda saved: [state.clear() for key, state in saved["callbacks"].items() if "Pru" in key],
    "momentum of another": lambda saved: saved["optimizer_states"][0]["state"][0].update(
        momentum_buffer=torch.ones(2, 2)
    ),
}
_FILES = st.tuples(
    st.sampled_from(["FilterL1Pruning", "IterativeMagnitudePruning"]),
    st.sampled_from(list(_BREAKS)),
    st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.0]),  # share of the file that is there
)


def _with_files(case: tuple[str, str, float]) -> str:
    name, broken, share = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broken.ckpt"
        _fit(Net(), [_pruning(name)], _images()).save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        _BREAKS[broken](saved)
        torch.save(saved, path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        try:
            load_from_checkpoint(Net, path)
        except (PruningError, RuntimeError, KeyError) as error:
            _promise(share == 1 or isinstance(error, PruningError), f"{type(error).__name__} for half a file")
        assert "load_state_dict" not in vars(Net)
        # one width that contradicts the others is loaded as it is written, and then nothing runs
        runs = broken != "another width"
        return _fit_or_refuse(Net, [_pruning(name)], _images(), ckpt_path=path, runs=runs)


def _pruning(name: str) -> Callback:
    return getattr(lightning_prune, name)(0.5, schedule=lightning_prune.Linear(0, 2))


# What must hold


def _fit_or_refuse(
    kind: type[Net],
    callbacks: list[Callback],
    data: Any,
    change: Callable[[Any], Any] = lambda module: None,
    ckpt_path: Path | None = None,
    runs: bool = True,
) -> str:
    """Train; return what came of it, or raise AssertionError if it broke its promise."""
    torch.manual_seed(0)
    module = kind()
    change(module)
    before = _picture(module)
    try:
        _fit(module, callbacks, data, ckpt_path)
    except Exception as error:
        if ckpt_path is None and not isinstance(error, PruningError) and _fails_without(kind, data, change):
            return "fails without pruning, too"
        told = isinstance(error, REFUSALS) and bool(str(error))
        _promise(told or ckpt_path is not None, f"{type(error).__name__}: {error}")  # torch and Lightning read files
        steps = module._trainer.global_step if module._trainer is not None else 0
        if not steps and ckpt_path is None:
            _promise(not hooks_on(module), f"hooks stay: {hooks_on(module)}")
            _promise(_same(before, _picture(module)), f"refused, and changed all the same: {error}")
        if runs:
            _assert_whole(module)
        return f"refused {'later' if steps else 'before the first step'}"
    if runs:
        _assert_whole(module)
    return "works"


def _fit(module: pl.LightningModule, callbacks: list[Callback], data: Any, ckpt_path: Path | None = None) -> pl.Trainer:
    made = trainer(*callbacks, max_epochs=3)
    torch.manual_seed(1)
    with redirect_stdout(io.StringIO()):
        made.fit(module, data, ckpt_path=ckpt_path)
    return made


def _fails_without(kind: type[Net], data: Any, change: Callable[[Any], Any]) -> bool:
    module = kind()
    change(module)
    try:
        _fit(module, [], data)
    except Exception:
        return True
    return False


def _picture(module: nn.Module) -> dict[str, Any]:
    values = {name: value if value.is_meta else value.detach().clone() for name, value in module.state_dict().items()}
    return {"shown": repr(module), "values": values, "modes": [part.training for part in module.modules()]}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    values = [(value, other["values"].get(name)) for name, value in one["values"].items()]
    equal = all(
        b is not None and a.shape == b.shape and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in values
    )
    return equal and (one["shown"], one["modes"]) == (other["shown"], other["modes"])


def _promise(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def _assert_whole(module: Net) -> None:
    """Assert that a module runs, whatever it has lost."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    kinds = {parameter.dtype for parameter in module.parameters()} or {torch.float32}
    with torch.no_grad():
        copy.copy(module).eval()(torch.zeros(2, *IMAGE, dtype=kinds.pop()))


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str]]] = {
    "arguments": (_arguments(), _with_arguments),
    "models": (_MODEL_CASES, _with_models),
    "yaml": (_YAML, _with_yaml),
    "files": (_FILES, _with_files),
}
"""What is fed -> cases, and what feeds one and tells how it ended."""


def attempts(kind: str, examples: int, seed: int = 0) -> Counter[str]:
    """Feed so many cases of a kind, and count how they ended.

    Raises:
        AssertionError: With the simplest case that broke its promise.
    """
    ended: Counter[str] = Counter()
    cases, feed = KINDS[kind]

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended[feed(case)] += 1

    run()
    return ended


def fuzz_all(examples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Feed cases of every kind; where one broke its promise the simplest such case is told."""
    found = {}
    for kind in KINDS:
        failure = ""
        ended: Counter[str] = Counter()
        try:
            ended = attempts(kind, examples, seed)
        except BaseException as error:
            failure = "".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])[:2000]
        found[kind] = {"ended": dict(ended), "failure": failure}
    return found
