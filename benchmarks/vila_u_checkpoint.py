"""VILA-U's sizes, and a checkpoint with random weights in the released layout.

    python benchmarks/vila_u_checkpoint.py OUT --layers 2 --dtype bf16

The widths are the released 256 px model's, as far as they are known: C, K, g, D and the decoder stand in a public copy of the
tower's configuration, E and the depth transformer's heads are the released code's defaults. What inference doesn't read is
left out, but for SigLIP's last layer. The vocabulary of the tokenizer is small, that of the Llama is not.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architecture import BRANCH_GAIN, AutoencoderPreset, Entry, conv, decoder_entries, linear, norm
from random_checkpoint import DTYPES, _generator, _write_folder, _write_json, default_cache, write_safetensors

from hart_infer.models.llama import LlamaConfig
from hart_infer.models.vila_u.depth import DepthConfig
from hart_infer.models.vila_u.siglip import SIGLIP_CONFIGS
from hart_infer.models.vila_u.vision import VisionConfig

SIGLIP = "google/siglip-large-patch16-256"
ADDED = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
CORPUS = ("A chat between a curious user and an artificial intelligence assistant.", "USER: What is it? ASSISTANT:")
DEPTH_WIDTH, DEPTH_HEADS, DEPTH_LAYERS, CODES = 2560, 40, 6, 16384


@dataclass(frozen=True)
class Sizes:
    """The configurations of all parts of a checkpoint."""

    llama: LlamaConfig
    vision: VisionConfig
    depth: DepthConfig


def released_sizes(*, layers: int = 32, slots: int = 4) -> Sizes:
    """The 256 px model with so many Llama layers and so many codes a position."""
    llama = LlamaConfig(
        vocab_size=32004,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-5,
        rope_factor=2.0,
    )
    vision = VisionConfig(**vars(SIGLIP_CONFIGS[SIGLIP]), n_embed=(CODES,), depth=slots)
    depth = DepthConfig(
        num_slots=slots,
        code_dim=vision.hidden_size,
        hidden_size=llama.hidden_size,
        embed_dim=DEPTH_WIDTH,
        num_layers=DEPTH_LAYERS,
        num_heads=DEPTH_HEADS,
        vocab_size=CODES,
    )
    return Sizes(llama, vision, depth)


def tiny_sizes() -> Sizes:
    """A model that is written and run in a second; 4 x 4 positions of two codes."""
    sizes = released_sizes(layers=2, slots=2)
    small = {"hidden_size": 64, "intermediate_size": 128}
    llama = replace(sizes.llama, **small, vocab_size=512, num_attention_heads=4, num_key_value_heads=4)
    vision = replace(
        sizes.vision, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16,
        patch_size=4, n_embed=(1024,), z_channels=32, ch=32, ch_mult=(1, 1, 2), attn_resolutions=(4,), resolution=16,
    )  # fmt: skip
    depth = replace(sizes.depth, code_dim=32, hidden_size=64, embed_dim=48, num_layers=2, num_heads=3, vocab_size=1024)
    return Sizes(llama, vision, depth)


# ---- tensors, by their released names


def llama_entries(c: LlamaConfig) -> Iterator[Entry]:
    """`llm/`."""
    d, keys = c.hidden_size, c.num_key_value_heads * c.head_dim
    yield Entry("model.embed_tokens.weight", (c.vocab_size, d), 1.0)
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield from norm(f"{layer}.input_layernorm", d)
        for name, rows in (("q", d), ("k", keys), ("v", keys)):
            yield from linear(f"{layer}.self_attn.{name}_proj", rows, d, bias=False)
        yield from linear(f"{layer}.self_attn.o_proj", d, d, gain=BRANCH_GAIN, bias=False)
        yield from norm(f"{layer}.post_attention_layernorm", d)
        yield from linear(f"{layer}.mlp.gate_proj", c.intermediate_size, d, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", c.intermediate_size, d, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", d, c.intermediate_size, gain=BRANCH_GAIN, bias=False)
    yield from norm("model.norm", d)
    yield from linear("lm_head", c.vocab_size, d, bias=False)


def projector_entries(sizes: Sizes) -> Iterator[Entry]:
    """`mm_projector/`, an `mlp2x_gelu`."""
    width = sizes.llama.hidden_size
    yield from linear("layers.0", width, sizes.vision.hidden_size)
    yield from linear("layers.2", width, width)


def siglip_entries(c: VisionConfig) -> Iterator[Entry]:
    """SigLIP's vision half, its last layer included, which is not read."""
    model, d = "rqvaesiglip.siglip_model.vision_model", c.hidden_size
    yield from conv(f"{model}.embeddings.patch_embedding", d, 3, c.patch_size)
    yield Entry(f"{model}.embeddings.position_embedding.weight", (c.grid**2, d), 0.5)
    for i in range(c.num_hidden_layers):
        layer = f"{model}.encoder.layers.{i}"
        yield from norm(f"{layer}.layer_norm1", d, bias=True)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from linear(f"{layer}.self_attn.{name}", d, d)
        yield from linear(f"{layer}.self_attn.out_proj", d, d, gain=BRANCH_GAIN)
        yield from norm(f"{layer}.layer_norm2", d, bias=True)
        yield from linear(f"{layer}.mlp.fc1", c.intermediate_size, d)
        yield from linear(f"{layer}.mlp.fc2", d, c.intermediate_size, gain=BRANCH_GAIN)


def pixel_decoder_entries(c: VisionConfig) -> Iterator[Entry]:
    """The decoder is the one of HART's autoencoder, with q, k and v apart."""
    yield from conv("rqvaesiglip.post_quant_conv", c.z_channels, c.hidden_size, 1)
    preset = AutoencoderPreset(patch_nums=(c.grid,), z_channels=c.z_channels, ch=c.ch, ch_mult=c.ch_mult)
    for entry in decoder_entries(preset):
        name = entry.name.replace("vae.", "rqvaesiglip.", 1)
        if ".qkv." in name:
            shape = (entry.shape[0] // 3, *entry.shape[1:])
            yield from (replace(entry, name=name.replace(".qkv.", f".{part}."), shape=shape) for part in "qkv")
        else:
            yield replace(entry, name=name)


def depth_entries(c: DepthConfig) -> Iterator[Entry]:
    """The depth transformer."""
    at, width = "rqtransformer", c.embed_dim
    yield from linear(f"{at}.in_mlp_1", width, c.code_dim)
    yield from linear(f"{at}.in_mlp_2", width, c.hidden_size)
    yield Entry(f"{at}.pos_emb_d", (1, c.num_slots, width), 0.5)
    for i in range(c.num_layers):
        block = f"{at}.head_transformer.blocks.{i}"
        yield from norm(f"{block}.ln1", width, bias=True)
        for name in ("query", "key", "value"):
            yield from linear(f"{block}.attn.{name}", width, width)
        yield from linear(f"{block}.attn.proj", width, width, gain=BRANCH_GAIN)
        yield from norm(f"{block}.ln2", width, bias=True)
        yield from linear(f"{block}.mlp.0", 4 * width, width)
        yield from linear(f"{block}.mlp.2", width, 4 * width, gain=BRANCH_GAIN)
    yield from norm(f"{at}.classifier_mlp.layer_norm", width, bias=True)
    yield from linear(f"{at}.classifier_mlp.linear", c.vocab_size, width)


def tower_entries(sizes: Sizes) -> Iterator[Entry]:
    """`vision_tower/`: SigLIP, one codebook for all depths, the decoder and the depth transformer."""
    vision = sizes.vision
    yield from siglip_entries(vision)
    yield Entry("rqvaesiglip.quantizer.codebooks.0.weight", (vision.n_embed[0] + 1, vision.hidden_size), 0.5)
    yield from pixel_decoder_entries(vision)
    yield from depth_entries(sizes.depth)


# ---- files


def llama_config(c: LlamaConfig) -> dict[str, Any]:
    """`llm/config.json`."""
    known = {name: value for name, value in vars(c).items() if name != "rope_factor"}
    scaling = {"rope_scaling": {"type": "linear", "factor": c.rope_factor}}
    return {"model_type": "llama", "hidden_act": "silu", **known, **scaling, "tokenizer_model_max_length": 8192}


def tower_config(sizes: Sizes) -> dict[str, Any]:
    """`vision_tower/config.json`; `pretrained_model` is the released one, or a folder beside it."""
    vision, depth = sizes.vision, sizes.depth
    decoder = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
    return {
        "model_type": "rqvaesigliptransformer_model",
        "hidden_size": vision.hidden_size,
        "rqvaesiglip": {
            "bottleneck_type": "rq",
            "embed_dim": vision.hidden_size,
            "n_embed": vision.n_embed[0],
            "latent_shape": [vision.grid, vision.grid, vision.hidden_size],
            "code_shape": list(vision.code_shape),
            "shared_codebook": True,
            "pretrained_model": SIGLIP if siglip_config(vision) == vars(SIGLIP_CONFIGS[SIGLIP]) else "siglip",
            "ddconfig": {**{name: getattr(vision, name) for name in decoder}, "out_ch": 3, "double_z": False, "in_channels": 3},
        },
        "rqtransformer": {
            "block_size": list(vision.code_shape),
            "input_embed_dim_1": depth.code_dim,
            "input_embed_dim_2": depth.hidden_size,
            "embed_dim": depth.embed_dim,
            "vocab_size": depth.vocab_size,
            "head": {"n_layer": depth.num_layers, "block": {"n_head": depth.num_heads}},
        },
    }


def siglip_config(c: VisionConfig) -> dict[str, Any]:
    """What of the tower's sizes is SigLIP's."""
    return {name: getattr(c, name) for name in vars(SIGLIP_CONFIGS[SIGLIP])}


def root_config(sizes: Sizes) -> dict[str, Any]:
    """`config.json`."""
    widths = {"hidden_size": sizes.llama.hidden_size, "mm_hidden_size": sizes.vision.hidden_size}
    flags = {"mm_use_im_start_end": True, "mm_use_vi_start_end": True, "mm_use_im_patch_token": False}
    return {"model_type": "vila_u_llama", **widths, "image_aspect_ratio": "resize", "num_video_frames": 8, **flags}


def tokenizer_model() -> bytes:
    """A SentencePiece model with byte fallback, of a few hundred tokens."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _fill(folder: Path, sizes: Sizes, dtype: torch.dtype, seed: int) -> None:
    parts = {
        "llm": (llama_config(sizes.llama), llama_entries(sizes.llama)),
        "vision_tower": (tower_config(sizes), tower_entries(sizes)),
        "mm_projector": ({"model_type": "v2l_projector", "mm_projector_type": "mlp2x_gelu"}, projector_entries(sizes)),
    }
    for name, (config, entries) in parts.items():
        (folder / name).mkdir(parents=True)
        _write_json(folder / name / "config.json", config)
        write_safetensors(folder / name / "model.safetensors", entries, dtype, _generator(seed, name))
    _write_json(folder / "config.json", root_config(sizes))
    first = sizes.llama.vocab_size - len(ADDED)
    _write_json(folder / "llm" / "added_tokens.json", {token: first + i for i, token in enumerate(ADDED)})
    (folder / "llm" / "tokenizer.model").write_bytes(tokenizer_model())
    if parts["vision_tower"][0]["rqvaesiglip"]["pretrained_model"] != SIGLIP:
        (folder / "vision_tower" / "siglip").mkdir()
        _write_json(folder / "vision_tower" / "siglip" / "config.json", {"vision_config": siglip_config(sizes.vision)})


def write_vila_u_checkpoint(out: Path, sizes: Sizes, *, dtype: str = "bf16", seed: int = 0, force: bool = False) -> Path:
    """Write a checkpoint's folder, whole or not at all; FileExistsError if it is there already and not `force`."""
    return _write_folder(out, partial(_fill, sizes=sizes, dtype=DTYPES[dtype], seed=seed), force)


def random_vila_u_checkpoint(layers: int, dtype: str, cache: Path) -> Path:
    """The cached checkpoint of full width and so many Llama layers, made if it isn't there; 0 layers: the tiny one."""
    path = cache / (f"random-vila-u-{layers}-layers-{dtype}" if layers else f"random-vila-u-tiny-{dtype}")
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        write_vila_u_checkpoint(path, released_sizes(layers=layers) if layers else tiny_sizes(), dtype=dtype)
    return path


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a VILA-U checkpoint with random weights in the released layout.")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=f"folder to make (default: in {default_cache()})")
    parser.add_argument("--layers", type=int, default=2, help="of the Llama; 0 makes a tiny model (default: 2)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored type (default: bf16)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    sizes = released_sizes(layers=args.layers) if args.layers else tiny_sizes()
    try:
        if args.out:
            path = write_vila_u_checkpoint(args.out, sizes, dtype=args.dtype, force=args.force)
        else:
            path = random_vila_u_checkpoint(args.layers, args.dtype, default_cache())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
