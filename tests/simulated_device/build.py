"""Builds the pretend accelerator once, in a folder that later test runs find again."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("accelerator.cpp")


def why_not() -> str | None:
    """Why it cannot be built here, or None."""
    return None if shutil.which("g++") else "the simulated accelerator needs g++"


def built(cache: Path) -> Path:
    """Return the path of the built library; of several processes one builds, and the others wait for it."""
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + torch.__version__.encode())
    folder = cache / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "accelerator.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(folder / "unfinished.so")
            os.replace(folder / "unfinished.so", library)
    return library


def _compile(library: Path) -> None:
    home = Path(torch.__file__).parent
    headers = [home / "include", home / "include/torch/csrc/api/include"]
    done = subprocess.run(
        [
            # Without optimisation, which would take four times as long: the kernels are the CPU's.
            *("g++", "-O0", "-std=c++20", "-shared", "-fPIC", "-w"),
            *(f"-I{folder}" for folder in headers),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            *(str(SOURCE), "-o", str(library), f"-L{home / 'lib'}"),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the simulated accelerator does not compile:\n{done.stderr[:4000]}")
