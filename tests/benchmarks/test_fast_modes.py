"""The cost of fast modes: exact costs nothing, known errors give known figures, and noting codes changes no picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from hart_infer import VarPipeline

pytest.importorskip("torchmetrics")


@pytest.fixture(autouse=True)
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes do to these small models what they do to large ones."""
    monkeypatch.setattr("hart_infer.generation.speed.FINE", 5)


@pytest.fixture(scope="module")
def pipe(whole_var_tiny: Path) -> VarPipeline:
    pipe = VarPipeline.from_pretrained(whole_var_tiny, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_known_errors_give_known_figures(script, pipe):
    grey, lighter = Image.new("RGB", (16, 16), (100,) * 3), Image.new("RGB", (16, 16), (110,) * 3)
    right, half = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 0, 7, 7]])
    exact = [script.Drawn(grey, {2: right}, 2.0, 4.0)] * 2
    drawn = [script.Drawn(grey, {2: right}, 1.0, 1.0), script.Drawn(lighter, {2: half}, 1.0, 1.0)]
    found = script.cost(pipe, {"speed": "exact"}, drawn, exact)
    assert found.psnr == pytest.approx(-10 * math.log10((10 / 255) ** 2 / 2), abs=1e-3)
    assert (found.identical, found.agreement) == (1, {2: 0.75})
    assert (found.times_faster["median"], found.times_faster_by_processor["median"]) == (2.0, 4.0)


def test_noting_codes_changes_no_picture(script, pipe):
    drawn = script.draw(pipe, 3, 7, {"speed": "fast"})
    assert drawn.image.tobytes() == pipe(3, seed=7, speed="fast").images[0].tobytes()
    assert list(drawn.codes) == list(pipe.autoencoder.config.v_patch_nums)


def test_knobs_are_tried_by_themselves_once(script, pipe):
    ways = script.ways_of(pipe, ["fast", "turbo"], alone=True)
    alone = {name: way for name, way in ways.items() if "alone" in name}
    assert list(ways)[:3] == ["exact", "fast", "turbo"]
    assert sum("prune" in way for way in alone.values()) == 1  # turbo's is fast's
    assert all(way["guidance_stops_at"] for way in alone.values() if "late_temperature" in way)


def test_the_record_has_every_mode(script, whole_var_tiny, tmp_path, capsys):
    out, shown = tmp_path / "fast.json", tmp_path / "fast.png"
    options = ["--count", "2", "--device", "cpu", "--modes", "fast", "draft"]
    assert script.main([str(whole_var_tiny), *options, "--out", str(out), "--pictures", str(shown)]) == 0
    found = json.loads(out.read_text())
    assert list(found["modes"]) == ["exact", "fast", "draft"] and found["settings"]["weights"]
    exact, draft = found["modes"]["exact"], found["modes"]["draft"]
    assert (exact["identical"], exact["psnr"]) == (2, None) and set(exact["agreement"].values()) == {1.0}
    assert len(draft["agreement"]) == len(exact["agreement"]) - 1 and draft["psnr"] is not None
    assert Image.open(shown).size == (2 * 256, 3 * 256)
    assert capsys.readouterr().out.count("\n| ") == 3
