"""The comparison with the released code: which ways of drawing it takes, and the arithmetic of its record."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

OURS, THEIRS = "ours", "theirs"


@pytest.mark.parametrize(
    ("text", "quantize", "speed"),
    [("int8", "int8", None), ("fast", None, "fast"), ("turbo int8", "int8", "turbo"), ("int8 draft", "int8", "draft")],
)
def test_a_way_of_ours_is_a_speed_what_is_quantized_or_both(script, text, quantize, speed):
    variant = script.Variant.parse(text)
    assert (variant.role, variant.quantize, variant.speed) == (OURS, quantize, speed)


@pytest.mark.parametrize("text", ["", "quick", "fast turbo", "int8 int8_weight_only", "fast quick"])
def test_other_ways_are_refused(script, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not of exact, fast"):
        script.Variant.parse(text)


def test_every_ratio_is_to_the_released_code_of_its_own_round(script, tmp_path):
    variants = [script.Variant(OURS, OURS), script.Variant.parse("fast"), script.Variant(THEIRS, THEIRS)]
    for name in (OURS, "fast", THEIRS):
        for seed in (1, 2):
            torch.save({"images": torch.full((1, 3, 4, 4), 0.25 * seed), "indices": []}, tmp_path / f"{name}-{seed}.pt")
    seconds = [{OURS: 2.0, "fast": 1.0, THEIRS: 4.0}, {OURS: 16.0, "fast": 2.0, THEIRS: 8.0}]
    rounds = [
        {name: {"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": int(s)} for name, s in taken.items()} for taken in seconds
    ]
    loads = {name: {"read_seconds": 1.0, "peak_bytes": 1} for name in (OURS, THEIRS)}
    found = script.summarise(loads, rounds, variants, tmp_path, SimpleNamespace(seed=1, repeats=2))
    assert found["time_ratio"] == pytest.approx(1.0) and found["time_ratios"] == [0.5, 2.0]
    assert found["also"]["fast"]["time_ratios"] == [0.25, 0.25] and found["also"]["fast"]["cpu_time_ratio"] == pytest.approx(
        0.25
    )
    assert found["also"]["fast"]["difference"] == {"largest": 0, "mean": 0}
    assert found["peak_bytes"] == {OURS: 16, "fast": 2, THEIRS: 8} and found["difference"]["largest"] == 0
    text = script.report(found | {"size": 256, "dtype": "bf16", "official_setting": "s", "processes": "together"})
    assert "fast: 0.250 (1.50 s; processor time 0.250)" in text
