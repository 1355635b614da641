"""Runs Lightning's own trainer tests with a pruning callback in every Trainer, and compares them with a plain run.

    git clone https://github.com/Lightning-AI/pytorch-lightning /tmp/lightning
    python -m benchmarks.lightning_tests /tmp/lightning --save

Needs pytest, pytest-timeout, pytest-rerunfailures, cloudpickle and psutil, and a checkout of the tests of the installed
Lightning. The tests run as they are. A plugin adds the callback to the callbacks of every Trainer, and gives the
networks of Lightning's demos a hidden layer, also in the plain run, since their outputs alone cannot be pruned.

A test that passes in the plain run and fails with the callback is one of three kinds: the callback refused the run, in
words of its own; the test compares lists that name every callback, or every hook call, or mocks what a callback needs;
or the callback broke something. The first two are told apart by the message and by ``MENTIONED``; the rest is printed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

RESULTS = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
FOLDERS = ("trainer", "callbacks", "checkpointing", "loops")
VARIABLE = "PRUNING_CALLBACK"  # names the callback to the plugin
CALLBACKS = ("IterativeMagnitudePruning", "FilterL1Pruning", "TaylorFilterPruning", "OBSOneShot")
PLAIN = "plain"
SECONDS = 60  # for one test


def callback_named(name: str) -> Any:
    """Return a new callback that prunes half, as soon as it can."""
    import lightning_prune

    made = getattr(lightning_prune, name)
    if name == "TaylorFilterPruning":  # it scores by one training step
        return made(0.5, schedule=lightning_prune.OneShot(1, by="steps"))
    if name == "OBSOneShot":
        return made(0.5, batches=1)
    return made(0.5)


def pytest_configure(config: pytest.Config) -> None:
    """Add the callback to every Trainer, and a hidden layer to the networks of Lightning's demos."""
    from lightning.pytorch.demos import boring_classes
    from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

    name = os.environ[VARIABLE]
    added = _CallbackConnector.on_trainer_init

    def with_callback(connector: Any, callbacks: Any, *args: Any, **kwargs: Any) -> None:
        given = [] if callbacks is None else callbacks if isinstance(callbacks, list) else [callbacks]
        added(connector, [*given, callback_named(name)], *args, **kwargs)

    if name != PLAIN:
        _CallbackConnector.on_trainer_init = with_callback  # type: ignore[method-assign]
    made = boring_classes.BoringModel.__init__

    def with_hidden_layer(model: Any, *args: Any, **kwargs: Any) -> None:
        made(model, *args, **kwargs)
        model.layer = _deep_linear()(32, 2)

    boring_classes.BoringModel.__init__ = with_hidden_layer  # type: ignore[method-assign]


def _deep_linear() -> Any:
    """Return the class of a linear layer with a hidden layer before it."""
    import torch

    class Deep(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.hidden = torch.nn.Linear(inputs, inputs)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return super().forward(self.hidden(values).relu())

    return Deep


def run_tests(checkout: Path, name: str, folders: list[str]) -> dict[str, str]:
    """Return, for every test, ``passed``, ``skipped`` or the message with which it failed."""
    tests = checkout / "tests"
    found = {}
    for folder in folders:
        with TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.xml"
            environment = {**os.environ, VARIABLE: name, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tests)])
            command = [
                sys.executable, "-m", "pytest", str(tests / "tests_pytorch" / folder), "-q",
                "-p", "benchmarks.lightning_tests", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
                f"--rootdir={tests}", f"--timeout={SECONDS}", f"--junitxml={report}", f"--basetemp={scratch}/tmp",
            ]  # fmt: skip
            subprocess.run(command, cwd=scratch, env=environment, check=False, stdout=subprocess.DEVNULL)
            found.update(outcomes(report))
    return found


def outcomes(report: Path) -> dict[str, str]:
    """Read the outcome of every test from a report in JUnit's format."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests_pytorch.')}::{case.get('name')}"
        kinds = {child.tag: child for child in case}
        failed = kinds.get("failure", kinds.get("error"))
        if failed is not None:
            found[name] = f"{failed.get('message', '')}\n{failed.text or ''}"
        else:
            found[name] = "skipped" if "skipped" in kinds else "passed"
    return found


def compare(plain: dict[str, str], pruned: dict[str, str]) -> dict[str, Any]:
    """Return counts, and what failed with the callback and not without, by kind."""
    both = [name for name, outcome in plain.items() if outcome == "passed" and name in pruned]
    failed = {name: pruned[name] for name in both if pruned[name] not in ("passed", "skipped")}
    refused = {name: message for name, message in failed.items() if "PruningError" in message}
    other = {name: message for name, message in failed.items() if name not in refused}
    return {
        "tests": len(plain),
        "passed in the plain run": len(both),
        "passed": sum(pruned[name] == "passed" for name in both),
        "refused": dict(Counter(_refusal(message) for message in refused.values())),
        "failed": {name: _last_line(message) for name, message in other.items()},
        "passed with the callback alone": [n for n, o in pruned.items() if o == "passed" and plain.get(n) != "passed"],
    }


def _refusal(message: str) -> str:
    """Return the message of a refusal without numbers and names of one test."""
    said = re.search(r"PruningError: (.{0,160})", message)
    return re.sub(r"\d+", "N", said.group(1)) if said else "PruningError"


def _last_line(message: str) -> str:
    return message.partition("\n")[0][:300]


def main() -> None:
    """Run the tests and print how many fail with each callback alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Lightning, with its folder tests/")
    parser.add_argument("--callbacks", nargs="+", default=list(CALLBACKS), choices=CALLBACKS)
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), help="folders of tests/tests_pytorch")
    parser.add_argument("--raw", type=Path, help="folder to keep every outcome in, and to take the plain run from")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    found = {}
    plain: dict[str, str] = {}
    for name in (PLAIN, *options.callbacks):
        kept = None if options.raw is None else options.raw / f"{name}.json"
        if kept is not None and name == PLAIN and kept.exists():
            plain = json.loads(kept.read_text())
            continue
        outcome = run_tests(options.checkout, name, options.folders)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(outcome, indent=1))
        if name == PLAIN:
            plain = outcome
            continue
        found[name] = compare(plain, outcome)
        _show(name, found[name])
    if options.save:
        RESULTS.write_text(json.dumps({"folders": options.folders, "callbacks": found}, indent=1) + "\n")


def _show(name: str, found: dict[str, Any]) -> None:
    refused = sum(found["refused"].values())
    print(
        f"{name}: of {found['passed in the plain run']} tests that pass, {found['passed']} pass, {refused} are refused "
        f"and {len(found['failed'])} fail."
    )
    for kind in ("refused", "failed"):
        for key, value in found[kind].items():
            print(f"  {kind}: {key}: {value}")


if __name__ == "__main__":
    main()
