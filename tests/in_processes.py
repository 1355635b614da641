"""Runs scripts that start two processes, and reads what each of these wrote."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["ended", "seen_by_both"]


def ended(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script on CPUs, one thread a process, and return how it ended."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def seen_by_both(script: str, folder: Path, argument: str) -> list[Any]:
    """Run a script that takes a folder and an argument, and return what each process wrote there as ``rank0.json``."""
    run = ended(script, folder, str(folder), argument)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
