"""VAR's transformer against the same maths written once more, plainly, in fp64: what the recorded data can't catch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer.checkpoints.var import RENAMES, config_from_tensors
from hart_infer.checkpoints.weights import load_module, tensor_shapes
from hart_infer.errors import ConfigError
from hart_infer.generation.schedule import Settings, var_schedule
from hart_infer.models.var import VarConfig, VarTransformer
from tests.golden.recorded_var import feed_transformer
from tests.released_var import CHANNELS, CLASSES, DEPTH, HEADS, SIDES, VOCABULARY, WIDTH, transformer_state

FP32 = 1e-5  # relative: the bound on fed data everywhere
Weights = dict[str, Tensor]
LABELS = torch.tensor([3, 0, CLASSES])  # the last is "no class"


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_logits(state: Weights, labels: Tensor, inputs: list[Tensor], eps: float = 1e-6) -> Tensor:
    """Logits [R, L, V] of all scales at once: no cache, a mask lets a position see its own scale and those before."""
    weights = {name: tensor.double() for name, tensor in state.items() if name != "lvl_1L"}
    levels = state["lvl_1L"][0]
    length = 1 + sum(latent.shape[-1] ** 2 for latent in inputs)
    condition = weights["class_emb.weight"][labels]
    parts = [(condition + weights["pos_start"][0])[:, None]]
    parts += [linear(latent.double().flatten(2).transpose(1, 2), weights, "word_embed") for latent in inputs]
    x = torch.cat(parts, dim=1) + weights["lvl_embed.weight"][levels[:length]] + weights["pos_1LC"][0, :length]
    unseen = levels[:length, None] < levels[None, :length]
    heads = weights["blocks.0.attn.scale_mul_1H11"].shape[1]
    shared = linear(F.silu(condition), weights, "shared_ada_lin.1") if "shared_ada_lin.1.weight" in weights else None
    for i in range(sum(name.endswith(".mat_qkv.weight") for name in weights)):
        block = f"blocks.{i}"
        if shared is None:
            vectors = linear(F.silu(condition), weights, f"{block}.ada_lin.1").unflatten(-1, (6, -1))
        else:
            vectors = weights[f"{block}.ada_gss"][0] + shared.unflatten(-1, (6, -1))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors[:, :, None].unbind(1)
        x = x + gamma1 * naive_attention(layer_norm(x, eps) * (1 + scale1) + shift1, unseen, weights, f"{block}.attn", heads)
        hidden = gelu_tanh(linear(layer_norm(x, eps) * (1 + scale2) + shift2, weights, f"{block}.ffn.fc1"))
        x = x + gamma2 * linear(hidden, weights, f"{block}.ffn.fc2")
    scale, shift = linear(F.silu(condition), weights, "head_nm.ada_lin.1").unflatten(-1, (2, -1))[:, :, None].unbind(1)
    return linear(layer_norm(x, eps) * (1 + scale) + shift, weights, "head")


def naive_attention(x: Tensor, unseen: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    q_bias, v_bias = weights[f"{name}.q_bias"], weights[f"{name}.v_bias"]
    qkv = F.linear(x, weights[f"{name}.mat_qkv.weight"], torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    q, k = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in (q, k))
    scores = (q * weights[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)).exp()) @ k.transpose(-1, -2)
    mixed = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1) @ v
    return linear(mixed.transpose(1, 2).flatten(2), weights, f"{name}.proj")


def latents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(len(LABELS), CHANNELS, side, side, generator=generator) for side in SIDES[1:]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def built(state: Weights, folder: Path, **changed: object) -> VarTransformer:
    """The module of a released file, its configuration changed where no file can say it."""
    file = folder / "var_test.pth"
    torch.save(state, file)
    config = replace(config_from_tensors(tensor_shapes(file), file), **changed)
    return load_module(
        lambda: VarTransformer(config, vocab_size=VOCABULARY, channels=CHANNELS), [file], RENAMES, dtype=torch.float32
    )


def logits(transformer: VarTransformer) -> Tensor:
    """All scales' logits, with the cache, as in a generation."""
    schedule = var_schedule(SIDES, share_quant_resi=4, settings=Settings())
    return torch.cat(feed_transformer(transformer, schedule, LABELS, latents()), dim=1)


def relative(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.double() - reference).abs().max() / reference.abs().max()).item()


def scaled(state: Weights, factor: float, *names: str) -> Weights:
    """The tensors whose names hold one of `names` times a factor, the rest unchanged."""
    return {key: tensor * factor if any(name in key for name in names) else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("shared", [False, True])
def test_logits_of_every_scale(folder: Path, shared: bool) -> None:
    state = transformer_state(shared=shared)
    assert relative(logits(built(state, folder)), naive_logits(state, LABELS, latents())) <= FP32


def test_what_a_released_file_implies(folder: Path) -> None:
    """Depth is counted, and not the number of heads, although it is in every released file."""
    transformer = built(transformer_state(), folder)
    assert HEADS != DEPTH
    assert transformer.config == VarConfig(
        patch_nums=SIDES, num_classes=CLASSES, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH, mlp_ratio=4.0, norm_eps=1e-6
    )
    assert (transformer.depth, transformer.num_heads, transformer.head_dim) == (DEPTH, HEADS, WIDTH // HEADS)


@pytest.mark.parametrize("log_scale", [math.log(100) - 1e-3, math.log(100), math.log(100) + 1, 50.0])
def test_log_scales_are_clamped_at_100(folder: Path, log_scale: float) -> None:
    state = transformer_state()
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.scale_mul_1H11"] = torch.full((1, HEADS, 1, 1), log_scale)
    transformer = built(state, folder)
    gains = transformer.blocks[0].attn.gains()
    torch.testing.assert_close(gains, torch.full((HEADS,), min(math.exp(log_scale), 100.0)), rtol=1e-5, atol=0)
    # The factor 100 in the exponent multiplies the rounding of the scores.
    assert relative(logits(transformer), naive_logits(state, LABELS, latents())) <= 100 * FP32


def test_no_lower_bound_of_log_scales(folder: Path) -> None:
    state = transformer_state()
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.scale_mul_1H11"] = torch.full((1, HEADS, 1, 1), -8.0)
    assert relative(logits(built(state, folder)), naive_logits(state, LABELS, latents())) <= FP32


@pytest.mark.parametrize("factor", [1e-9, 1e-12, 1e-14, 0.0])
def test_queries_and_keys_are_divided_by_at_least_1e_minus_12(folder: Path, factor: float) -> None:
    """Tiny ones still become unit vectors, tinier ones don't, and zeros stay zeros."""
    state = transformer_state()
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.mat_qkv.weight"][: 2 * WIDTH] *= factor
        state[f"blocks.{i}.attn.q_bias"] *= factor
    assert relative(logits(built(state, folder)), naive_logits(state, LABELS, latents())) <= FP32


def test_the_key_s_bias_is_not_read(folder: Path) -> None:
    """`zero_k_bias` is zero in every released file; here it is not."""
    state = transformer_state()
    assert all(state[f"blocks.{i}.attn.zero_k_bias"].any() for i in range(DEPTH))
    transformer = built(state, folder)
    for i, block in enumerate(transformer.blocks):
        q, k, v = block.attn.qkv.bias.chunk(3)
        assert torch.equal(q, state[f"blocks.{i}.attn.q_bias"])
        assert torch.equal(v, state[f"blocks.{i}.attn.v_bias"])
        assert not k.any()


def test_the_mlp_s_gelu_is_the_tanh_one(folder: Path) -> None:
    mlp = built(transformer_state(), folder).blocks[0].mlp
    x = torch.linspace(-4, 4, 64).view(2, WIDTH)
    exact = mlp.fc2(F.gelu(mlp.fc1(x)))
    expected = mlp.fc2(gelu_tanh(mlp.fc1(x).double()).float())
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    assert (mlp(x) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_norm_s_eps_is_the_configuration_s(folder: Path, eps: float) -> None:
    """Activations are so small that 1e-5 for 1e-6 would be another result."""
    names = ("class_emb", "pos_", "lvl_embed", "word_embed", "attn.proj", "ffn.fc2")
    state = scaled(transformer_state(), 1e-3, *names)
    transformer = built(state, folder, norm_eps=eps)
    ours = logits(transformer)
    assert relative(ours, naive_logits(state, LABELS, latents(), eps)) <= FP32
    assert relative(ours, naive_logits(state, LABELS, latents(), 10 * eps)) > 100 * FP32


def test_the_released_eps(folder: Path) -> None:
    assert built(transformer_state(), folder).config.norm_eps == 1e-6


def test_no_class_is_the_last_row(folder: Path) -> None:
    transformer = built(transformer_state(), folder)
    ours, expected = transformer.unconditional(), transformer.condition(torch.tensor([CLASSES]))
    assert torch.equal(ours.inputs, expected.inputs)
    assert torch.equal(ours.modulation.blocks, expected.modulation.blocks)
    assert not torch.equal(ours.inputs, transformer.condition(torch.tensor([CLASSES - 1])).inputs)


def test_the_shared_map_runs_once(folder: Path) -> None:
    """Not in every block, nor at every scale."""
    transformer, calls = built(transformer_state(shared=True), folder), []
    transformer.shared_modulation.register_forward_hook(lambda *_: calls.append(1))
    logits(transformer)
    assert calls == [1]


def test_a_class_does_not_depend_on_those_beside_it(folder: Path) -> None:
    transformer = built(transformer_state(), folder)
    together = transformer.condition(LABELS)
    for i, label in enumerate(LABELS):
        alone = transformer.condition(label[None])
        rows = slice(i * together.copies, (i + 1) * together.copies)
        assert torch.equal(together.inputs[rows], alone.inputs)
        assert torch.equal(together.modulation.blocks[:, rows], alone.modulation.blocks)
        assert torch.equal(together.modulation.head[rows], alone.modulation.head)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"patch_nums": (1,)}, "patch_nums must rise from 1"),
        ({"patch_nums": (2, 3)}, "patch_nums must rise from 1"),
        ({"patch_nums": (1, 3, 3)}, "patch_nums must rise from 1"),
        ({"patch_nums": tuple(range(1, 70))}, "at most 64 entries"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"num_classes": 2**21}, "num_classes must be at most"),
        ({"depth": 0}, "depth must be positive"),
        ({"num_heads": 3}, "must split into 3 heads"),
        ({"num_heads": 16}, "heads of a multiple of 4"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(changed: dict[str, object], words: str) -> None:
    good = VarConfig(patch_nums=SIDES, num_classes=CLASSES, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH)
    with pytest.raises(ConfigError, match=words):
        replace(good, **changed)
