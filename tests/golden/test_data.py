"""The subset in the repository is what it says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .data import FULL, SUBSET

pytestmark = pytest.mark.golden

FILES = sorted(path.relative_to(SUBSET).as_posix() for path in SUBSET.glob("*/**/*") if path.is_file())
VAR_PICTURES = {"image", "reconstruction"}
THINNED = {  # what is left out of a file of tensors
    "hart-tiny/trace-smooth.safetensors": {"scale4.logits", "scale5.logits"},
    "var-tiny/var_d2.pth": {"attn_bias_for_masking"},
    "var-tiny/trace-tokenizer.safetensors": VAR_PICTURES,
    "var-tiny/trace-hard.safetensors": VAR_PICTURES,
    "var-tiny/trace-edit-in.safetensors": VAR_PICTURES,
    "var-tiny/trace-edit-out.safetensors": VAR_PICTURES,
    "var-tiny/trace-smooth.safetensors": VAR_PICTURES
    | {f"scale{scale}.{key}" for scale in range(10) for key in ("guided_logits", "positions")},
}
QUANTIZER, AUTOENCODER = "var-tiny/quantizer.safetensors", "var-tiny/vae_ch32v1024z8.pth"  # a part, of which whole


def load(file):
    return torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(file)


def test_it_is_small():
    assert sum((SUBSET / name).stat().st_size for name in FILES) <= 25e6


@pytest.mark.parametrize("name", FILES)
def test_it_is_part_of_the_whole(name):
    if not FULL.is_dir():
        pytest.skip("the full golden set is not beside this checkout")
    if name == QUANTIZER:
        part, whole = load_file(SUBSET / name), load(FULL / AUTOENCODER)
        left_out = {key for key in whole if not key.startswith("quantize.") or key.endswith("ema_vocab_hit_SV")}
    elif name in THINNED:
        part, whole, left_out = load(SUBSET / name), load(FULL / name), THINNED[name]
    else:
        assert (SUBSET / name).read_bytes() == (FULL / name).read_bytes()
        return
    assert set(whole) - set(part) == left_out & set(whole)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in part.items())
