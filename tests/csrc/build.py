"""Compiles csrc/ with g++ for the CPU, through cuda_host_shim.h."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fvisibility=hidden"]


def headers() -> Path | None:
    """The folder of CUDA's headers: CUDA_HOME's, those of the toolkit that nvcc belongs to, or those of a usual place."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr") if home]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, Path(nvcc).resolve().parents[1])
    return next((home / "include" for home in homes if (home / "include" / "cuda_fp8.h").is_file()), None)


def obstacle() -> str | None:
    """Why csrc/ can't be compiled for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "csrc/ is tested by compiling it with g++, which is not here"
    return None if headers() else "csrc/ is tested with CUDA's headers, which are not here (CUDA_HOME, PATH, /usr/local/cuda)"


def compile_host(output: Path, *options: str, driver: Path | None = None) -> Path:
    """All of csrc/ into `output`, with a `driver` into a program."""
    sources = sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cpp"))
    sources += [driver] if driver else []
    folders = [f"-I{folder}" for folder in (CSRC / "include", HERE, headers())]
    command = ["g++", *FLAGS, '-DHART_TARGETS="host"', *folders, "-include", "cuda_host_shim.h", *options, "-x", "c++"]
    done = subprocess.run([*command, *map(str, sources), "-o", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output
