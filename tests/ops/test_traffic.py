"""The bytes that kernels move, counted access by access while they are interpreted or emulated: docs/kernels.md says how many.

Over the least possible, each tensor in and out once: what comes from and goes to memory if a launch's own repetitions are
served by the cache (each launch's distinct bytes), and what all its programs ask for together.
"""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hart_infer.ops.registry import OPS, use_backend
from tests.csrc.conftest import host_library as host_library
from tests.csrc.conftest import on_host as on_host
from tests.gpu.test_shapes import calls as calls

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (Triton|CUDA C\+\+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
TABLE = {name: (float(least), float(asked)) for name, _, least, asked in ROW.findall((ROOT / "docs/kernels.md").read_text())}
GPU = {name: found for name in OPS if (found := [b for b in ("triton", "cuda") if b in OPS[name].backends])}  # its kernel
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted on the CPU")


def by_triton(run, monkeypatch) -> tuple[int, int]:
    """Distinct and all bytes of the launches of `run`."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    accesses, distinct, asked = defaultdict(list), 0, 0

    def note(kind, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        accesses[kind, size].append(pointers.data[mask.data])

    def noted_load(self, pointers, mask, *rest, **options):
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def noted_store(self, pointers, value, mask, *rest):
        note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted(self, *arguments, **options):
        nonlocal distinct, asked
        launch(self, *arguments, **options)
        for (_, size), addresses in accesses.items():
            every = np.concatenate(addresses)
            distinct, asked = distinct + size * len(np.unique(every)), asked + size * len(every)
        accesses.clear()

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    with use_backend("triton"):
        run()
    return distinct, asked


def by_cuda(run, library) -> tuple[int, int]:
    """The same of the kernels of csrc/; the one number per row that a quantised norm writes beside its row is not counted."""
    counter = library._c
    counter.host_moved.restype = ctypes.c_int64
    counter.host_count(1)
    with use_backend("cuda"):
        run()
    moved = counter.host_moved(1), counter.host_moved(0)
    counter.host_count(0)
    return moved


@pytest.mark.parametrize("name", GPU)
def test_a_kernel_moves_what_is_written_down(name, calls, monkeypatch, request):
    """At 2 x 256 tokens of 4 heads of 64, 535 keys, 1024 codes, pictures of 64 x 64 x 32; bf16."""
    (backend,) = GPU[name]
    shapes = calls.Shapes(4, 64, 16, 535, 512, 256, 1024, 16, 32, 64, 8)
    arguments, options = calls.CASES[name](calls.Inputs(shapes, "cpu", torch.bfloat16))
    with torch.inference_mode():
        least = calls.bytes_of((arguments, options), OPS[name](*arguments, **options))

        def run():
            OPS[name](*arguments, **options)

        if backend == "cuda":
            request.getfixturevalue("on_host")
            moved = by_cuda(run, request.getfixturevalue("host_library"))
        else:
            moved = by_triton(run, monkeypatch)
    assert tuple(round(bytes_ / least, 1) for bytes_ in moved) == TABLE[name]
