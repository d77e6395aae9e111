"""What the benchmarks share: the machine, memory, percentiles, checkpoints, and workers in processes of their own."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architecture import PRESETS
from random_checkpoint import cached_name, cached_var_name, write_checkpoint, write_var_checkpoint
from random_checkpoint import default_cache as default_cache

PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy")
SIZES = {preset.size: name for name, preset in PRESETS.items()}


class BenchmarkError(RuntimeError):
    """A benchmark can't run here; the message is one sentence for the user."""

    exit_code = 1


def exit_code(run: Callable[[], int | None]) -> int:
    """Run; return what it returns, or where it can't, say why in one sentence: 1, of a wrong checkout 2, interrupted 130."""
    try:
        return run() or 0
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130


def one_or_more(text: str) -> int:
    """Read a number for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def add_run_options(parser: argparse.ArgumentParser, *, repeats: int = 3) -> None:
    """Add how often and in how many threads a benchmark runs, where it keeps checkpoints, and where its record goes."""
    parser.add_argument("--repeats", type=one_or_more, default=repeats)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="where random checkpoints are kept")
    parser.add_argument("--out", type=Path, help="JSON file to write, by convention in benchmarks/results/")


# ---- the machine


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions, for the record."""
    import hart_infer

    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_field("/proc/meminfo", "MemTotal"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "hart_infer": hart_infer.__version__,
        **{name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_field(path: str, field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


# ---- memory and time of this process


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device: torch.device) -> bool:
    """Start a new peak; False where the system can't (the peak is then the process's whole life)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def peak_bytes(device: torch.device) -> int:
    """Peak since the last reset: allocated on CUDA, else resident in this process (mapped files that were read included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = _memory_field("/proc/self/status", "VmHWM")
    if resident is not None:
        return resident
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int | None:
    """What is resident now, where the system says."""
    return _memory_field("/proc/self/status", "VmRSS")


def tensors_of(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """All weights and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def touch(tensors: list[torch.Tensor]) -> None:
    """Read a byte of every page: mapped weights are in memory only once they have been read, and a peak without them
    would flatter."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().flatten().view(torch.uint8)[::4096].max()


def spread(values: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentiles; with few values those are the nearest ones, interpolated."""
    quantiles = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, low, high = quantiles.tolist()
    return {"median": median, "p20": low, "p80": high}


# ---- checkpoints and inputs


def random_checkpoint(size: int, dtype: str, text_encoder: str, cache: Path) -> Path:
    """The cached random checkpoint of HART of these shapes, made if it isn't there."""
    path = cache / cached_name(size, dtype, text_encoder)
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        write_checkpoint(path, SIZES[size], dtype=dtype, text_encoder=text_encoder)
    return path


def random_var_checkpoint(depth: int, dtype: str, cache: Path) -> Path:
    """The cached random checkpoint of VAR of this depth, made if it isn't there."""
    path = cache / cached_var_name(depth, dtype)
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        write_var_checkpoint(path, depth, dtype=dtype)
    return path


def require_package() -> None:
    """BenchmarkError where hart_infer can't be imported."""
    if importlib.util.find_spec("hart_infer") is None:
        raise BenchmarkError("hart_infer is not installed in this environment; `pip install -e .` at the root does it")


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The transformer's configuration of a checkpoint in the released layout."""
    config: dict[str, Any] = json.loads((checkpoint / "llm" / "config.json").read_text(encoding="utf-8"))
    return config


def random_context(tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A context [1, T, width] and its mask [1, T], the first quarter true."""
    context = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
    return context, torch.arange(tokens)[None] < max(1, tokens // 4)


def var_label(num_classes: int) -> int:
    """The class that VAR draws: golden retriever, or of fewer classes one of them."""
    return 207 % num_classes


def check_out(path: Path | None) -> None:
    """Find out before the run, not after it, that a result can't be written; raises OSError."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(values, file, indent=2)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def gigabytes(count: float) -> str:
    """For people: 1.68 GB."""
    return f"{count / 1e9:.2f} GB"


# ---- workers


class Worker:
    """A benchmark script in a process of its own, answering one request at a time: memory peaks are its alone."""

    def __init__(self, script: str, role: str, threads: int) -> None:
        """Start `script --worker ROLE`; it imports torch only then, with `threads` threads."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            reason = "was killed, most likely for want of memory" if code == -9 else f"ended with exit code {code}"
            raise BenchmarkError(f"the {self.role} process {reason}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.role}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        """Use as a context manager."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the process."""
        self.close()


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Be a worker: answer requests from standard input until it closes. Anything printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_answer(handle, json.loads(line))) + "\n")
            answers.flush()
    except KeyboardInterrupt:
        return 130
    return 0


def _answer(handle: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """What `handle` says, or its error for the parent to report; a traceback only for what nobody expected."""
    from hart_infer import HartError

    try:
        return handle(request)
    except (BenchmarkError, HartError) as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
