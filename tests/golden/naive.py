"""The same maths once more, the straightforward way: plain PyTorch on the released tensors, in any dtype, fp64 included.

Written from the paper and the released behaviour, sharing nothing with hart_infer. It is the yardstick for bf16 and fp16:
what eager PyTorch loses in a dtype, hart_infer may lose at most twice. In fp64 it says how exact the recording is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = at_least_fp32(x)
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


def embed_number(number: float, weights: Weights, name: str) -> Tensor:
    dtype = weights[f"{name}.0.weight"].dtype
    angles = number * torch.exp(-math.log(10000) * at_least_fp32(torch.arange(128).to(dtype)) / 128)
    features = torch.cat([angles.cos(), angles.sin()]).to(dtype)
    return linear(F.silu(linear(features, weights, f"{name}.0")), weights, f"{name}.2")


# --- transformer -----------------------------------------------------------------------------------------------------


def angles_1d(positions: Tensor, dim: int) -> Tensor:
    """[R, T] -> [R, T, d]."""
    one = positions[..., None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([one, one], dim=-1)


def angles_2d(side: int, last_side: int, shift: Tensor, dim: int) -> Tensor:
    """Rows, rows, columns, columns: [R, p * p, d]."""
    cells = torch.arange(side * side)
    frequencies = 10000 ** (-torch.arange(0, dim, 4) / dim)
    row = (cells // side / side * last_side + shift[:, None])[..., None] * frequencies
    column = (cells % side / side * last_side + shift[:, None])[..., None] * frequencies
    return torch.cat([row, row, column, column], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [R, H, L, d]; cos and sin rounded to its dtype."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention(x: Tensor, angles: Tensor, past: list[Tensor], weights: Weights, name: str, heads: int) -> Tensor:
    """Attends to everything in `past` = [keys, values], which grows."""
    weight, q_bias, v_bias = (weights[f"{name}.{key}"] for key in ("qkv_proj.weight", "q_bias", "v_bias"))
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in F.linear(x, weight, bias).chunk(3, dim=-1))
    scale = 0.25 / math.sqrt(q.shape[-1])
    log_scale = weights.get(f"{name}.scale_mul_1H11")
    if log_scale is not None:
        q = F.normalize(q, dim=-1) * log_scale.clamp(max=math.log(100)).exp()
        k, scale = F.normalize(k, dim=-1), 1.0
    q, k = rotate(q, angles), rotate(k, angles)
    past[0], past[1] = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    mixed = (q @ past[0].transpose(-1, -2) * scale).softmax(dim=-1) @ past[1]
    return linear(mixed.transpose(1, 2).flatten(2), weights, f"{name}.proj")


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    if f"{name}.fc1.weight" in weights:
        return linear(F.gelu(linear(x, weights, f"{name}.fc1"), approximate="tanh"), weights, f"{name}.fc2")
    gated = F.silu(linear(x, weights, f"{name}.gate_proj")) * linear(x, weights, f"{name}.up_proj")
    return linear(gated, weights, f"{name}.down_proj")


def embed_context(weights: Weights, config, context: Tensor) -> Tensor:
    context = context.to(weights["context_embed.weight"].dtype)
    if config.use_context_norm:
        context = rms_norm(context, weights["context_norm.weight"], config.norm_eps)
    return linear(context, weights, "context_embed")


def pool(embedded: Tensor, mask: Tensor, config) -> Tensor:
    if config.sep_aln_pooling_mode == "max" and not config.shared_aln:
        return embedded.max(dim=1).values
    kept = mask.to(embedded.dtype)[..., None]
    return (embedded * kept / kept.sum(1, keepdim=True).clamp(min=1)).sum(1)


def hidden_states(
    weights: Weights, config, context: Tensor, mask: Tensor, positions: Tensor, inputs: list[Tensor]
) -> list[Tensor]:
    """Every scale's hidden states [2B, L, D]; `inputs` are those of scales 1, 2, ... [B, C, p, p]."""
    dtype, heads, dim = weights["word_embed.weight"].dtype, config.num_heads, config.head_dim

    def level(index: int) -> Tensor:
        table = weights.get("lvl_embed.weight")
        return embed_number(index, weights, "lvl_embed.mlp") if table is None else table[index]

    embedded = embed_context(weights, config, context)
    pooled = pool(embedded, mask, config)
    empty = torch.zeros(len(context), heads, 0, dim, dtype=dtype)
    past = [[empty, empty] for _ in range(config.depth)]
    result = []
    for index in range(len(inputs) + 1):
        if index == 0:
            x, angles = embedded + level(0), angles_1d(positions, dim)
        else:
            tokens = linear(inputs[index - 1].flatten(2).transpose(1, 2).to(dtype), weights, "word_embed")
            x = torch.cat([tokens, tokens]) + level(index)
            angles = angles_2d(config.patch_nums[index], config.patch_nums[-1], positions[:, -1], dim)
        for layer in range(config.depth):
            block = f"blocks.{layer}"
            scale_of_attention = shift_of_attention = scale_of_mlp = shift_of_mlp = 0.0
            attention_gate = mlp_gate = 1.0
            six = None
            if f"{block}.ada_lin.1.weight" in weights:
                six = linear(F.silu(pooled), weights, f"{block}.ada_lin.1").unflatten(1, (6, 1, -1))
            elif f"{block}.scale_shift_table" in weights:
                six = (weights[f"{block}.scale_shift_table"] + pooled[:, None])[:, :, None]
            if six is not None:
                attention_gate, mlp_gate, scale_of_attention, scale_of_mlp, shift_of_attention, shift_of_mlp = six.unbind(1)
            normed = rms_norm(x, weights[f"{block}.ln_wo_grad.weight"], config.norm_eps)
            normed = normed * (1 + scale_of_attention) + shift_of_attention
            x = x + attention_gate * attention(normed, angles, past[layer], weights, f"{block}.attn", heads)
            normed = rms_norm(x, weights[f"{block}.ln_wo_grad.weight"], config.norm_eps)
            x = x + mlp_gate * mlp(normed * (1 + scale_of_mlp) + shift_of_mlp, weights, f"{block}.ffn")
        result.append(x)
    return result


def logits(weights: Weights, config, hidden: Tensor, context: Tensor) -> Tensor:
    """Hidden states and contexts of the same rows [R, L, D], [R, T, width] -> [R, L, V]; the norm is not below fp32."""
    pooled = embed_context(weights, config, context).max(dim=1).values
    scale, shift = linear(F.silu(pooled), weights, "head_nm.ada_lin.1").unflatten(1, (2, 1, -1)).unbind(1)
    normed = rms_norm(at_least_fp32(hidden), weights["head_nm.ln_wo_grad.weight"], config.norm_eps) * (1 + scale) + shift
    return linear(normed.to(hidden.dtype), weights, "head")


# --- residual diffusion ----------------------------------------------------------------------------------------------


def predict(x: Tensor, condition: Tensor, timestep: int, weights: Weights) -> tuple[Tensor, Tensor]:
    """Noise and variance value, not rounded to a lower dtype than fp32."""
    name = "diffloss.net"
    y = F.silu(embed_number(timestep, weights, f"{name}.time_embed.mlp") + linear(condition, weights, f"{name}.cond_embed"))
    h = linear(x.to(condition.dtype), weights, f"{name}.input_proj")
    width, layer = h.shape[-1:], 0
    while f"{name}.res_blocks.{layer}.in_ln.weight" in weights:
        block = f"{name}.res_blocks.{layer}"
        shift, scale, gate = linear(y, weights, f"{block}.adaLN_modulation.1").chunk(3, dim=-1)
        normed = F.layer_norm(h, width, weights[f"{block}.in_ln.weight"], weights[f"{block}.in_ln.bias"], 1e-6)
        inner = F.silu(linear(normed * (1 + scale) + shift, weights, f"{block}.mlp.0"))
        h, layer = h + gate * linear(inner, weights, f"{block}.mlp.2"), layer + 1
    shift, scale = linear(y, weights, f"{name}.final_layer.adaLN_modulation.1").chunk(2, dim=-1)
    out = linear(F.layer_norm(h, width, eps=1e-6) * (1 + scale) + shift, weights, f"{name}.final_layer.linear")
    return at_least_fp32(out).chunk(2, dim=-1)


def residual(weights: Weights, condition: Tensor, guidance: float, start: Tensor, noises: list[Tensor]) -> Tensor:
    """Sample [B L, C] from condition [2B L, D], in eight steps whose noises are given, largest t first."""
    bars = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    alpha_bars = torch.tensor([1 - min(1 - bars[i + 1] / bars[i], 0.999) for i in range(1000)], dtype=torch.float64).cumprod(0)
    kept = [round(i * 999 / 7) for i in range(8)]
    now = alpha_bars[kept]
    before = torch.cat([now.new_ones(1), now[:-1]])
    beta = 1 - now / before
    variance = beta * (1 - before) / (1 - now)
    variance[0] = variance[1]
    condition = condition.to(weights["word_embed.weight"].dtype)
    x = start
    for i, noise in zip(reversed(range(8)), noises, strict=True):
        eps, value = predict(torch.cat([x, x]), condition, kept[i], weights)
        conditional, unconditional = eps.chunk(2)
        eps = (1 + guidance) * conditional - guidance * unconditional
        bar, previous, b = now[i].item(), before[i].item(), beta[i].item()
        x0 = (math.sqrt(1 / bar) * x - math.sqrt(1 / bar - 1) * eps).clamp(-1, 1)
        x = b * math.sqrt(previous) / (1 - bar) * x0 + (1 - previous) * math.sqrt(1 - b) / (1 - bar) * x
        if i > 0:
            share = (value[: len(x)] + 1) / 2
            x = x + (0.5 * (share * math.log(b) + (1 - share) * math.log(variance[i].item()))).exp() * noise
    return 0.6 * x


# --- decoder ---------------------------------------------------------------------------------------------------------


def conv(x: Tensor, weights: Weights, name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def normed(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def resnet_block(x: Tensor, weights: Weights, name: str) -> Tensor:
    h = conv(F.silu(normed(x, weights, f"{name}.norm1")), weights, f"{name}.conv1")
    h = conv(F.silu(normed(h, weights, f"{name}.norm2")), weights, f"{name}.conv2")
    shortcut = f"{name}.nin_shortcut"
    return h + (conv(x, weights, shortcut) if f"{shortcut}.weight" in weights else x)


def pixel_attention(x: Tensor, weights: Weights, name: str) -> Tensor:
    q, k, v = conv(normed(x, weights, f"{name}.norm"), weights, f"{name}.qkv").flatten(2).chunk(3, dim=1)  # [B, C, h w]
    attention_map = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=-1)
    return x + conv((v @ attention_map.transpose(1, 2)).view(x.shape), weights, f"{name}.proj_out")


def decode(weights: Weights, latent: Tensor) -> Tensor:
    """Latent [B, C, p, p] -> image in -1..1, fp32."""
    name = "vae.decoder"
    x = conv(
        conv(latent.to(weights["vae.post_quant_conv.weight"].dtype), weights, "vae.post_quant_conv"), weights, f"{name}.conv_in"
    )
    x = resnet_block(x, weights, f"{name}.mid.block_1")
    x = resnet_block(pixel_attention(x, weights, f"{name}.mid.attn_1"), weights, f"{name}.mid.block_2")
    levels = {int(key.split(".")[3]) for key in weights if key.startswith(f"{name}.up.")}
    for level in sorted(levels, reverse=True):
        for i in range(3):
            x = resnet_block(x, weights, f"{name}.up.{level}.block.{i}")
            if f"{name}.up.{level}.attn.{i}.qkv.weight" in weights:
                x = pixel_attention(x, weights, f"{name}.up.{level}.attn.{i}")
        if level > 0:
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"), weights, f"{name}.up.{level}.upsample.conv")
    return at_least_fp32(conv(F.silu(normed(x, weights, f"{name}.norm_out")), weights, f"{name}.conv_out")).clamp(-1, 1)
