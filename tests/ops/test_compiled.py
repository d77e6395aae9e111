"""What the compilers made of the kernels, on record in benchmarks/results; `make kernels` compiles anew and compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = {80, 86, 89, 90}


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    return json.loads((ROOT / "benchmarks/results/kernels.json").read_text(encoding="utf-8"))["kernels"]


def test_every_kernel_is_on_record_for_every_gpu(kernels):
    on = {row["kernel"].split()[0]: set() for row in kernels}
    for row in kernels:
        on[row["kernel"].split()[0]].add(row["capability"])
    triton = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "launch"}
    cuda = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    assert set(on) == triton | cuda
    assert all(capabilities >= FAMILIES for capabilities in on.values())


def test_none_spills(kernels):
    assert {row["spilled_bytes"] for row in kernels if row["capability"] in FAMILIES} == {0}


def test_attention_runs_on_the_matrix_units(kernels):
    for row in kernels:
        if row["kernel"].startswith("attention") and "merge" not in row["kernel"] and "fp32" not in row["kernel"]:
            assert row["matrix"], row


def test_packs_are_read_by_loads_of_16_bytes(kernels):
    """Of the CUDA kernels: all; but half-precision parameters of an fp32 row come in packs of 8 bytes."""
    found = [row for row in kernels if row["source"] == "cuda" and "packs" in row["kernel"]]
    assert found
    for row in found:
        mixed = row["kernel"].startswith(("rms_norm fp32 fp16", "rms_norm fp32 bf16"))
        assert row["loads_128"] == row["loads"] or (mixed and row["loads_128"] >= 4), row
