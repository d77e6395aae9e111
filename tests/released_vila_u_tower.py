"""Released VILA-U vision towers: names, configuration and weights, until `hart_infer.checkpoints` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hart_infer.checkpoints.autoencoder import AUTOENCODER_SUFFIXES, autoencoder_rules
from hart_infer.checkpoints.weights import RenameTable
from hart_infer.models.vila_u.vision import VisionConfig, VisionTower

VISION_MODEL = r"rqvaesiglip\.siglip_model\.vision_model"
LAYER = rf"{VISION_MODEL}\.encoder\.layers\.(\d+)"
RULES = (
    (rf"{VISION_MODEL}\.embeddings\.patch_embedding\.(.*)", r"encoder.patch_embed.\1"),
    (rf"{VISION_MODEL}\.embeddings\.position_embedding\.(.*)", r"encoder.position_embed.\1"),
    (rf"{LAYER}\.layer_norm([12])\.(.*)", r"encoder.layers.\1.norm\2.\3"),
    (rf"{LAYER}\.self_attn\.([qkv])_proj\.(.*)", r"encoder.layers.\1.attn.\2.\3"),
    (rf"{LAYER}\.self_attn\.out_proj\.(.*)", r"encoder.layers.\1.attn.proj.\2"),
    (rf"{LAYER}\.mlp\.(.*)", r"encoder.layers.\1.mlp.\2"),
    (r"rqvaesiglip\.(quantizer\.codebooks\.\d+\.weight)", r"\1"),
    (r"rqvaesiglip\.(post_quant_conv\..*)", r"\1"),
    *autoencoder_rules("rqvaesiglip."),
    (r"rqvaesiglip\.(decoder\.(?:conv_in|norm_out|conv_out)\..*)", r"\1"),
)
MERGED = (
    (r"(.*attn.*)\.q\.(weight|bias)", r"\1.qkv.\2[0]"),
    (r"(.*attn.*)\.k\.(weight|bias)", r"\1.qkv.\2[1]"),
    (r"(.*attn.*)\.v\.(weight|bias)", r"\1.qkv.\2[2]"),
)


def renames(config: VisionConfig) -> RenameTable:
    """The table of one tower: which layer is the last depends on its sizes, and which codebooks are copies on its kind."""
    dropped = [
        r"rqtransformer\..*",
        r"(rqvaesiglip\.)?(logit_scale|logit_bias)",
        r"rqvaesiglip\.siglip_model\.(text_model\..*|logit_scale|logit_bias)",
        rf"{VISION_MODEL}\.(head|post_layernorm)\..*",
        rf"{VISION_MODEL}\.encoder\.layers\.{config.num_hidden_layers - 1}\..*",
        r"rqvaesiglip\.quantizer\.codebooks\.\d+\.(cluster_size_ema|embed_ema)",
    ]
    if config.shared_codebook:
        dropped.append(r"rqvaesiglip\.quantizer\.codebooks\.[1-9]\d*\.weight")
    return RenameTable(RULES, then=(*MERGED, *AUTOENCODER_SUFFIXES), dropped="|".join(dropped))


def tower_state(stored: Mapping[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """The tensors that the tower reads, by our names, q, k and v merged."""
    rename, state, thirds = renames(config), {}, {}
    for name, tensor in stored.items():
        ours, _, part = (rename(name) or "").partition("[")
        if part:
            thirds.setdefault(ours, {})[int(part[0])] = tensor
        elif ours:
            state[ours] = tensor
    return state | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}


def tower_config(folder: Path) -> VisionConfig:
    """The configuration of a checkpoint's `vision_tower/`, whose `pretrained_model` is a folder in it."""
    released = json.loads((folder / "config.json").read_text())["rqvaesiglip"]
    siglip = json.loads((folder / released["pretrained_model"] / "config.json").read_text())["vision_config"]
    sizes = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"
    )  # fmt: skip
    decoder = {key: released["ddconfig"][key] for key in ("z_channels", "ch", "num_res_blocks", "resolution")}
    config = VisionConfig(
        **{key: siglip[key] for key in sizes},
        **decoder,
        n_embed=(released["n_embed"],),
        depth=released["code_shape"][-1],
        shared_codebook=released["shared_codebook"],
        decoder_latent_shape=tuple(released.get("decoder_latent_shape") or ()),
        ch_mult=tuple(released["ddconfig"]["ch_mult"]),
        attn_resolutions=tuple(released["ddconfig"]["attn_resolutions"]),
    )
    assert released["code_shape"] == list(config.code_shape)
    return config


@cache
def load_tower(folder: Path, dtype: torch.dtype = torch.float32) -> VisionTower:
    """The tower of a checkpoint's `vision_tower/`, strictly."""
    config = tower_config(folder)
    with torch.device("meta"):
        tower = VisionTower(config)
    state = {name: tensor.to(dtype) for name, tensor in tower_state(load_file(folder / "model.safetensors"), config).items()}
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval().requires_grad_(False)
