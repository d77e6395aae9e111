"""What the compilers made of the kernels, on record in tools/; `make kernels` compiles anew and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = {80, 86, 89, 90}


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    return json.loads((ROOT / "tools/compiled_kernels.json").read_text(encoding="utf-8"))["kernels"]


def in_tools(script: str) -> str:
    """What a script prints in a process of its own, whose Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT / "tools", env=environment, capture_output=True, text=True, check=True).stdout


def test_every_kernel_is_on_record_for_every_gpu(kernels):
    """By the names of today's cases: a tile that was changed and not compiled anew has no row."""
    expected = set()
    listed = in_tools("from triton_kernels import cases\nfor case in cases(): print(case.name, *case.targets, sep='|')")
    for line in listed.splitlines():
        name, *targets = line.split("|")
        expected |= {(name, capability) for capability in FAMILIES if not targets or str(capability) in targets}
    recorded = {(row["kernel"], row["capability"]) for row in kernels if row["source"] == "triton"}
    assert expected == {(name, capability) for name, capability in recorded if capability in FAMILIES}
    sources = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    compiled = {(row["kernel"].split()[0].rstrip(","), row["capability"]) for row in kernels if row["source"] == "cuda"}
    assert compiled >= {(name, capability) for name in sources for capability in FAMILIES}


def test_none_spills(kernels):
    assert {row["spilled_bytes"] for row in kernels if row["capability"] in FAMILIES} == {0}


def test_attention_runs_on_the_matrix_units(kernels):
    for row in kernels:
        if row["kernel"].startswith("attention") and "merge" not in row["kernel"] and "fp32" not in row["kernel"]:
            assert row["matrix"], row


def test_the_shared_memory_of_an_a100_keeps_up_with_its_matrix_units(kernels):
    """An HMMA of m16n8k16 takes two cycles of a multiprocessor, in which its shared memory moves 256 bytes."""
    tiles = [row for row in kernels if row["capability"] == 80 and row["kernel"].startswith("attention bf16 d64")]
    assert tiles and all(row["shared_per_matrix"] <= 256 for row in tiles if "16x64" not in row["kernel"]), tiles


def test_what_a_loop_does_for_each_matrix_instruction(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from binaries import loop

    lines = [
        ".L_x_0:",
        "        /*0010*/                   LDSM.16.MT88.4 R4, [R2] ;",
        "        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;",
        "        /*0030*/                   STS.U16 [R2], R5 ;",
        "        /*0040*/              @!PT HMMA.16816.F32.BF16 R4, R8, R12, R4 ;",
        "        /*0050*/                   LDS.64 R6, [R2] ;",
        "        /*0060*/               @P1 BRA `(.L_x_0) ;",
        "        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;",
        "        /*0080*/                   BRA `(.L_x_9) ;",
    ]
    assert loop("\n".join(lines)) == {"per_matrix": 3.0, "shared_per_matrix": (512 + 64 + 256) / 2}
    assert loop("\n".join(lines[1:])) == {}


def test_what_was_not_compiled_anew_stays_on_record():
    def row(source, kernel, registers):
        return {"source": source, "kernel": kernel, "capability": 80, "registers": registers}

    record = {"compilers": {"triton": "3.6", "cuda": "13.0"}, "kernels": [row("triton", "norm", 1), row("cuda", "norm", 2)]}
    anew = {"compilers": {"triton": "3.7", "cuda": None}, "kernels": [row("triton", "norm", 3), row("triton", "norm 2", 4)]}
    found = json.loads(in_tools(f"from compile_kernels import json, merged\nprint(json.dumps(merged({record}, {anew})))"))
    assert found["compilers"] == {"triton": "3.7", "cuda": "13.0"}
    assert found["kernels"] == [row("triton", "norm", 3), row("triton", "norm 2", 4), row("cuda", "norm", 2)]


def test_packs_are_read_by_loads_of_16_bytes(kernels):
    """Of the CUDA kernels: all; but half-precision parameters of an fp32 row come in packs of 8 bytes."""
    found = [row for row in kernels if row["source"] == "cuda" and "packs" in row["kernel"]]
    assert found
    for row in found:
        mixed = row["kernel"].startswith(("rms_norm fp32 fp16", "rms_norm fp32 bf16"))
        assert row["loads_128"] == row["loads"] or (mixed and row["loads_128"] >= 4), row
