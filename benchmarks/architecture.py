"""The shapes of HART's published architecture, and of a tiny one, as lists of stored tensors; VAR's: `architecture_var.py`.

Names and shapes are the released files'. How each tensor is drawn is chosen so that hidden states stay near 1 through 24
blocks, guided logits are of scale a few, and the decoder's pictures don't saturate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

_PIECE = 1 << 22  # elements drawn at a time
BRANCH_GAIN = 0.5  # on what a block adds to the residual stream


@dataclass(frozen=True, kw_only=True)
class AutoencoderPreset:
    """The shapes of an autoencoder; the defaults are the published ones, HART's and VAR's alike."""

    patch_nums: tuple[int, ...]
    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)

    @property
    def size(self) -> int:
        """Pixels along a side of the picture."""
        return self.patch_nums[-1] * 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class Preset(AutoencoderPreset):
    """The shapes of a HART checkpoint; the defaults are the published architecture."""

    context_token: int = 300
    context_dim: int = 1536
    embed_dim: int = 1536
    num_heads: int = 24
    depth: int = 24
    diff_width: int = 1024
    diff_depth: int = 6

    @property
    def mlp_dim(self) -> int:
        """SwiGLU's hidden width: two thirds of four times the width, rounded up to a multiple of 256."""
        return (self.embed_dim * 8 // 3 + 255) // 256 * 256


RELEASED_FLAGS = {
    "mlp_type": "llama",
    "disable_aln": True,
    "sep_aln_pooling_mode": "avg",
    "use_timestep_embed": True,
    "use_context_norm": True,
    "quantizer_type": "var_hybrid",
}
PRESETS = {
    "tiny": Preset(
        patch_nums=(1, 2, 3, 4, 6, 8),
        context_token=128,
        context_dim=64,
        embed_dim=128,
        num_heads=2,
        depth=4,
        diff_width=64,
        diff_depth=2,
        vocab_size=1024,
        z_channels=16,
        ch=32,
        ch_mult=(1, 1, 1, 2, 2),
    ),
    "256": Preset(patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "512": Preset(patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    "1024": Preset(patch_nums=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)),
}


def preset_config(preset: Preset, kind: type[Any]) -> Any:
    """A preset as a configuration of the package: `HartConfig`, with the released model's flags, or `AutoencoderConfig`."""
    known = {**vars(preset), "v_patch_nums": preset.patch_nums, **RELEASED_FLAGS}
    return kind(**{field.name: known[field.name] for field in fields(kind) if field.name in known})


@dataclass(frozen=True, kw_only=True)
class TextPreset:
    """The shapes of a Qwen2 text encoder; the defaults are the released 1.5 B parameters."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    vocab_size: int = 151936


@dataclass(frozen=True)
class Entry:
    """One stored tensor: normal draws around `mean`, or what `content` gives, a flat piece at a time."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    content: Callable[[], Iterator[torch.Tensor]] | None = None
    dtype: torch.dtype | None = None  # the checkpoint's, unless said

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def pieces(self, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """The values in order, flat."""
        if self.content is not None:
            yield from self.content()
            return
        for start in range(0, self.count, _PIECE):
            size = min(_PIECE, self.count - start)
            yield torch.randn(size, generator=generator).mul_(self.std).add_(self.mean)


def linear(name: str, out: int, width: int, *, gain: float = 1.0, bias: bool = True) -> Iterator[Entry]:
    """A linear layer that keeps the size of its input, times `gain`."""
    yield Entry(f"{name}.weight", (out, width), gain / math.sqrt(width))
    if bias:
        yield Entry(f"{name}.bias", (out,), 0.1 * gain)


def conv(name: str, out: int, width: int, side: int = 3, *, gain: float = 1.0) -> Iterator[Entry]:
    """A convolution that keeps the size of its input, times `gain`."""
    yield Entry(f"{name}.weight", (out, width, side, side), gain / math.sqrt(width * side * side))
    yield Entry(f"{name}.bias", (out,), 0.1 * gain)


def norm(name: str, width: int, *, bias: bool = False) -> Iterator[Entry]:
    """A norm's weight, and its bias where it has one."""
    yield Entry(f"{name}.weight", (width,), 0.1, 1.0)
    if bias:
        yield Entry(f"{name}.bias", (width,), 0.1)


def embedder(name: str, width: int) -> Iterator[Entry]:
    """Sinusoid of 256, Linear, SiLU, Linear: the level embedding's and the diffusion time's."""
    yield from linear(f"{name}.mlp.0", width, 256)
    yield from linear(f"{name}.mlp.2", width, width)


def transformer_entries(p: Preset) -> Iterator[Entry]:
    """`llm/model.safetensors` without its dead buffers."""
    d = p.embed_dim
    yield from norm("context_norm", p.context_dim)
    yield from linear("context_embed", d, p.context_dim)
    yield from linear("word_embed", d, p.z_channels)
    yield from embedder("lvl_embed", d)
    for i in range(p.depth):
        yield from norm(f"blocks.{i}.ln_wo_grad", d)
        yield Entry(f"blocks.{i}.attn.qkv_proj.weight", (3 * d, d), 1.0 / math.sqrt(d))
        yield Entry(f"blocks.{i}.attn.q_bias", (d,), 0.1)
        yield Entry(f"blocks.{i}.attn.v_bias", (d,), 0.1)
        yield from linear(f"blocks.{i}.attn.proj", d, d, gain=BRANCH_GAIN)
        yield from linear(f"blocks.{i}.ffn.gate_proj", p.mlp_dim, d, bias=False)
        yield from linear(f"blocks.{i}.ffn.up_proj", p.mlp_dim, d, bias=False)
        yield from linear(f"blocks.{i}.ffn.down_proj", d, p.mlp_dim, gain=BRANCH_GAIN, bias=False)
    yield from norm("head_nm.ln_wo_grad", d)
    yield from linear("head_nm.ada_lin.1", 2 * d, d, gain=0.1)
    yield from linear("head", p.vocab_size, d)
    yield from norm("decoder_norm", d)
    yield from diffusion_entries(p)


def diffusion_entries(p: Preset) -> Iterator[Entry]:
    """The residual diffusion's per-token MLP."""
    w, net = p.diff_width, "diffloss.net"
    yield from embedder(f"{net}.time_embed", w)
    yield from linear(f"{net}.cond_embed", w, p.embed_dim)
    yield from linear(f"{net}.input_proj", w, p.z_channels)
    for i in range(p.diff_depth):
        block = f"{net}.res_blocks.{i}"
        yield from norm(f"{block}.in_ln", w, bias=True)
        yield from linear(f"{block}.mlp.0", w, w)
        yield from linear(f"{block}.mlp.2", w, w)
        yield from linear(f"{block}.adaLN_modulation.1", 3 * w, w)
    yield from linear(f"{net}.final_layer.adaLN_modulation.1", 2 * w, w)
    yield from linear(f"{net}.final_layer.linear", 2 * p.z_channels, w)


def res_block(name: str, width: int, out: int) -> Iterator[Entry]:
    """GroupNorm, SiLU, convolution, twice, and a shortcut where the width changes."""
    yield from norm(f"{name}.norm1", width, bias=True)
    yield from conv(f"{name}.conv1", out, width)
    yield from norm(f"{name}.norm2", out, bias=True)
    yield from conv(f"{name}.conv2", out, out)
    if width != out:
        yield from conv(f"{name}.nin_shortcut", out, width, 1)


def attention(name: str, width: int) -> Iterator[Entry]:
    """The autoencoder's single-head attention."""
    yield from norm(f"{name}.norm", width, bias=True)
    yield from conv(f"{name}.qkv", 3 * width, width, 1)
    yield from conv(f"{name}.proj_out", width, width, 1)


def middle(name: str, width: int) -> Iterator[Entry]:
    """Block, attention, block at the lowest resolution."""
    yield from res_block(f"{name}.block_1", width, width)
    yield from attention(f"{name}.attn_1", width)
    yield from res_block(f"{name}.block_2", width, width)


def encoder_entries(p: AutoencoderPreset) -> Iterator[Entry]:
    """Two blocks a level, a strided convolution between levels, attention at the lowest."""
    widths = [p.ch * m for m in p.ch_mult]
    width = p.ch
    yield from conv("vae.encoder.conv_in", width, 3)
    for level, out in enumerate(widths):
        for i in range(2):
            yield from res_block(f"vae.encoder.down.{level}.block.{i}", width, out)
            width = out
            if level == len(widths) - 1:
                yield from attention(f"vae.encoder.down.{level}.attn.{i}", width)
        if level < len(widths) - 1:
            yield from conv(f"vae.encoder.down.{level}.downsample.conv", width, width)
    yield from middle("vae.encoder.mid", width)
    yield from norm("vae.encoder.norm_out", width, bias=True)
    yield from conv("vae.encoder.conv_out", p.z_channels, width)


def decoder_entries(p: AutoencoderPreset) -> Iterator[Entry]:
    """The encoder's mirror with three blocks a level; a last gain that leaves the picture room before it clips."""
    widths = [p.ch * m for m in p.ch_mult]
    width = widths[-1]
    yield from conv("vae.decoder.conv_in", width, p.z_channels)
    yield from middle("vae.decoder.mid", width)
    for level, out in reversed(list(enumerate(widths))):
        for i in range(3):
            yield from res_block(f"vae.decoder.up.{level}.block.{i}", width, out)
            width = out
            if level == len(widths) - 1:
                yield from attention(f"vae.decoder.up.{level}.attn.{i}", width)
        if level:
            yield from conv(f"vae.decoder.up.{level}.upsample.conv", width, width)
    yield from norm("vae.decoder.norm_out", width, bias=True)
    yield from conv("vae.decoder.conv_out", 3, width, gain=0.6)


def autoencoder_entries(p: AutoencoderPreset) -> Iterator[Entry]:
    """`tokenizer/model.safetensors` without its dead buffers and discriminator."""
    yield from encoder_entries(p)
    yield from conv("vae.quant_conv", p.z_channels, p.z_channels)
    yield Entry("vae.quantize.embedding.weight", (p.vocab_size, p.z_channels), 0.6)
    for i in range(4):
        yield from conv(f"vae.quantize.quant_resi.qresi_ls.{i}", p.z_channels, p.z_channels)
    yield from conv("vae.post_quant_conv", p.z_channels, p.z_channels)
    yield from decoder_entries(p)


def text_encoder_entries(t: TextPreset) -> Iterator[Entry]:
    """A bare Qwen2 model."""
    d, kv = t.hidden_size, t.hidden_size // t.num_attention_heads * t.num_key_value_heads
    yield Entry("embed_tokens.weight", (t.vocab_size, d), 1.0)
    for i in range(t.num_hidden_layers):
        layer = f"layers.{i}"
        yield from norm(f"{layer}.input_layernorm", d)
        yield from linear(f"{layer}.self_attn.q_proj", d, d)
        yield from linear(f"{layer}.self_attn.k_proj", kv, d)
        yield from linear(f"{layer}.self_attn.v_proj", kv, d)
        yield from linear(f"{layer}.self_attn.o_proj", d, d, gain=BRANCH_GAIN, bias=False)
        yield from norm(f"{layer}.post_attention_layernorm", d)
        yield from linear(f"{layer}.mlp.gate_proj", t.intermediate_size, d, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", t.intermediate_size, d, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", d, t.intermediate_size, gain=BRANCH_GAIN, bias=False)
    yield from norm("norm", d)


def dead_transformer_entries(p: Preset) -> Iterator[Entry]:
    """The buffers that the released file stores and inference never reads; the mask alone is 380 MB at 1024px."""
    levels = torch.cat(
        [torch.zeros(p.context_token, dtype=torch.int64)]
        + [torch.full((side * side,), i + 1) for i, side in enumerate(p.patch_nums[1:])]
    )
    yield Entry("lvl_1L", (1, len(levels)), content=lambda: iter([levels]), dtype=torch.int64)

    def mask() -> Iterator[torch.Tensor]:
        for level in levels:
            yield torch.zeros(len(levels)).masked_fill_(levels > level, -math.inf)

    yield Entry("attn_bias_for_masking", (1, 1, len(levels), len(levels)), content=mask)
    for i in range(p.depth):
        yield Entry(f"blocks.{i}.attn.zero_k_bias", (p.embed_dim,))


def dead_autoencoder_entries(p: Preset) -> Iterator[Entry]:
    """The code counts and the discriminator, stored beside the autoencoder and dropped at inference."""
    yield Entry("vae.quantize.ema_vocab_hit_SV", (len(p.patch_nums), p.vocab_size))
    widths = (3, 64, 128, 256, 512)
    for i, (width, out) in enumerate(zip(widths, widths[1:], strict=False)):
        main = f"disc.main.{(0, 2, 5, 8)[i]}"
        yield Entry(f"{main}.weight", (out, width, 4, 4), 0.02)
        if i == 0:
            yield Entry(f"{main}.bias", (out,), 0.02)
            continue
        batch_norm = f"disc.main.{(0, 3, 6, 9)[i]}"
        yield from norm(batch_norm, out, bias=True)
        yield Entry(f"{batch_norm}.running_mean", (out,))
        yield Entry(f"{batch_norm}.running_var", (out,), 0.0, 1.0)
        zero = torch.zeros(1, dtype=torch.int64)
        yield Entry(f"{batch_norm}.num_batches_tracked", (), content=lambda z=zero: iter([z]), dtype=torch.int64)
    yield Entry("disc.main.11.weight", (1, 512, 4, 4), 0.02)
    yield Entry("disc.main.11.bias", (1,), 0.02)


def parameter_counts(preset: Preset) -> dict[str, int]:
    """Parameters of the transformer, of the residual diffusion within it, and of the autoencoder."""
    return {
        "transformer": sum(e.count for e in transformer_entries(preset)),
        "diffusion": sum(e.count for e in diffusion_entries(preset)),
        "autoencoder": sum(e.count for e in autoencoder_entries(preset)),
    }


def text_preset(preset: Preset, kind: str) -> TextPreset:
    """The `full` 1.5 B encoder, or a `tiny` one as wide as the context."""
    if kind == "full":
        return TextPreset()
    heads = max(2, preset.context_dim // 128)
    return replace(
        TextPreset(),
        hidden_size=preset.context_dim,
        intermediate_size=2 * preset.context_dim,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=512,
    )
