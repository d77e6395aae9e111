"""The depth transformer, slot by slot over its cache, against running all slots again for each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hart_infer.errors import ConfigError
from hart_infer.models.vila_u.depth import DepthConfig, DepthTransformer

FP32 = 1e-5  # relative: the bound on fed data everywhere
EPS = 1e-5  # of every layer norm, vila-u.md
SIZES = {
    "num_slots": 4,
    "code_dim": 12,
    "hidden_size": 20,
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 3,
    "vocab_size": 40,
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(*, scale: float = 0.3, **changes: int) -> DepthTransformer:
    """Random weights; a small `scale` makes the variances small, so that eps counts."""
    with torch.inference_mode(False):
        depth = DepthTransformer(DepthConfig(**{**SIZES, **changes})).eval().requires_grad_(False)
        random = torch.Generator().manual_seed(0)
        for name, parameter in depth.named_parameters():
            is_norm = "norm.weight" in name
            spread = 0.2 if is_norm or "classifier" in name else scale
            parameter.copy_(is_norm + spread * torch.randn(parameter.shape, generator=random))
    return depth


def given(depth: DepthTransformer, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Hidden states [R, H] and code vectors [R, D, C]."""
    random, config = torch.Generator().manual_seed(1), depth.config
    hidden = torch.randn(rows, config.hidden_size, generator=random)
    return hidden, torch.randn(rows, config.num_slots, config.code_dim, generator=random)


def step_through(depth: DepthTransformer, hidden: Tensor, vectors: Tensor) -> Tensor:
    """Logits [R, D, K], one slot at a time."""
    cache = depth.new_cache(len(hidden))
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # what isn't written isn't read
    logits = []
    for slot in range(depth.config.num_slots):
        x = depth.embed_codes(vectors[:, :slot].sum(1), slot) if slot else depth.embed_hidden(hidden)
        logits.append(depth.step(x, slot, cache))
    return torch.stack(logits, dim=1)


def rerun(
    depth: DepthTransformer, hidden: Tensor, vectors: Tensor, *, eps: float = EPS, head_eps: float = EPS,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Logits [R, D, K]: slot d from running slots 0..d anew, as released; plain, in `dtype`."""
    w = {name: tensor.to(dtype) for name, tensor in depth.state_dict().items()}
    heads = depth.config.num_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    logits = []
    for slot in range(depth.config.num_slots):
        first = linear(hidden.to(dtype)[:, None], "hidden_embed")
        x = torch.cat([first, linear(vectors.to(dtype)[:, :slot].cumsum(1), "code_embed")], dim=1) + w["slot_embed"][: slot + 1]
        for i in range(depth.config.num_layers):
            q, k, v = linear(norm(x, f"blocks.{i}.attn_norm", eps), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(torch.ones(slot + 1, slot + 1).triu(1).bool(), -torch.inf)
            x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
            wide = linear(norm(x, f"blocks.{i}.mlp_norm", eps), f"blocks.{i}.fc1")
            x = x + linear(0.5 * wide * (1 + torch.erf(wide / math.sqrt(2))), f"blocks.{i}.fc2")
        logits.append(linear(norm(x[:, -1], "norm", head_eps), "classifier"))
    return torch.stack(logits, dim=1)


def relative(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_cached_slots_are_rerun_ones(slots: int) -> None:
    depth = make(num_slots=slots)
    ours = step_through(depth, *given(depth))
    assert ours.dtype == torch.float32
    assert relative(ours, rerun(depth, *given(depth))) < FP32


def test_layer_norms_have_their_eps() -> None:
    """With small activations eps decides: 1e-6, the tower's, in the blocks or the classifier is far off."""
    depth = make(scale=1e-3)
    ours = step_through(depth, *given(depth))
    assert relative(ours, rerun(depth, *given(depth))) < FP32
    for other in ({"eps": 1e-6}, {"head_eps": 1e-6}):
        assert relative(rerun(depth, *given(depth), **other), rerun(depth, *given(depth))) > 10 * FP32


def test_a_position_does_not_see_the_one_before() -> None:
    depth = make()
    hidden, vectors = given(depth)
    cache = depth.new_cache(len(hidden))
    fresh = depth.step(depth.embed_hidden(hidden), 0, cache)
    for slot in range(1, depth.config.num_slots):
        depth.step(depth.embed_codes(vectors[:, slot], slot), slot, cache)
    assert torch.equal(depth.step(depth.embed_hidden(hidden), 0, cache), fresh)


def test_bf16_is_as_near_to_fp64_as_plain_pytorch_in_bf16() -> None:
    depth = make(num_slots=16).bfloat16()
    hidden, vectors = (x.bfloat16() for x in given(depth, rows=8))
    exact = rerun(depth, hidden, vectors)
    assert relative(step_through(depth, hidden, vectors), exact) < 2 * relative(
        rerun(depth, hidden, vectors, dtype=torch.bfloat16), exact
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "must split"),
        ({"num_slots": 0}, "num_slots must be positive"),
        ({"vocab_size": 2**30}, "vocab_size must be at most"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DepthConfig(**{**SIZES, **changes})
