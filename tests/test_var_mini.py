"""var-mini, the class-conditional model in the package, end to end.

It knows its pictures by heart, whatever the seed: these tests hold loading, the scales and the decoder; sampling is held by
`golden` and by hart-mini. `python -m tests.test_var_mini` draws its references anew.
"""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from hart_infer import InputError, VarPipeline
from hart_infer.checkpoints.layouts import BUNDLED_VAR
from tests.reference_pictures import REFERENCES, SAME, near, pixels, psnr

SIDE = 128  # pixels
DRAWN = {"watermelon": 0, "sauropod": 1, "rocket": 2, "pineapple": 3}


def name_of(label: str) -> str:
    return f"var-mini-{label}.png"


@pytest.fixture(scope="module")
def mini() -> VarPipeline:
    pipe = VarPipeline.from_pretrained(torch_dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_the_default_and_needs_no_network(monkeypatch):
    def connect(*args):
        raise AssertionError("it went to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    pipe = VarPipeline.from_pretrained(device="cpu")
    assert pipe.name == BUNDLED_VAR and pipe.sizes == (SIDE,) and pipe.dtype == torch.bfloat16
    assert BUNDLED_VAR in pipe.describe()


@pytest.mark.parametrize("name", DRAWN)
def test_a_class_and_a_seed_draw_the_picture_they_drew(mini, name):
    """Rounding differs between CPUs and changes a few codes; a fault in a scale or in the decoder draws another picture."""
    drawn, number = (mini(label, seed=DRAWN[name]).images[0] for label in (name, mini.labels.index(name)))
    assert near(drawn, name_of(name)) > SAME
    assert drawn.tobytes() == number.tobytes()


def test_a_picture_without_its_last_scales_is_not_taken_for_the_same(mini):
    found = [near(mini(name, seed=seed, stop_after=10).images[0], name_of(name)) for name, seed in DRAWN.items()]
    assert max(found) < SAME, found


def test_seeds_change_some_codes(mini):
    """Of the last scale, where it is least sure."""
    drawn = [mini("slot machine", seed=seed, guidance_scale=0.0, top_p=0.0, output_type="pt").images for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_variant_is_refused_with_the_repository_that_has_it():
    with pytest.raises(
        InputError, match=r'name a repository that has: from_pretrained\("FoundationVision/var", variant=.d16.\)'
    ):
        VarPipeline.from_pretrained(variant="d16")


def test_classes_have_names(mini):
    assert len(mini.labels.names) == mini.transformer.config.num_classes > 400
    with pytest.raises(InputError, match="sauropod"):
        mini("sauropods")


def test_a_picture_does_not_depend_on_its_batch(mini):
    labels = ["watermelon", "rocket", 7]
    together = mini(labels, seed=11, output_type="pt").images
    alone = torch.cat([mini(label, seed=11 + i, output_type="pt").images for i, label in enumerate(labels)])
    assert torch.equal(together, alone)


def test_it_paints_what_a_mask_leaves_open(mini):
    picture = mini("pineapple", seed=3).images[0]
    edited = mini.inpaint(picture, (0.0, 0.5, 1.0, 1.0), "watermelon", seed=1).images[0]
    left, right = slice(0, SIDE // 2 - 16), slice(SIDE // 2 + 16, SIDE)
    assert np.abs(pixels(edited)[:, left].astype(int) - pixels(picture)[:, left]).max() <= 2
    assert psnr(pixels(edited)[:, right], pixels(picture)[:, right]) < 25


def test_it_is_small():
    from hart_infer.checkpoints.var import find_checkpoint

    found = find_checkpoint(BUNDLED_VAR)
    assert sum(file.stat().st_size for file in (*found.transformer_files, *found.autoencoder_files)) < 10e6


def _write_references() -> None:
    pipe = VarPipeline.from_pretrained(torch_dtype=torch.float32, device="cpu")
    for name, seed in DRAWN.items():
        pipe(name, seed=seed).images[0].save(REFERENCES / name_of(name))


if __name__ == "__main__":
    _write_references()
