"""The shapes of VAR's published architecture, and of a tiny one, as lists of stored tensors; as `architecture.py` for HART.

A model is chosen by its depth, as the released files are: 16, 20, 24 and 30 draw 256 px, 36 draws 512 px, and 2 is the tiny
one. The buffers that the released code wants to find in a file, and we do not read, are written too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from architecture import PRESETS, AutoencoderPreset, Entry, autoencoder_entries, linear

HEAD_DIM = 64
EMBEDDING_STD = 0.5  # of what is added to a token: its level's, its position's
MODULATION_GAIN = 0.5  # on gamma, scale and shift: about 0.3 for a class embedding near 1


@dataclass(frozen=True, kw_only=True)
class VarPreset(AutoencoderPreset):
    """The shapes of a VAR checkpoint; the defaults are the published architecture."""

    depth: int
    num_classes: int = 1000
    shared_aln: bool = False

    @property
    def embed_dim(self) -> int:
        """Width: as many heads of 64 as there are blocks."""
        return HEAD_DIM * self.depth

    @property
    def autoencoder_file(self) -> str:
        """The file's name as released, `vae_ch160v4096z32.pth` for the published shapes."""
        return f"vae_ch{self.ch}v{self.vocab_size}z{self.z_channels}.pth"


SIDES_256, SIDES_512 = PRESETS["256"].patch_nums, PRESETS["512"].patch_nums
VAR_PRESETS = {
    2: VarPreset(depth=2, patch_nums=SIDES_256, num_classes=10, vocab_size=1024, z_channels=8, ch=32),
    **{depth: VarPreset(depth=depth, patch_nums=SIDES_256) for depth in (16, 20, 24, 30)},
    36: VarPreset(depth=36, patch_nums=SIDES_512, shared_aln=True),
}


def var_transformer_entries(p: VarPreset) -> Iterator[Entry]:
    """`var_d*.pth`."""
    d, length = p.embed_dim, sum(side * side for side in p.patch_nums)
    yield Entry("pos_start", (1, 1, d), EMBEDDING_STD)
    yield Entry("pos_1LC", (1, length, d), EMBEDDING_STD)
    yield from _buffers(p)
    yield from linear("word_embed", d, p.z_channels)
    yield Entry("class_emb.weight", (p.num_classes + 1, d), 1.0)
    yield Entry("lvl_embed.weight", (len(p.patch_nums), d), EMBEDDING_STD)
    if p.shared_aln:
        yield from linear("shared_ada_lin.1", 6 * d, d, gain=MODULATION_GAIN)
    for i in range(p.depth):
        block = f"blocks.{i}"
        yield Entry(f"{block}.attn.scale_mul_1H11", (1, p.depth, 1, 1), 0.1, math.log(4))
        yield Entry(f"{block}.attn.q_bias", (d,), 0.1)
        yield Entry(f"{block}.attn.v_bias", (d,), 0.1)
        yield Entry(f"{block}.attn.zero_k_bias", (d,))
        yield Entry(f"{block}.attn.mat_qkv.weight", (3 * d, d), 1.0 / math.sqrt(d))
        yield from linear(f"{block}.attn.proj", d, d)
        yield from linear(f"{block}.ffn.fc1", 4 * d, d)
        yield from linear(f"{block}.ffn.fc2", d, 4 * d)
        if p.shared_aln:
            yield Entry(f"{block}.ada_gss", (1, 1, 6, d), 0.1)
        else:
            yield from linear(f"{block}.ada_lin.1", 6 * d, d, gain=MODULATION_GAIN)
    yield from linear("head_nm.ada_lin.1", 2 * d, d, gain=MODULATION_GAIN)
    yield from linear("head", p.vocab_size, d)


def _buffers(p: VarPreset) -> Iterator[Entry]:
    """Every position's level, from which a file's sides are read, and the mask of training."""
    levels = torch.cat([torch.full((side * side,), i) for i, side in enumerate(p.patch_nums)])
    yield Entry("lvl_1L", (1, len(levels)), content=lambda: iter([levels]), dtype=torch.int64)

    def mask() -> Iterator[torch.Tensor]:
        for level in levels:
            yield torch.zeros(len(levels)).masked_fill_(levels > level, -math.inf)

    yield Entry("attn_bias_for_masking", (1, 1, len(levels), len(levels)), content=mask)


def var_autoencoder_entries(p: VarPreset) -> Iterator[Entry]:
    """`vae_*.pth`: HART's autoencoder without the prefix, and the counts of codes."""
    for entry in autoencoder_entries(p):
        yield replace(entry, name=entry.name.removeprefix("vae."))
    yield Entry("quantize.ema_vocab_hit_SV", (len(p.patch_nums), p.vocab_size))


def var_parameter_counts(p: VarPreset) -> dict[str, int]:
    """Parameters of the transformer and of the autoencoder, without buffers."""
    buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
    parts = {"transformer": var_transformer_entries(p), "autoencoder": var_autoencoder_entries(p)}
    return {name: sum(e.count for e in entries if not e.name.endswith(buffers)) for name, entries in parts.items()}
