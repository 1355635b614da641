"""Arguments of callbacks, good and bad, from Python and from YAML."""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI

import lightning_prune
from benchmarks.trust.nonsense.promises import fit_or_refuse, images, promise
from benchmarks.trust.runs import Net

__all__ = ["ARGUMENTS", "CALLBACKS", "YAML", "with_arguments", "with_yaml"]

CALLBACKS = ("FilterL1Pruning", "TaylorFilterPruning", "FilterPruning", "IterativeMagnitudePruning", "OBSOneShot")


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


def with_arguments(case: tuple[str, dict[str, Any]]) -> str:
    """Make a callback, and train with it."""
    name, given_ = case
    try:
        made = {k: _scheduled(v) if k == "schedule" else v for k, v in given_.items()}
        callback = getattr(lightning_prune, name)(**made)
    except (ValueError, TypeError) as error:
        promise(bool(str(error)), "an error without words")
        return "refused when made"
    return fit_or_refuse(Net, [callback], images())


def _scheduled(value: Any) -> Any:
    return getattr(lightning_prune, value[0])(**value[1]) if isinstance(value, tuple) else value


ARGUMENTS = _arguments()

_WORDS = st.sampled_from(
    ["0.5", "1.5", "-1", "nan", "null", "half", "{first: 0.5}", "[1, 2]", "true", "''", "{class_path: Linear}", "layer",
     "{class_path: OneShot, init_args: {at: 1}}", "{class_path: Linear, init_args: {start: 3, end: 1}}", "global"]
)  # fmt: skip
YAML = st.tuples(
    st.sampled_from([*CALLBACKS, "MetricGuard", "FilterL2Pruning"]),
    st.dictionaries(st.sampled_from(["amount", "scope", "schedule", "ignore", "amont", "monitor", "drop"]), _WORDS),
)


def with_yaml(case: tuple[str, dict[str, str]]) -> str:
    """Let the command line make a callback."""
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
            promise(bool(str(error)), "an error without words")
            return "refused when made"
    assert any(type(callback).__name__ == name for callback in cli.trainer.callbacks)
    return "works"
