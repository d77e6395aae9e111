"""Flags and quirks of the transformer that no single recorded number singles out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hart_infer.generation.next_scale import new_cache
from hart_infer.models.hart import HartConfig, HartTransformer
from hart_infer.models.next_scale import Condition

PLAIN = HartConfig(
    patch_nums=(1, 2, 3),
    context_token=6,
    context_dim=12,
    embed_dim=32,
    num_heads=2,
    depth=2,
    disable_aln=True,
    mlp_type="llama",
    use_timestep_embed=True,
    diff_width=16,
    diff_depth=1,
)
ADAPTIVE = replace(PLAIN, disable_aln=False)
SHARED = replace(PLAIN, shared_aln=True)


def build(config):
    torch.manual_seed(0)
    transformer = HartTransformer(config, vocab_size=32, channels=4).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.3)
    return transformer


@pytest.fixture
def context():
    return torch.randn(1, PLAIN.context_token, PLAIN.context_dim, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    return torch.tensor([[True, True, True, False, False, False]])


def condition(transformer, context, mask) -> Condition:
    return transformer.condition(context, mask, mask.long().cumsum(dim=1) - 1)


def run(transformer, context, mask, position_ids=None):
    """The condition, and the hidden states of its tokens, [R, T, D]."""
    positions = mask.long().cumsum(dim=1) - 1 if position_ids is None else position_ids
    given = transformer.condition(context, mask, positions)
    rows, length = given.inputs.shape[:2]
    place = new_cache(transformer, rows=rows, length=length).at(0, length)
    hidden = transformer(given.inputs, given.modulation, given.table, place)
    return given, hidden[:: given.copies]


def test_padding_is_attended_to(context, mask):
    """No mask at all: what stands at a padded position changes every other position."""
    transformer = build(PLAIN)
    _, hidden = run(transformer, context, mask)
    changed = context.clone()
    changed[:, -1] += 1
    _, other = run(transformer, changed, mask)
    assert ((hidden - other).abs().amax(dim=-1) > 1e-4).all()


def test_padding_is_only_a_matter_of_positions_in_a_plain_block(context, mask):
    """The mask itself does nothing where nothing pools: the same positions with another mask are the same numbers."""
    transformer = build(PLAIN)
    positions = mask.long().cumsum(dim=1) - 1
    hidden = [run(transformer, context, m, positions)[1] for m in (mask, torch.ones_like(mask))]
    assert hidden[0].equal(hidden[1])


@pytest.mark.parametrize("config", [PLAIN, ADAPTIVE, replace(ADAPTIVE, sep_aln_pooling_mode="avg"), SHARED])
def test_the_head_pools_the_maximum_padding_included(config, context, mask):
    transformer = build(config)
    context[:, -1] += 10
    given = condition(transformer, context, mask)
    embedded = transformer.embed_context(context.repeat(given.copies, 1, 1))
    expected = transformer.head.modulation(embedded.max(dim=1).values)
    for seen in (mask, torch.ones_like(mask)):
        assert condition(transformer, context, seen).modulation.head.equal(expected)


@pytest.mark.parametrize(("mode", "counts"), [("avg", False), ("max", True)])
def test_adaptive_blocks_pool_as_the_flag_says(mode, counts, context, mask):
    """A masked average, or a maximum over everything: whether what stands at a padded position counts."""
    transformer = build(replace(ADAPTIVE, sep_aln_pooling_mode=mode))
    changed = context.clone()
    changed[:, -1] += 10
    vectors, other = (condition(transformer, x, mask).modulation.blocks[0] for x in (context, changed))
    assert vectors.equal(other) != counts


def test_shared_adaptive_blocks_average_whatever_the_flag_says(context, mask):
    transformers = [build(replace(SHARED, sep_aln_pooling_mode=mode)) for mode in ("avg", "max")]
    average, flagged = (condition(transformer, context, mask).modulation.blocks[1] for transformer in transformers)
    assert average.equal(flagged)
    embedded = transformers[0].embed_context(context)
    expected = transformers[0].blocks[1].modulation.table + embedded[0, :3].mean(dim=0)
    torch.testing.assert_close(average[0], expected)


def test_an_empty_mask_averages_to_zero(context):
    """The sum of nothing is divided by at least one."""
    transformer = build(SHARED)
    nothing = torch.zeros(1, PLAIN.context_token, dtype=torch.bool)
    vectors = condition(transformer, context, nothing).modulation.blocks[0]
    assert vectors[:1].equal(transformer.blocks[0].modulation.table[None])


def test_both_sublayers_share_one_norm_with_a_weight():
    names = [name for name, _ in build(PLAIN).blocks[0].named_parameters() if "norm" in name]
    assert names == ["norm.weight"]


@pytest.mark.parametrize("log_scale", [math.log(100), 50.0])
def test_the_scale_of_normalised_queries_is_at_most_100(log_scale, context, mask):
    """Any larger learned logarithm counts as log 100."""
    transformer = build(replace(PLAIN, attn_l2_norm=True))
    limited = []
    for value in (math.log(100), log_scale):
        for block in transformer.blocks:
            block.attn.log_scale.fill_(value)
        limited.append(run(transformer, context, mask)[1])
    assert limited[0].equal(limited[1])


def test_softmax_scale():
    assert build(PLAIN).blocks[0].attn.scale == 0.25 / math.sqrt(PLAIN.head_dim)
    assert build(replace(PLAIN, attn_l2_norm=True)).blocks[0].attn.scale == 1


@pytest.mark.parametrize("config", [PLAIN, ADAPTIVE, SHARED])
def test_pooling_is_before_the_level_embedding(config, context, mask):
    transformer = build(config)
    before = condition(transformer, context, mask).modulation
    for parameter in transformer.level_embed.parameters():
        parameter.add_(1)
    after = condition(transformer, context, mask).modulation
    assert before.head.equal(after.head)
    assert before.blocks.equal(after.blocks)
    assert (before.blocks.numel() == 0) == (config == PLAIN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_normalises_in_fp32(dtype):
    """Half-precision hidden states are widened first; only the product with the codebook's matrix is in half precision."""
    head = build(PLAIN).head.to(dtype)
    hidden, pair = torch.randn(1, 20, PLAIN.embed_dim).to(dtype), torch.randn(1, 2, PLAIN.embed_dim).to(dtype)
    wide = hidden.float()
    normed = wide * (wide.square().mean(dim=-1, keepdim=True) + PLAIN.norm_eps).rsqrt() * head.norm.weight
    modulated = normed * (1 + pair[:, :1]) + pair[:, 1:]
    expected = torch.nn.functional.linear(modulated.to(dtype), head.linear.weight, head.linear.bias).float()
    logits = head(hidden, pair)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
