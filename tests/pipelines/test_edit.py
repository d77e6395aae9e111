"""Editing: what a mask keeps, at every scale and in pixels; for VAR and for HART; and masks that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hart_infer import HartPipeline, InputError, Step, VarPipeline
from hart_infer.generation.schedule import Stage
from hart_infer.pipelines.edit import PictureEdit, check_mask, feathered, keep_at, keep_mask
from tests.released_var import CELL, CLASSES, PIXELS, SIDES, autoencoder_state, transformer_state, write_checkpoint

SIDE = SIDES[-1]
CORNER = (0.0, 0.0, 1 / SIDE, 1 / SIDE)  # one cell of the latent
HALF = (0.0, 0.0, 1.0, 0.5)  # the left one
ROUNDING = 1e-5  # relative: sums of codes in another order


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("released"))


def load(folder: Path) -> VarPipeline:
    pipe = VarPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def var(released: Path) -> VarPipeline:
    """Loaded once; leave dtype and weights alone."""
    return load(released)


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def photo(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def bytes_of(photo: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stage, Tensor, Tensor]]:
    """Every scale's stage, drawn embedding, and what is fed on instead."""
    seen: list[tuple[Stage, Tensor, Tensor]] = []
    embedding = PictureEdit.embedding

    def spy(self: PictureEdit, drawn: Tensor, stage: Stage) -> Tensor:
        seen.append((stage, drawn.clone(), embedding(self, drawn, stage).clone()))
        return seen[-1][2]

    monkeypatch.setattr(PictureEdit, "embedding", spy)
    return seen


def latent(call: Any, *args: Any, **options: Any) -> Tensor:
    return call(*args, **{"seed": 0, "output_type": "latent", **options}).images


def relative(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


# Masks.


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 8), (0, 8)),
        ((0.25, 0.5, 0.75, 1.0), (2, 6), (4, 8)),
        ((0.5 / 8, 1.5 / 8, 2.5 / 8, 3.5 / 8), (0, 2), (2, 4)),  # halves go to the even side
        ((4.5 / 8, 5.5 / 8, 6.5 / 8, 7.5 / 8), (4, 6), (6, 8)),
        ((0.51 / 8, 1.49 / 8, 2.51 / 8, 3.49 / 8), (1, 3), (1, 3)),
        ([0, 0, 1, 0.5], (0, 8), (0, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_box_s_edges_are_the_nearest_cells_half_to_even(box: Any, rows: Any, columns: Any, inside: bool) -> None:
    expected = torch.full((8, 8), 1.0 if inside else 0.0)
    expected[rows[0] : rows[1], columns[0] : columns[1]] = 0.0 if inside else 1.0
    if not inside and not (expected == 0).any():
        with pytest.raises(InputError, match="keeps all of the picture's centred square"):
            check_mask(box, side=8, cell=4, source=None, inside=inside)
        return
    anew = check_mask(box, side=8, cell=4, source=None, inside=inside)
    assert anew.shape == (1, 1, 32, 32)
    assert torch.equal(keep_mask(anew, 8)[0, 0], expected)


def test_a_cell_is_kept_whole_or_not_at_all() -> None:
    mask = torch.zeros(32, 32)
    mask[7, 9] = 1
    expected = torch.ones(8, 8)
    expected[1, 2] = 0
    assert torch.equal(keep_mask(check_mask(mask, side=8, cell=4, source=None, inside=True), 8)[0, 0], expected)


def mask_picture(kind: str) -> Any:
    """The left half white, in every form that a mask may have."""
    pixels, cells = torch.zeros(PIXELS, PIXELS), torch.zeros(SIDE, SIDE)
    pixels[:, : PIXELS // 2], cells[:, : SIDE // 2] = 1, 1
    grey = Image.fromarray((pixels * 255).to(torch.uint8).numpy())
    forms: dict[str, Any] = {
        "box": HALF,
        "list": list(HALF),
        "pixels": pixels,
        "pixels with channels": pixels[None, None],
        "booleans": pixels.bool(),
        "integers": pixels.long(),
        "half precision": pixels.half(),
        "cells": cells,
        "grey": grey,
        "RGB": grey.convert("RGB"),
        "1 bit": grey.convert("1"),
        "palette": grey.convert("P"),
        "almost": Image.fromarray((pixels * 100 + 77).to(torch.uint8).numpy()),  # 77 is dark, 177 is light
    }
    return forms[kind]


KINDS = "box, list, pixels, pixels with channels, booleans, integers, half precision, cells, grey, RGB, 1 bit, palette, almost"


@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_all_forms_of_a_mask_are_one(var: VarPipeline, photo: Image.Image, kind: str) -> None:
    expected, found = var.edit(photo, HALF), var.edit(photo, mask_picture(kind))
    assert torch.equal(found.keep, expected.keep)
    assert torch.equal(found.anew, expected.anew)
    assert torch.equal(found.keep[0, 0, :, : SIDE // 2], torch.zeros(SIDE, SIDE // 2))
    assert torch.equal(found.keep[0, 0, :, SIDE // 2 :], torch.ones(SIDE, SIDE // 2))


def test_a_mask_is_cropped_as_its_picture_is(var: VarPipeline) -> None:
    wide = np.zeros((60, 100), dtype=np.uint8)
    wide[:, 50:] = 255  # right of the middle, and the middle square is what stays
    edit = var.edit(Image.new("RGB", (100, 60), "red"), Image.fromarray(wide))
    assert torch.equal(edit.keep[0, 0, :, : SIDE // 2], torch.ones(SIDE, SIDE // 2))
    assert not edit.keep[0, 0, :, SIDE // 2 :].any()


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "wrong size": (Image.new("L", (31, 32), 255), "The mask has 31 x 32 pixels and the picture 32 x 32"),
    "all black": (Image.new("L", (32, 32)), "keeps all of the picture's centred square"),
    "dark grey": (Image.new("L", (32, 32), 127), "keeps all of the picture's centred square"),
    "zeros": (torch.zeros(32, 32), "keeps all of the picture's centred square"),
    "none": (None, "must be a PIL image, a tensor or a box of four numbers, not NoneType"),
    "a string": ("mask.png", "not str"),
    "an array": (np.ones((32, 32)), "not ndarray"),
    "a number": (3, "not int"),
    "another shape": (torch.ones(31, 32), r"must have 32 x 32 pixels or 8 x 8 cells, not the shape \[31, 32\]"),
    "one dimension": (torch.ones(64), "not the shape"),
    "no dimension": (torch.tensor(1.0), "not the shape"),
    "two masks": (torch.ones(2, 32, 32), "not the shape"),
    "no pixels": (torch.ones(0, 32, 32), "not the shape"),
    "bytes": (torch.full((32, 32), 255), "values must be from 0"),
    "negative": (-torch.ones(32, 32), "values must be from 0"),
    "NaN": (torch.full((32, 32), torch.nan), "values must be from 0"),
    "infinite": (torch.full((32, 32), torch.inf), "values must be from 0"),
    "empty box": ((0.5, 0.5, 0.5, 1.0), "is empty"),
    "box that is empty in cells": ((0.5, 0.5, 0.51, 1.0), "is too thin: .* nearest of 8 cells"),
    "box upside down": ((1.0, 0.0, 0.0, 1.0), "is empty"),
    "box with NaN": ((float("nan"), 0, 1, 1), "must be a number from 0 to 1, not nan"),
    "box beyond": ((0, 0, 1.5, 1), "must be a number from 0 to 1, not 1.5"),
    "box of pixels": ((0, 0, 16, 16), "must be a number from 0 to 1, not 16"),
    "box of three": ((0, 0, 1), "A box has four numbers.*not 3"),
    "box of five": ((0, 0, 1, 1, 1), "A box has four numbers.*not 5"),
    "no box": ((), "A box has four numbers.*not 0"),
    "box of strings": (("0", "0", "1", "1"), "must be a number from 0 to 1, not '0'"),
    "box of booleans": ((False, False, True, True), "must be a number from 0 to 1"),
    "box of boxes": ([[0, 0, 1, 1]] * 4, "must be a number from 0 to 1"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_are_none(var: VarPipeline, photo: Image.Image, kind: str) -> None:
    mask, words = BAD_MASKS[kind]
    for call in (var.edit, var.inpaint, var.outpaint):
        with pytest.raises(InputError, match=words) as caught:
            call(photo, mask)
        assert "\n" not in str(caught.value)


def test_a_box_of_everything_is_nothing_to_outpaint(var: VarPipeline, photo: Image.Image) -> None:
    with pytest.raises(InputError, match="keeps all of the picture's centred square"):
        var.outpaint(photo, (0, 0, 1, 1))


def test_a_transparent_part_of_a_mask_is_kept(var: VarPipeline, photo: Image.Image) -> None:
    """As paint programs save a mask that was drawn on an empty layer."""
    layer = Image.new("RGBA", photo.size)
    layer.paste((255, 255, 255, 255), (0, 0, photo.width // 2, photo.height))
    plain = Image.new("L", photo.size)
    plain.paste(255, (0, 0, photo.width // 2, photo.height))
    assert torch.equal(var.edit(photo, layer).keep, var.edit(photo, plain).keep)


def test_a_thin_stroke_in_a_large_mask_counts(var: VarPipeline) -> None:
    mask = Image.new("L", (3200, 3200))
    mask.paste(255, (0, 1000, 3200, 1002))
    keep = var.edit(Image.new("RGB", (3200, 3200)), mask).keep[0, 0]
    assert (keep == 0).any(dim=1).sum() == 1
    assert (keep.sum(dim=1) == 0).sum() == 1


def test_an_edit_follows_its_call_to_another_device(var: VarPipeline, picture: Tensor) -> None:
    edit = var.edit(picture, HALF)
    stage = Stage(index=1, side=2, length=4, guided=False, guidance=0, progress=0, top_k=0, top_p=0, more_smooth=False, phi=0)
    drawn = torch.empty(1, edit.tokens.residual.shape[1], 2, 2, device="meta")
    assert edit.embedding(drawn, stage).device.type == "meta"


def test_an_edit_is_of_its_own_copy_of_the_picture(var: VarPipeline, picture: Tensor) -> None:
    given = picture.clone()
    edit = var.edit(given, HALF)
    given.zero_()
    assert torch.equal(edit.picture, picture)
    assert edit != var.edit(picture, HALF)


def test_the_subject_by_var_s_own_name(var: VarPipeline, picture: Tensor) -> None:
    by_label = var.inpaint(picture, HALF, label=3, seed=1, output_type="latent").images
    assert torch.equal(by_label, var.inpaint(picture, HALF, 3, seed=1, output_type="latent").images)


def test_hart_without_a_prompt_runs_half_the_rows(hart: HartPipeline, picture: Tensor) -> None:
    rows: list[int] = []
    hook = hart.transformer.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    hart.inpaint(picture, HALF, output_type="latent")
    hook.remove()
    assert set(rows[1:]) == {1}


BAD_PICTURES: dict[str, tuple[Any, str]] = {
    "none": (None, "not NoneType"),
    "a path": ("photo.png", "not str"),
    "an array": (np.zeros((32, 32, 3)), "not ndarray"),
    "another size": (torch.rand(1, 3, 16, 16), r"\[N, 3, 32, 32\]"),
    "grey": (torch.rand(1, 1, 32, 32), r"\[N, 3, 32, 32\]"),
    "two": (torch.rand(2, 3, 32, 32), "edit takes one picture, not 2"),
    "nothing": (torch.rand(0, 3, 32, 32), r"\[N, 3, 32, 32\]"),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating-point"),
    "below 0": (-torch.ones(1, 3, 32, 32), "0..1"),
    "NaN": (torch.full((1, 3, 32, 32), torch.nan), "0..1"),
    "two in a list": ([Image.new("RGB", (9, 9))] * 2, "edit takes one picture, not 2"),
    "an empty list": ([], "is empty"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_pictures_that_are_none(var: VarPipeline, kind: str) -> None:
    given, words = BAD_PICTURES[kind]
    with pytest.raises(InputError, match=words):
        var.edit(given, HALF)


def test_one_picture_in_a_list_is_a_picture(var: VarPipeline, photo: Image.Image) -> None:
    assert torch.equal(var.edit([photo], HALF).picture, var.edit(photo, HALF).picture)


def test_a_tensor_without_batch_is_a_picture(var: VarPipeline, picture: Tensor) -> None:
    """As `edit` says."""
    assert torch.equal(var.edit(picture[0], HALF).picture, picture)


def test_a_mask_of_a_picture_that_lies_on_its_side(var: VarPipeline) -> None:
    """A photo whose EXIF says that it is to be turned: the mask is of what a viewer shows, which is what is edited."""
    lying = Image.new("RGB", (40, 60), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # turned by 90 degrees: 60 x 40 where shown
    lying.info["exif"] = exif.tobytes()
    mask = Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 30, 40))
    expected = var.edit(Image.new("RGB", (60, 40)), HALF).keep
    assert torch.equal(var.edit(lying, mask).keep, expected)
    made_from_it = mask.transpose(Image.Transpose.ROTATE_90)  # and has its EXIF data
    made_from_it.info["exif"] = exif.tobytes()
    assert torch.equal(var.edit(lying, made_from_it).keep, expected)


@pytest.mark.parametrize("options", [{"blend": "yes"}, {"blend": None}, {"inside": 1}], ids=str)
def test_flags_are_true_or_false(var: VarPipeline, photo: Image.Image, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be True or False"):
        var.edit(photo, HALF, **options)


# What is fed on.


def test_the_first_scale_is_kept_whole_and_others_above_a_half() -> None:
    keep = torch.zeros(1, 1, 8, 8)
    assert keep_at(keep, 1).all()
    assert not keep_at(keep, 2).any()  # 4 tokens are more than 3
    keep[..., :4] = 1
    assert torch.equal(keep_at(keep, 8)[0, 0], keep[0, 0].bool())
    assert keep_at(keep, 4)[0, 0, 0].tolist() == [True, True, False, False]
    assert keep_at(keep, 3)[0, 0, 0].tolist() == [True, False, False]  # exactly 0.5 in the middle is not kept
    assert keep_at(keep, 2)[0, 0, 0].tolist() == [True, False]


def test_kept_cells_feed_on_the_picture_s_codes_and_others_on_what_is_drawn(
    var: VarPipeline, picture: Tensor, fed: list[Any]
) -> None:
    edit = var.edit(picture, HALF)
    latent(var, 2, edit=edit)
    assert [stage.index for stage, _, _ in fed] == list(range(len(SIDES)))
    for stage, drawn, given in fed:
        keep = keep_at(edit.keep, stage.side).expand_as(drawn)
        assert torch.equal(given[keep], edit.tokens.embeddings[stage.index][keep])
        assert torch.equal(given[~keep], drawn[~keep])
        assert keep.any() and (stage.index == 0 or not keep.all())


def test_draws_do_not_depend_on_the_mask(var: VarPipeline, picture: Tensor, fed: list[Any]) -> None:
    """All cells are drawn, kept or not: the first two scales draw alike, as the first one is kept by every mask."""
    for box in (HALF, CORNER):
        latent(var, 2, edit=var.edit(picture, box))
    first, second = fed[: len(SIDES)], fed[len(SIDES) :]
    assert torch.equal(first[0][1], second[0][1])
    assert torch.equal(first[1][1], second[1][1])


def test_inpaint_and_outpaint_are_calls_with_an_edit(var: VarPipeline, picture: Tensor) -> None:
    box = (0.25, 0.25, 0.75, 0.75)
    assert torch.equal(latent(var.inpaint, picture, box, 2), latent(var, 2, edit=var.edit(picture, box)))
    outside = var.edit(picture, box, inside=False)
    assert torch.equal(latent(var.outpaint, picture, box, 2), latent(var, 2, edit=outside))
    assert torch.equal(outside.keep, 1 - var.edit(picture, box).keep)
    assert not torch.equal(latent(var.inpaint, picture, box, 2), latent(var.outpaint, picture, box, 2))


def test_without_a_class_guidance_does_nothing(var: VarPipeline, picture: Tensor) -> None:
    """Both halves would be "no class"; so one is run."""
    rows: list[int] = []
    hook = var.transformer.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
    pictures = [latent(var.inpaint, picture, HALF, guidance_scale=guidance) for guidance in (0, 4, 9)]
    hook.remove()
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert set(rows) == {1, 2}  # two rows of the class's own prefill, which is repeated so
    assert not torch.equal(pictures[0], latent(var.inpaint, picture, HALF, 2))


def test_without_a_class_it_is_that_of_no_class(var: VarPipeline, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    condition = var.transformer.condition
    monkeypatch.setattr(var.transformer, "condition", lambda classes: asked.append(classes) or condition(classes))
    latent(var.inpaint, picture, HALF)
    assert [classes.tolist() for classes in asked] == [[CLASSES]]


def test_several_pictures_of_an_edit(var: VarPipeline, picture: Tensor) -> None:
    edit = var.edit(picture, HALF)
    both = var([1, 2], num_images_per_prompt=2, edit=edit, seed=5, output_type="pt").images
    alone = [var(label, edit=edit, seed=5 + i, output_type="pt").images for i, label in enumerate((1, 1, 2, 2))]
    assert torch.equal(both, torch.cat(alone))
    assert both.shape == (4, 3, PIXELS, PIXELS)
    together = var([1, 2], num_images_per_prompt=2, edit=edit, seed=5, output_type="pt", reproducible=False).images
    assert (together - both).abs().max() <= 1e-3


def test_an_edit_may_be_used_again_and_is_not_changed(var: VarPipeline, picture: Tensor) -> None:
    edit = var.edit(picture, HALF)
    before = [tensor.clone() for tensor in (*edit.tokens.embeddings, edit.tokens.residual, edit.keep, edit.picture)]
    assert torch.equal(latent(var, 2, edit=edit), latent(var, 2, edit=edit))
    after = (*edit.tokens.embeddings, edit.tokens.residual, edit.keep, edit.picture)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_edit_of_another_size(var: VarPipeline, tmp_path: Path) -> None:
    sides = (1, 2, 3, 4)
    smaller = load(
        write_checkpoint(tmp_path, transformer=transformer_state(sides=sides), autoencoder=autoencoder_state(sides=sides))
    )
    edit = smaller.edit(torch.rand(1, 3, 16, 16), HALF)
    with pytest.raises(InputError, match="edit is of another model; make it by this pipeline's edit"):
        var(1, edit=edit)


def test_an_edit_of_another_model_of_the_same_size(var: VarPipeline, pipe: HartPipeline, picture: Tensor) -> None:
    """Of other channels and scales than this pipeline's."""
    assert pipe.sizes == var.sizes
    with pytest.raises(InputError, match="make it by this pipeline's edit"):
        var(1, edit=pipe.edit(picture, HALF))


def test_scales_can_be_watched_and_stopped(var: VarPipeline, picture: Tensor) -> None:
    seen: list[int] = []

    previews: list[Image.Image] = []

    def look(step: Step) -> None:
        seen.append(step.index)
        previews.extend(step.preview())
        if step.index == 3:
            step.stop()

    (image,) = var.inpaint(picture, HALF, 1, callback_on_step_end=look).images
    assert seen == [0, 1, 2, 3]
    assert image.size == (PIXELS, PIXELS)
    assert image.tobytes() == previews[-1].tobytes() != previews[0].tobytes()


def test_half_precision(released: Path, picture: Tensor) -> None:
    half = load(released).to(torch.bfloat16)
    images = half.inpaint(picture, HALF, 1, seed=0, output_type="pt").images
    assert images.dtype == torch.float32
    assert torch.equal(images[..., -4:], picture[..., -4:])


@pytest.mark.parametrize("more_smooth", [True, False])
def test_what_is_kept_far_away_is_the_reconstruction_s(var: VarPipeline, picture: Tensor, more_smooth: bool) -> None:
    """One corner is painted; what the far one is made of is the picture's own codes, at every scale."""
    painted = latent(var.inpaint, picture, CORNER, 1, more_smooth=more_smooth)
    codes = var.autoencoder.latent(picture * 2 - 1, "discrete")
    assert relative(painted[..., 5:, 5:], codes[..., 5:, 5:]) <= ROUNDING
    assert relative(painted[..., :1, :1], codes[..., :1, :1]) > 0.1


# Pixels.


def test_blending_keeps_the_picture_s_own_pixels(var: VarPipeline, photo: Image.Image) -> None:
    """Byte for byte, from one cell outside the mask on."""
    (blended,) = var.inpaint(photo, HALF, 1, seed=0).images
    (decoded,) = var.inpaint(photo, HALF, 1, seed=0, blend=False).images
    ours, given, plain = bytes_of(blended), bytes_of(photo), bytes_of(decoded)
    edge = PIXELS // 2
    assert torch.equal(ours[..., edge + CELL :], given[..., edge + CELL :])
    assert torch.equal(ours[..., :edge], plain[..., :edge])
    assert not torch.equal(plain[..., edge + CELL :], given[..., edge + CELL :])
    between = (ours - given)[..., edge : edge + CELL]
    assert (between >= (plain - given)[..., edge : edge + CELL].clamp(max=0) - 1 / 255).all()
    assert (between <= (plain - given)[..., edge : edge + CELL].clamp(min=0) + 1 / 255).all()


def test_the_feather_falls_from_one_to_zero_outside_the_mask() -> None:
    anew = torch.zeros(1, 1, 32, 32)
    anew[..., :16] = 1
    weights = feathered(anew, 2)
    row = weights[0, 0, 10]
    assert torch.equal(weights[0, 0], row.expand(32, 32))
    assert row[:16].eq(1).all()
    assert row[20:].eq(0).all()
    assert (row[15:20].diff() < 0).all()
    assert 0 < row[16] < 1


def test_a_feather_of_no_width_is_the_mask() -> None:
    anew = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert torch.equal(feathered(anew, 0), anew)


def test_latents_are_not_blended(var: VarPipeline, picture: Tensor) -> None:
    blended, plain = (latent(var.inpaint, picture, HALF, 1, blend=blend) for blend in (True, False))
    assert torch.equal(blended, plain)


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_blending_is_of_every_form(var: VarPipeline, picture: Tensor, output_type: str) -> None:
    images = var.inpaint(picture, HALF, 1, seed=0, output_type=output_type).images
    pixels = images if output_type == "pt" else torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(pixels[..., -8:], picture[..., -8:])


# HART.


@pytest.fixture
def hart(pipe: HartPipeline) -> HartPipeline:
    return pipe


def test_hart_s_last_scale_keeps_the_picture_s_continuous_residual(hart: HartPipeline, picture: Tensor, fed: list[Any]) -> None:
    edit = hart.edit(picture, HALF)
    latent(hart, "a cat", edit=edit)
    assert [stage.phi is None for stage, _, _ in fed] == [False] * 5 + [True]
    for stage, drawn, given in fed:
        keep = keep_at(edit.keep, stage.side).expand_as(drawn)
        own = edit.tokens.residual if stage.phi is None else edit.tokens.embeddings[stage.index]
        assert torch.equal(given[keep], own[keep])
        assert torch.equal(given[~keep], drawn[~keep])
    assert not torch.equal(edit.tokens.residual, edit.tokens.embeddings[-1])


@pytest.mark.parametrize("prompt", ["a cat", None])
def test_hart_s_far_corner_is_the_continuous_latent(hart: HartPipeline, picture: Tensor, prompt: str | None) -> None:
    """And so its decoded pixels, without any blending, are nearly the reconstruction's: group norms see the corner."""
    painted = latent(hart.inpaint, picture, CORNER, prompt)
    continuous = hart.autoencoder.latent(picture * 2 - 1, "hybrid")
    assert relative(painted[..., 5:, 5:], continuous[..., 5:, 5:]) <= ROUNDING
    assert relative(painted[..., :1, :1], continuous[..., :1, :1]) > 0.1
    image = hart.inpaint(picture, CORNER, prompt, seed=0, blend=False, output_type="pt").images
    errors = (image - hart.reconstruct(picture, "hybrid")).abs().mean(dim=1)[0]
    far, near = errors[-8:, -8:].mean(), errors[:4, :4].mean()
    discrete = (hart.reconstruct(picture, "discrete") - hart.reconstruct(picture, "hybrid")).abs().mean(dim=1)[0, -8:, -8:]
    assert far < near / 2
    assert far < discrete.mean() / 4  # which the codes alone would give


def test_hart_s_prompt_and_negative_prompt_count(hart: HartPipeline, picture: Tensor) -> None:
    drawn = [
        latent(hart.inpaint, picture, HALF, *prompt, **options)
        for prompt, options in (
            ((), {}),
            (("a cat",), {}),
            (("a dog",), {}),
            (("a cat",), {"negative_prompt": "ugly"}),
            (("a cat",), {"guidance_scale": 0}),
        )
    ]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


def test_hart_s_outpaint_and_batches(hart: HartPipeline, picture: Tensor) -> None:
    box = (0.25, 0.25, 0.75, 0.75)
    both = hart.outpaint(picture, box, ["a cat", "a fox"], seed=3, output_type="pt").images
    alone = [hart.outpaint(picture, box, p, seed=3 + i, output_type="pt").images for i, p in enumerate(("a cat", "a fox"))]
    assert torch.equal(both, torch.cat(alone))
    assert torch.equal(both[..., 14:18, 14:18], picture[..., 14:18, 14:18].expand(2, -1, -1, -1))


def test_hart_s_call_without_prompt_needs_an_edit(hart: HartPipeline, picture: Tensor) -> None:
    with pytest.raises(InputError, match="Give either prompt or prompt_embeds"):
        hart()
    embeds = hart.encode_prompt("a cat")
    given, encoded = (
        latent(hart.inpaint, picture, HALF, *a, **o) for a, o in ((["a cat"], {}), ([], {"prompt_embeds": embeds}))
    )
    assert torch.equal(given, encoded)


@pytest.mark.parametrize("kind", ["wrong size", "all black", "NaN", "box of three", "none"])
def test_hart_refuses_the_same_masks(hart: HartPipeline, photo: Image.Image, kind: str) -> None:
    mask, words = BAD_MASKS[kind]
    with pytest.raises(InputError, match=words):
        hart.inpaint(photo, mask, "a cat")


def test_nothing_is_drawn_for_a_bad_prompt(hart: HartPipeline, var: VarPipeline, picture: Tensor) -> None:
    with pytest.raises(InputError, match="is empty"):
        hart.inpaint(picture, HALF, " ")
    with pytest.raises(InputError, match="from 0 to 4"):
        var.inpaint(picture, HALF, 5)
    with pytest.raises(TypeError, match="nothing"):
        var.inpaint(picture, HALF, 1, nothing=1)
