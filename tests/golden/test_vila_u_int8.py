"""What the Llama's weights in int8 cost on the recorded data: hidden states of every position, fed the recorded codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hart_infer import VilaUPipeline
from hart_infer.engine.quantize import quantize_weights
from hart_infer.models.llama import Llama

from .test_vila_u_pipeline import FOLDERS, load, trace

pytestmark = pytest.mark.golden


@torch.no_grad()
def fed(pipe: VilaUPipeline, llama: Llama, prompt: str, codes: Tensor) -> Tensor:
    """The Llama's hidden states [T, H] that draw a picture's codes [T, D]."""
    ids = pipe.tokenizer.encode(prompt, kind="image")
    features = pipe.projector(pipe.vision_tower.embed(codes.long()))
    x = torch.cat([llama.embed_tokens(torch.tensor(ids)), features[:-1]])
    cache = llama.new_cache(rows=1, length=len(x))
    return llama(x[None], torch.arange(len(x))[None], cache.at(0, len(x)))[0, len(ids) - 1 :]


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS)
def test_hidden_states_are_two_percent_off_at_most_and_draws_one(folder: str) -> None:
    pipe, (tensors, said) = load(folder), trace(folder, "image")
    exact = fed(pipe, pipe.llama, said["prompt"], tensors["codes"][0])
    small = fed(pipe, quantize_weights(copy.deepcopy(pipe.llama), keep=("lm_head",)), said["prompt"], tensors["codes"][0])
    error = float((small - exact).norm() / exact.norm())
    assert 0.001 < error < 0.02  # 0.0150 and 0.0138
    depth = pipe.depth_transformer
    first, other = (depth.step(depth.embed_hidden(h), 0, depth.new_cache(len(h))).softmax(dim=-1) for h in (exact, small))
    assert float((first - other).abs().sum(dim=-1).mean() / 2) < 0.01  # total variation of the first code: 0.0081 and 0.0075
