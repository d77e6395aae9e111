"""The subset in the repository is what it says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .data import FULL, SUBSET

pytestmark = pytest.mark.golden

FILES = sorted(path.relative_to(SUBSET).as_posix() for path in SUBSET.glob("*/**/*") if path.is_file())
THINNED = "hart-tiny/trace-smooth.safetensors"


def test_it_is_small():
    assert sum((SUBSET / name).stat().st_size for name in FILES) <= 20e6


@pytest.mark.parametrize("name", FILES)
def test_it_is_part_of_the_whole(name):
    if not FULL.is_dir():
        pytest.skip("the full golden set is not beside this checkout")
    if name != THINNED:
        assert (SUBSET / name).read_bytes() == (FULL / name).read_bytes()
        return
    part, whole = load_file(SUBSET / name), load_file(FULL / name)
    assert set(whole) - set(part) == {"scale4.logits", "scale5.logits"}
    assert all(torch.equal(tensor, whole[key]) for key, tensor in part.items())
