"""The random VAR checkpoint: read as a released one is, and, with a checkout, drawn by both codes alike."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

OFFICIAL = os.environ.get("HART_INFER_OFFICIAL_VAR")  # a checkout of github.com/FoundationVision/VAR


@pytest.fixture(scope="module")
def checkpoint(benchmarks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from random_checkpoint import write_var_checkpoint

    return write_var_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_draws(checkpoint, dtype):
    from hart_infer import VarPipeline

    pipe = VarPipeline.from_pretrained(checkpoint, dtype=dtype, device="cpu")
    images = pipe([0, 9], seed=0, output_type="pt").images
    assert images.shape == (2, 3, 256, 256) and images.isfinite().all()
    assert ((images > 0) & (images < 1)).float().mean() > 0.9  # few pixels are saturated


def test_the_published_architecture_has_its_parameters():
    from architecture_var import VAR_PRESETS, var_parameter_counts

    millions = {depth: round(var_parameter_counts(preset)["transformer"] / 1e6) for depth, preset in VAR_PRESETS.items()}
    assert {depth: millions[depth] for depth in (16, 20, 24, 30, 36)} == {16: 310, 20: 601, 24: 1033, 30: 2010, 36: 2354}
    assert VAR_PRESETS[16].autoencoder_file == "vae_ch160v4096z32.pth"


@pytest.mark.skipif(OFFICIAL is None, reason="HART_INFER_OFFICIAL_VAR names no checkout of the released code")
def test_both_codes_draw_alike(tmp_path):
    import against_official

    out = tmp_path / "result.json"
    options = ("--depth", "2", "--dtype", "fp32", "--repeats", "1", "--warmup", "0", "--threads", "1")
    paths = ("--official", str(OFFICIAL), "--cache-dir", str(tmp_path / "cache"), "--out", str(out))
    assert against_official.main(["--family", "var", *paths, *options]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["results"][0]["difference"]
    assert found["indices"] == 0 and found["largest"] < 1e-4
