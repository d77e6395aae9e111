"""The public API, given a trace's classes and seed, gives the trace's codes and pictures."""

from __future__ import annotations

import pytest
import torch

from hart_infer import VarPipeline
from hart_infer.generation.next_scale import finish
from hart_infer.pipelines import next_scale

from .recorded import Trace, relative
from .recorded_var import RUNS, TIE, RecordedAtTie, error, load_trace, released_folder

pytestmark = pytest.mark.golden


def options(trace: Trace) -> dict:
    settings = trace.settings
    return {
        "guidance_scale": settings.guidance_scale,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "more_smooth": settings.more_smooth,
    }


@pytest.mark.parametrize(("checkpoint", "name"), RUNS)
def test_trace(checkpoint, name, tmp_path, monkeypatch):
    """The recorded pictures were drawn together, by one generator; so they are here."""
    trace, codes = load_trace(checkpoint, name), []
    pipe = VarPipeline.from_pretrained(released_folder(checkpoint, tmp_path / "var"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(next_scale, "make_sampler", lambda *given: RecordedAtTie(trace, TIE.get((checkpoint, name))))
    monkeypatch.setattr(next_scale, "finish", lambda state: codes.extend(state.indices) or finish(state))
    labels = trace["labels"].tolist()
    output = pipe(labels, seed=trace.seed, reproducible=False, output_type="latent", **options(trace))
    assert len(codes) == 10
    for scale, indices in enumerate(codes):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"
    assert relative(output.images, trace["f_hat"]) <= error(checkpoint, trace)
    assert pipe.sizes == ({"var-tiny": 256, "var-tiny-shared": 512}[checkpoint],)


def test_one_picture_by_its_seed_is_the_released_code_s_by_its_g_seed(tmp_path):
    """Up to scale 0 a batch's first picture draws what it draws alone: its code is the recorded one."""
    trace, codes = load_trace("var-tiny", "hard"), []
    pipe = VarPipeline.from_pretrained(released_folder("var-tiny", tmp_path / "var"), device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def look(step):
        codes.append(step.f_hat)
        step.stop()

    pipe(trace["labels"].tolist()[0], seed=trace.seed, callback_on_step_end=look, **options(trace))
    assert relative(codes[0], trace.at(0, "f_hat")[:1]) <= error("var-tiny", trace)
