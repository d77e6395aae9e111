"""Attention by AMX's tiles, which the CPU that runs this rarely has: emulated, against fp64."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hart_infer import ops
from hart_infer.ops import cpu as extension
from hart_infer.ops.cpu import library
from hart_infer.ops.registry import Where, use_backend
from tests.ops.checks import check
from tests.ops.test_cpu import SHAPES, draw, exact

HERE = Path(__file__).resolve().parent
REASON = extension.refusal(Where("cpu", torch.bfloat16)) or (None if shutil.which("g++") else "there is no g++")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of csrc/cpu with emulated tiles."""
    output = tmp_path_factory.mktemp("amx") / "cpu.so"
    sources = sorted((HERE.parents[1] / "csrc" / "cpu").glob("*.cpp"))
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-include", HERE / "amx.h", *sources, "-o", output]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] < 1000], ids=str)
def test_attention(shape: tuple[int, ...], emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: emulated)
    monkeypatch.setattr(importlib.import_module("hart_infer.ops.cpu.attention"), "has_tiles", lambda: True)
    q, k, v = draw(shape, sum(shape))
    with use_backend("cpu"):
        found = ops.attention(q, k, v, scale=0.3)
    check(found, F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2), exact(q, k, v, 0.3))
