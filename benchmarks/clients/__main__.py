"""Trains models of other libraries through their own API with our callbacks, then predicts, saves and loads.

    python -m benchmarks.clients --save                        # all; makes an environment for each, deletes it after
    python -m benchmarks.clients --clients darts monai --keep --environments environments

Each library gets a virtual environment of its own that sees the packages of the one this runs in, so that torch is not
installed again. Each client and callback runs in a process of its own. Data are made up; models are small. ``loaded``
says what loaded the file that the library itself wrote: the library's own loader as it is (``its own``), or that loader
inside ``slim_loading(recipe)`` (``ours``); or that only a checkpoint of Lightning could be loaded, by ours.
The predictions before and after must be equal.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.clients.run import CLIENTS, NAMES, run_one

RESULTS = Path(__file__).parent.with_suffix(".json")
ROOT = Path(__file__).parents[2]
SECONDS = 600  # for one run


def environment(client: str, folder: Path) -> Path:
    """Return the interpreter of a client's environment, which is made if there is none."""
    home = folder / client
    python = home / "bin" / "python"
    if python.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "packages_of_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # A client may not bring another torch, which would be the one that is imported.
    torch, kept = _release_of("torch"), home / "constraints.txt"
    kept.write_text(f"torch=={torch}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(kept)]
    if CLIENTS[client].torchvision:
        minor = int(torch.split(".")[1]) + 15  # torch 2.0 goes with torchvision 0.15, and so on
        subprocess.run([*pip, "--no-deps", f"torchvision==0.{minor}.*"], check=True)
    subprocess.run([*pip, *CLIENTS[client].packages], check=True)
    return python


def _release_of(package: str) -> str:
    """Return the version of a package that is installed here, without the kind of its build."""
    return importlib.metadata.version(package).partition("+")[0]


def run_client(client: str, names: list[str], environments: Path) -> dict[str, Any]:
    """Run a client with each callback, in processes of its own environment."""
    try:
        python = environment(client, environments)
    except subprocess.CalledProcessError as error:
        return {"not installed": str(error)}
    found = {}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for name in names:
        command = [str(python), "-m", "benchmarks.clients", "--run", client, name]
        with TemporaryDirectory() as scratch:
            try:
                done = subprocess.run(
                    command, cwd=scratch, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
                )
                lines = done.stdout.splitlines()
                found[name] = json.loads(lines[-1]) if lines and done.returncode == 0 else {"error": done.stderr[-600:]}
            except subprocess.TimeoutExpired:
                found[name] = {"error": f"still running after {SECONDS} s"}
        print(f"{client}, {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Run the clients and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=CLIENTS)
    parser.add_argument("--callbacks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--environments", type=Path, help="folder of the environments (default: a temporary one)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}; other clients in it stay")
    parser.add_argument("--run", nargs=2, metavar=("CLIENT", "CALLBACK"), help="run one, in this process")
    options = parser.parse_args()
    if options.run:
        found = run_one(*options.run)
        print(json.dumps(found))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and options.save else {}
    with TemporaryDirectory() as temporary:
        for client in options.clients:
            found = run_client(client, options.callbacks, options.environments or Path(temporary))
            results[client] = {**results.get(client, {}), **found}
            if options.save:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    _print_table(results)


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("client", "callback", "started", "asked", "reached", "predicted", "saved", "loaded by", "error"):
        table.add_column(heading, overflow="fold")
    for client, by_callback in results.items():
        for name, found in by_callback.items():
            cells = [found.get(key, "") for key in ("started", "asked", "reached", "predicted", "saved", "loaded")]
            table.add_row(client, name, *map(str, cells), found.get("error", ""))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
