"""Random VAR checkpoints in the released layout: `var_<variant>.pth`, `vae_test.pth`. They need no recorded data."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from hart_infer.models.parts.autoencoder import Autoencoder, AutoencoderConfig
from tests.golden.data import golden

SIDES = (1, 2, 3, 4, 6, 8)
CLASSES, HEADS, DEPTH, WIDTH = 5, 2, 3, 32  # depth is not the number of heads, as it is in every released file
VOCABULARY, CHANNELS = 64, 4
PIXELS, CELL = 32, 4  # a side of a picture, and of a latent's cell
VAR_TINY_AUTOENCODER, VAR_TINY_SIDES = "vae_ch32v1024z8.pth", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SHARES = {4: "quantize.quant_resi.qresi_ls.{}", 1: "quantize.quant_resi.qresi", 0: "quantize.quant_resi.{}"}


def transformer_state(*, sides: tuple[int, ...] = SIDES, shared: bool = False, depth: int = DEPTH) -> dict[str, Tensor]:
    """A released transformer's tensors, random, by their released names; with dead buffers full of rubbish."""
    generator = torch.Generator().manual_seed(1)
    length = sum(side * side for side in sides)

    def rand(*shape: int, std: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def linear(name: str, width: int, out: int) -> dict[str, Tensor]:
        return {f"{name}.weight": rand(out, width, std=width**-0.5), f"{name}.bias": rand(out)}

    state = (
        linear("word_embed", CHANNELS, WIDTH)
        | linear("head", WIDTH, VOCABULARY)
        | linear("head_nm.ada_lin.1", WIDTH, 2 * WIDTH)
    )
    state |= {
        "pos_start": rand(1, 1, WIDTH),
        "pos_1LC": rand(1, length, WIDTH),
        "lvl_embed.weight": rand(len(sides), WIDTH),
        "class_emb.weight": rand(CLASSES + 1, WIDTH, std=1),
        "lvl_1L": torch.cat([torch.full((side * side,), i) for i, side in enumerate(sides)])[None],
        "attn_bias_for_masking": rand(1, 1, length, length),
    }
    if shared:
        state |= linear("shared_ada_lin.1", WIDTH, 6 * WIDTH)
    for i in range(depth):
        block = f"blocks.{i}"
        state |= linear(f"{block}.attn.proj", WIDTH, WIDTH) | linear(f"{block}.ffn.fc1", WIDTH, 4 * WIDTH)
        state |= linear(f"{block}.ffn.fc2", 4 * WIDTH, WIDTH)
        state[f"{block}.attn.mat_qkv.weight"] = rand(3 * WIDTH, WIDTH, std=WIDTH**-0.5)
        state |= {f"{block}.attn.{name}": rand(WIDTH) for name in ("q_bias", "v_bias", "zero_k_bias")}
        state[f"{block}.attn.scale_mul_1H11"] = math.log(4) + rand(1, HEADS, 1, 1)
        if shared:
            state[f"{block}.ada_gss"] = rand(1, 1, 6, WIDTH)
        else:
            state |= linear(f"{block}.ada_lin.1", WIDTH, 6 * WIDTH)
    return state


def autoencoder_state(
    *,
    share: int = 4,
    sides: tuple[int, ...] = SIDES,
    channels: int = CHANNELS,
    vocab_size: int = VOCABULARY,
    ch_mult: tuple[int, ...] = (1, 1, 1),
) -> dict[str, Tensor]:
    """A released autoencoder's tensors, random, by their released names; `share` convolutions phi, 0 for one per scale."""
    config = AutoencoderConfig(
        v_patch_nums=sides, vocab_size=vocab_size, z_channels=channels, ch=32, ch_mult=ch_mult, share_quant_resi=share
    )
    module, generator = Autoencoder(config), torch.Generator().manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
    nn.init.normal_(module.quantizer.codebook.weight, generator=generator)
    state = {_released(name, share): tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return state | {"quantize.ema_vocab_hit_SV": torch.ones(10, vocab_size)}  # of another number of scales


def _released(name: str, share: int) -> str:
    """The released name of an autoencoder's tensor."""
    rules = (
        (r"(.*)\.(down|up)_(\d+)_(block|attn)_(\d+)\.(.*)", r"\1.\2.\3.\4.\5.\6"),
        (r"(.*)\.(down|up)_(\d+)_(downsample|upsample)\.(.*)", r"\1.\2.\3.\4.\5"),
        (r"(.*)\.mid_(.*)", r"\1.mid.\2"),
        (r"quantizer\.codebook\.(.*)", r"quantize.embedding.\1"),
        (r"(.*)\.shortcut\.(.*)", r"\1.nin_shortcut.\2"),
        (r"(.*attn.*)\.proj\.(.*)", r"\1.proj_out.\2"),
    )
    for pattern, replacement in rules:
        name = re.sub(f"^{pattern}$", replacement, name)
    return re.sub(r"^quantizer\.phi\.(\d+)", lambda match: SHARES[share].format(match[1]), name)


def write_checkpoint(
    folder: Path,
    *,
    variant: str = "test",
    transformer: dict[str, Tensor] | None = None,
    autoencoder: dict[str, Tensor] | None = None,
) -> Path:
    """Write both pickles into a folder, the usual random ones unless given; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(transformer_state() if transformer is None else transformer, folder / f"var_{variant}.pth")
    torch.save(autoencoder_state() if autoencoder is None else autoencoder, folder / "vae_test.pth")
    return folder


def var_tiny(folder: Path) -> Path:
    """The golden `var-tiny`; where only its subset is, a copy in `folder` with a random autoencoder of the same shapes."""
    golden_folder = golden("var-tiny")
    if (golden_folder / VAR_TINY_AUTOENCODER).exists():
        return golden_folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(golden_folder / "var_d2.pth", folder)
    state = autoencoder_state(sides=VAR_TINY_SIDES, channels=8, vocab_size=1024, ch_mult=(1, 1, 2, 2, 4))
    torch.save(state, folder / VAR_TINY_AUTOENCODER)
    return folder
