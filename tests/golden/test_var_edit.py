"""Editing as recorded: the mask from the box, what every scale feeds on, the latent and the picture."""

from __future__ import annotations

import ast
from functools import cache

import pytest
import torch

from hart_infer import VarPipeline
from hart_infer.pipelines.edit import PictureEdit, check_mask, keep_mask

from .data import golden
from .recorded import relative
from .recorded_var import (
    Run,
    error,
    generate_as_recorded,
    load_model,
    load_trace,
    metadata,
    recorded_edit,
    released_folder,
    tokenizer_trace,
)

pytestmark = pytest.mark.golden

every_edit = pytest.mark.parametrize("name", ["edit-in", "edit-out"])
SIDE, CELL = 16, 16


def said(name: str) -> dict[str, str]:
    return metadata(golden("var-tiny") / f"trace-{name}.safetensors")


@cache
def run(name: str) -> Run:
    """From the recorded latent; needs no encoder."""
    model = load_model("var-tiny")
    return generate_as_recorded(model, load_trace("var-tiny", name), edit=recorded_edit(model, name).embedding)


@every_edit
def test_keep_mask(name):
    box, inside = ast.literal_eval(said(name)["box"]), said(name)["inpainting"] == "True"
    anew = check_mask(box, side=SIDE, cell=CELL, source=None, inside=inside)
    assert torch.equal(keep_mask(anew, SIDE)[0, 0], load_trace("var-tiny", name)["keep_mask"])


@every_edit
def test_fed_on(name):
    trace = load_trace("var-tiny", name)
    for scale, fed_on in enumerate(run(name).fed_on):
        assert relative(fed_on, trace.at(scale, "fed_on")) <= error("var-tiny", trace), f"scale {scale}"


@every_edit
def test_f_hat(name):
    trace = load_trace("var-tiny", name)
    assert relative(run(name).f_hats[-1], trace["f_hat"]) <= error("var-tiny", trace)


@every_edit
def test_by_the_pipeline(name, tmp_path, monkeypatch):
    """From the picture, the box and the seed to the picture: `seed` is the released `g_seed`."""
    trace, facts = load_trace("var-tiny", name), said(name)
    pipe = VarPipeline.from_pretrained(released_folder("var-tiny", tmp_path / "var"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    fed_on, embedding = [], PictureEdit.embedding
    monkeypatch.setattr(PictureEdit, "embedding", lambda *args: fed_on.append(embedding(*args)) or fed_on[-1])
    label = trace["labels"].item()
    settings = trace.settings
    image = (pipe.inpaint if facts["inpainting"] == "True" else pipe.outpaint)(
        (tokenizer_trace()["image"] + 1) / 2,
        ast.literal_eval(facts["box"]),
        None if label == pipe.transformer.config.num_classes else label,
        blend=False,
        guidance_scale=settings.guidance_scale,
        top_k=settings.top_k,
        top_p=settings.top_p,
        more_smooth=settings.more_smooth,
        seed=trace.seed,
        output_type="pt",
    ).images
    for scale, fed in enumerate(fed_on):
        assert relative(fed, trace.at(scale, "fed_on")) <= error("var-tiny", trace), f"scale {scale}"
    limit = 1e-2 if settings.more_smooth else 1 / 255
    assert (image - trace["image"].float() / 65535).abs().max() <= limit
