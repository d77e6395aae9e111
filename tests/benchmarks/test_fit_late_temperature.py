"""The fit of late_temperature: finds a temperature that is known, listens without changing a picture, writes in one step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hart_infer import HartPipeline, VarPipeline
from hart_infer.generation.schedule import hart_schedule


def stages() -> Any:
    return hart_schedule((1, 2, 4, 8), context_tokens=3, share_quant_resi=4).stages


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (40, 0.0), (40, 0.9)])
def test_a_known_temperature_is_found(script: Any, temperature: float, top_k: int, top_p: float) -> None:
    """The guided logits are conditional ones divided by it: of two scales of different sizes."""
    generator = torch.Generator().manual_seed(0)
    heard = []
    for stage, tokens in zip(stages()[-2:], (16, 64), strict=True):
        conditional = 3 * torch.randn(tokens, 100, generator=generator)
        heard.append(script.Logits(replace(stage, top_k=top_k, top_p=top_p), conditional, conditional / temperature))
    assert script.fit(heard) == pytest.approx(temperature, rel=0.02)


def test_scales_weigh_as_many_tokens_as_they_have(script: Any) -> None:
    """However many of them were noted: what they would give apart is not averaged evenly."""
    generator = torch.Generator().manual_seed(0)
    small, large = stages()[-2:]
    conditional = 3 * torch.randn(64, 100, generator=generator)
    few = script.Logits(replace(large, top_k=0), conditional[:8], conditional[:8] / 0.5)
    many = script.Logits(replace(small, top_k=0), conditional, conditional / 2.0)
    assert script.fit([few, many]) < 0.9


def test_a_model_that_is_certain_has_nothing_to_fit(script: Any) -> None:
    certain = 1000 * torch.eye(20)
    assert script.fit([script.Logits(stages()[-1], certain, 2 * certain)]) is None


def test_it_listens_and_changes_nothing(script: Any, pipe: HartPipeline, whole_var_tiny: Path) -> None:
    var = VarPipeline.from_pretrained(whole_var_tiny, device="cpu")
    var.set_progress_bar_config(disable=True)
    for one, subject in ((pipe, "a cat"), (var, 3)):
        before = one(subject, seed=1, output_type="latent").images
        sides = one.autoencoder.config.v_patch_nums[-2:]
        heard = script.listen(one, [subject, subject], sides=sides, tokens=32, seed=1)
        assert [logits.stage.side for logits in heard] == [*sides, *sides]
        assert all(len(logits.guided) == len(logits.conditional) <= 32 for logits in heard)
        assert all(not torch.equal(logits.guided, logits.conditional) for logits in heard)
        assert torch.equal(one(subject, seed=1, output_type="latent").images, before)


def test_without_guidance_there_is_nothing_to_fit(script: Any, pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "defaults", replace(pipe.defaults, guidance_scale=0.0))
    with pytest.raises(SystemExit, match="guidance_scale is 0"):
        script.listen(pipe, ["a cat"], sides=(8,), tokens=32, seed=0)


def test_what_is_written_is_the_default_of_a_call(
    script: Any, pipe: HartPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, prompts = pipe.save_pretrained(tmp_path / "own"), tmp_path / "prompts.txt"
    prompts.write_text("# prompts\na cat\n\na dog\n")
    script.main([str(folder), "--prompts", str(prompts), "--count", "3", "--scales", "2", "--tokens", "16", "--write"])
    shown = capsys.readouterr().out
    written = json.loads((folder / "model_index.json").read_text())["defaults"]["late_temperature"]
    assert f"late_temperature {written:.3f} (guidance_scale 4.5, 3 pictures)" in shown and "scale 8: entropy guided" in shown
    assert 0.02 < written < 5 and written != 1
    assert HartPipeline.from_pretrained(folder, device="cpu").knobs("fast").late_temperature == written
    with pytest.raises(SystemExit, match="convert the checkpoint"):
        script.write(tmp_path, 1.0)
