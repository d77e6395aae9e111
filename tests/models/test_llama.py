"""The Llama against the same maths written once more, plainly, in fp64: cache, padding, groups, scaled positions, bf16."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer import ops
from hart_infer.errors import ConfigError
from hart_infer.models.llama import Llama, LlamaConfig, linear_rope_factor, prefill_mask, seen_mask
from hart_infer.models.vila_u.projector import Projector, projector_layers

FP32 = 1e-5  # relative: the bound on fed data everywhere
SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
KINDS = {
    "plain": {},
    "scaled": {"rope_factor": 2.0, "rms_norm_eps": 1e-5},
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1, "rope_theta": 5e5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(kind: str = "plain", seed: int = 0) -> Llama:
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        llama = Llama(LlamaConfig(**{**SIZES, **KINDS[kind]})).eval().requires_grad_(False)
        for name, parameter in llama.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return llama


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def naive(llama: Llama, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hidden states [L, H] of one row without a cache, from inputs [L, H]; every step in `dtype`."""
    config, length = llama.config, len(x)
    weights = {name: tensor.to(dtype) for name, tensor in llama.state_dict().items()}
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs = torch.arange(0, d, 2, dtype=torch.float64) / d
    angles = torch.arange(length, dtype=torch.float64)[:, None] / config.rope_factor * config.rope_theta**-pairs
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [L, d/2]

    def norm(x: Tensor, name: str) -> Tensor:
        wide = x if dtype == torch.float64 else x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()).to(dtype) * weights[name]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = x.to(dtype)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        normed = norm(x, f"{layer}.attn_norm.weight")
        if not config.is_merged:
            parts = [normed @ weights[f"{layer}.attn.{part}.weight"].T for part in "qkv"]
        else:
            parts = list((normed @ weights[f"{layer}.attn.qkv.weight"].T).chunk(3, dim=-1))
        q, k, v = (part.view(length, -1, d).transpose(0, 1) for part in parts)
        q, k = rotate(q), rotate(k).repeat_interleave(heads // groups, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = scores.softmax(-1) @ v.repeat_interleave(heads // groups, 0)
        x = x + mixed.transpose(0, 1).reshape(length, -1) @ weights[f"{layer}.attn.proj.weight"].T
        normed = norm(x, f"{layer}.mlp_norm.weight")
        gate, up = (normed @ weights[f"{layer}.mlp.{part}.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{layer}.mlp.down.weight"].T
    return norm(x, "norm.weight")


def run(llama: Llama, x: Tensor, *pieces: int) -> Tensor:
    """Hidden states [R, L, H] of rows without padding, run in pieces of so many positions."""
    rows, length, _ = x.shape
    cache, outputs, offset = llama.new_cache(rows=rows, length=length), [], 0
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # what isn't written isn't read
    for piece in pieces:
        positions = torch.arange(offset, offset + piece).expand(rows, -1)
        outputs.append(llama(x[:, offset : offset + piece], positions, cache.at(offset, piece)))
        offset += piece
    return torch.cat(outputs, dim=1)


@every_kind
@pytest.mark.parametrize("pieces", [(9,), (6, 1, 1, 1), (1,) * 9, (3, 4, 2)])
def test_hidden_states_are_the_naive_ones_however_they_are_cached(kind: str, pieces: tuple[int, ...]) -> None:
    llama, x = make(kind), inputs(2, 9)
    expected = torch.stack([naive(llama, row) for row in x])
    assert relative(run(llama, x, *pieces), expected) < FP32


@every_kind
def test_bf16_is_as_near_to_fp64_as_plain_pytorch_in_bf16(kind: str) -> None:
    llama, x = make(kind).bfloat16(), inputs(1, 40).bfloat16()
    exact = naive(llama, x[0])
    ours = relative(run(llama, x, 30, *(1,) * 10)[0], exact)
    assert ours < 2 * relative(naive(llama, x[0], torch.bfloat16), exact)


@every_kind
def test_a_row_with_padding_is_that_row_alone(kind: str) -> None:
    """Whatever the padding holds; its own hidden states are finite."""
    llama, padding, length = make(kind), torch.tensor([0, 3, 5]), 8
    x = inputs(3, length + 2)
    alone = [run(llama, row[None, int(pad) :], length - int(pad), 1, 1)[0] for row, pad in zip(x, padding, strict=True)]
    for row, pad in zip(x, padding, strict=True):
        row[: int(pad)] = 1e3
    cache = llama.new_cache(rows=3, length=length + 2)
    positions = (torch.arange(length + 2) - padding[:, None]).clamp(min=0)
    hidden = [llama(x[:, :length], positions[:, :length], cache.at(0, length), prefill_mask(padding, length))]
    for place in (length, length + 1):
        seen = seen_mask(padding, length + 2)[..., : place + 1]
        hidden.append(llama(x[:, place : place + 1], positions[:, place : place + 1], cache.at(place, 1), seen))
    together = torch.cat(hidden, dim=1)
    assert together.isfinite().all()
    for row, expected, pad in zip(together, alone, padding, strict=True):
        assert relative(row[int(pad) :], expected) < FP32


def test_the_mask_hides_padding_and_leaves_every_position_a_key() -> None:
    """On some devices a query without a key makes NaN, which the weight 0 keeps."""
    mask = prefill_mask(torch.tensor([0, 2]), 4)
    assert mask.any(-1).all()
    assert torch.equal(mask[0, 0], torch.ones(4, 4).tril().bool())
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_rows_write_to_their_part_of_the_cache_only() -> None:
    llama, x = make(), inputs(2, 4)
    cache = llama.new_cache(rows=4, length=6)
    cache.keys.fill_(7), cache.values.fill_(7)
    llama(x, torch.arange(4).expand(2, -1), cache.at(0, 4, rows=slice(0, 4, 2)))
    assert (cache.keys[:, 1::2] == 7).all() and (cache.keys[:, :, :, 4:] == 7).all()
    assert (cache.keys[:, ::2, :, :4] != 7).any()


def test_logits_are_fp32() -> None:
    llama = make().bfloat16()
    hidden = inputs(1, 2).bfloat16()
    logits = llama.logits(hidden)
    assert logits.dtype == torch.float32 and logits.shape == (1, 2, SIZES["vocab_size"])
    assert torch.equal(logits, (hidden @ llama.lm_head.weight.T).float())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("length", "keys"), [(1, 7), (7, 7), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_is_the_naive_one(heads: int, groups: int, length: int, keys: int, masked: bool) -> None:
    random = torch.Generator().manual_seed(3)
    q = torch.randn(2, heads, length, 8, generator=random)
    k, v = torch.randn(2, 2, groups, keys, 8, generator=random).unbind(0)
    before = torch.ones(length, keys).tril(keys - length).bool()
    mask = before & (torch.arange(keys) >= torch.tensor([0, 4])[:, None])[:, None, None] if masked else None
    if masked:
        mask[..., keys - length :] |= torch.eye(length, dtype=torch.bool)
    shared = [x.double().repeat_interleave(heads // groups, 1) for x in (k, v)]
    scores = (q.double() @ shared[0].transpose(2, 3) * 0.3).masked_fill(~(before if mask is None else mask), -torch.inf)
    expected = (scores.softmax(-1) @ shared[1]).transpose(1, 2).flatten(2)
    assert relative(ops.causal_attention(q, k, v, scale=0.3, mask=mask), expected) < FP32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "must split"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "even width"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"hidden_size": 2**20}, "hidden_size must be at most"),
        ({"rope_factor": -1.0}, "rope_factor must be positive"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LlamaConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (None, 1.0),
        ({"type": "linear", "factor": 2}, 2.0),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, 4.0),
        ({"rope_type": "default", "rope_theta": 10000.0}, 1.0),
    ],
)
def test_linear_scaling_is_read(scaling: dict[str, object] | None, factor: float) -> None:
    assert linear_rope_factor(scaling) == factor


@pytest.mark.parametrize(
    "scaling",
    [{"type": "dynamic", "factor": 2.0}, {"rope_type": "llama3"}, {"type": "linear"}, {"type": "linear", "factor": "2"}],
)
def test_other_scaling_is_refused(scaling: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="rope_scaling"):
        linear_rope_factor(scaling)


@pytest.mark.parametrize(("kind", "layers"), [("identity", 0), ("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_the_projector_s_layers(kind: str, layers: int) -> None:
    projector, x = Projector(kind, code_dim=6, hidden_size=6 if layers == 0 else 8), torch.randn(2, 3, 6)
    expected = x
    for index, layer in enumerate(projector.layers):
        if index:
            expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
        expected = expected @ layer.weight.T + layer.bias
    assert len(projector.layers) == projector_layers(kind) == layers
    assert torch.allclose(projector(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp99x_gelu", "mlp2x_gelu_fix", "mlp_downsample", ""])
def test_other_projectors_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="mm_projector_type"):
        Projector(kind, code_dim=6, hidden_size=6)


def test_an_identity_of_two_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size 8"):
        Projector("identity", code_dim=6, hidden_size=8)
