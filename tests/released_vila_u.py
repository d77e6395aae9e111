"""Make small VILA-U checkpoints with random weights in the released layout, names written out by hand."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CORPUS = ["a cat on a red sofa", "two  spaces and a newline", "What is the brand of the car? hello world USER: ASSISTANT:"]
WIDTH, HIDDEN, EMBED = 32, 48, 24  # C = H, E
GRID, DEPTH, CODES = 4, 3, 40
LLAMA_LAYERS, SIGLIP_LAYERS, DEPTH_LAYERS = 2, 3, 2
HEAD_DIM = 8

SIGLIP = {
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": SIGLIP_LAYERS,
        "num_attention_heads": 2,
        "image_size": 35,
        "patch_size": 8,
        "model_type": "siglip_vision_model",
    }
}


@cache
def tokenizer_model() -> bytes:
    """A BPE of bytes and some merges, as Llama's is made."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


@cache
def vocab_size() -> int:
    from sentencepiece import SentencePieceProcessor

    return int(SentencePieceProcessor(model_proto=tokenizer_model()).vocab_size()) + 4


def configs(*, key_heads: int = 4, shared: bool = True) -> dict[str, dict[str, Any]]:
    """The JSON files, by name."""
    return {
        "config.json": {
            "model_type": "vila_u_llama",
            "architectures": ["VILAULlamaModel"],
            "llm_cfg": {},
            "hidden_size": WIDTH,
            "mm_hidden_size": WIDTH,
            "image_aspect_ratio": "resize",
            "num_video_frames": 8,
            "mm_use_im_start_end": True,
            "mm_use_vi_start_end": True,
            "mm_use_im_patch_token": False,
            "model_dtype": "torch.bfloat16",
            "resume_path": None,
        },
        "llm/config.json": {
            "model_type": "llama",
            "vocab_size": vocab_size(),
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LLAMA_LAYERS,
            "num_attention_heads": WIDTH // HEAD_DIM,
            "num_key_value_heads": key_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "tokenizer_model_max_length": 600,
            "tokenizer_padding_side": "right",
        },
        "llm/generation_config.json": {
            "eos_token_id": 2,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "max_length": 99,
        },
        "llm/added_tokens.json": {
            token: vocab_size() - 4 + i for i, token in enumerate(("<im_start>", "<im_end>", "<vi_start>", "<vi_end>"))
        },
        "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": "mlp2x_gelu"},
        "vision_tower/siglip/config.json": SIGLIP,
        "vision_tower/config.json": {
            "model_type": "rqvaesigliptransformer_model",
            "hidden_size": WIDTH,
            "rqvaesiglip": {
                "embed_dim": WIDTH,
                "n_embed": CODES,
                "latent_shape": [GRID, GRID, WIDTH],
                "code_shape": [GRID, GRID, DEPTH],
                "shared_codebook": shared,
                "pretrained_model": "siglip",
                "bottleneck_type": "rq",
                "loss_type": "mse",
                "decoder_latent_shape": None,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": WIDTH,
                    "resolution": 8,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": [1, 2],
                    "num_res_blocks": 1,
                    "attn_resolutions": [4],
                    "dropout": 0.0,
                },
            },
            "rqtransformer": {
                "block_size": [GRID, GRID, DEPTH],
                "input_embed_dim_1": WIDTH,
                "input_embed_dim_2": WIDTH,
                "embed_dim": EMBED,
                "vocab_size": CODES,
                "head": {"n_layer": DEPTH_LAYERS, "block": {"n_head": 2}},
            },
        },
    }


def _both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def llama_shapes(*, key_heads: int = 4) -> dict[str, tuple[int, ...]]:
    """Tensors of `llm/`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size(), WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (vocab_size(), WIDTH),
    }
    for i in range(LLAMA_LAYERS):
        at = f"model.layers.{i}"
        for name, rows in (("q", WIDTH), ("k", key_heads * HEAD_DIM), ("v", key_heads * HEAD_DIM), ("o", WIDTH)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        shapes[f"{at}.self_attn.rotary_emb.inv_freq"] = (HEAD_DIM // 2,)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (HIDDEN, WIDTH)
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (WIDTH,)
    return shapes


def tower_shapes(*, shared: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensors of `vision_tower/`, those that are never read included."""
    siglip, at = "rqvaesiglip.siglip_model", "rqvaesiglip.siglip_model.vision_model"
    shapes = _both(f"{at}.embeddings.patch_embedding", WIDTH, 3, 8, 8)
    shapes[f"{at}.embeddings.position_embedding.weight"] = (GRID**2, WIDTH)
    for model, layers in ((at, SIGLIP_LAYERS), (f"{siglip}.text_model", 1)):
        for i in range(layers):
            layer = f"{model}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _both(f"{layer}.self_attn.{name}", WIDTH, WIDTH)
            shapes |= _both(f"{layer}.layer_norm1", WIDTH) | _both(f"{layer}.layer_norm2", WIDTH)
            shapes |= _both(f"{layer}.mlp.fc1", HIDDEN, WIDTH) | _both(f"{layer}.mlp.fc2", WIDTH, HIDDEN)
    shapes |= _both(f"{at}.post_layernorm", WIDTH) | {f"{at}.head.probe": (1, 1, WIDTH)}
    shapes |= {f"{siglip}.logit_scale": (1,), f"{siglip}.logit_bias": (1,), "rqvaesiglip.logit_scale": (1,)}
    for i in range(1 if shared else DEPTH):
        codebook = f"rqvaesiglip.quantizer.codebooks.{i}"
        shapes |= {f"{codebook}.weight": (CODES + 1, WIDTH), f"{codebook}.cluster_size_ema": (CODES,)}
        shapes[f"{codebook}.embed_ema"] = (CODES, WIDTH)
    return shapes | _both("rqvaesiglip.post_quant_conv", WIDTH, WIDTH, 1, 1) | _decoder_shapes() | _depth_shapes()


def _decoder_shapes() -> dict[str, tuple[int, ...]]:
    at, wide, narrow = "rqvaesiglip.decoder", 64, 32
    shapes = (
        _both(f"{at}.conv_in", wide, WIDTH, 3, 3) | _both(f"{at}.norm_out", narrow) | _both(f"{at}.conv_out", 3, narrow, 3, 3)
    )
    blocks = {"mid.block_1": (wide, wide), "mid.block_2": (wide, wide)}
    for level, (first, width) in enumerate(((wide, narrow), (wide, wide))):
        blocks |= {f"up.{level}.block.0": (first, width), f"up.{level}.block.1": (width, width)}
    for name, (before, after) in blocks.items():
        shapes |= _both(f"{at}.{name}.norm1", before) | _both(f"{at}.{name}.norm2", after)
        shapes |= _both(f"{at}.{name}.conv1", after, before, 3, 3) | _both(f"{at}.{name}.conv2", after, after, 3, 3)
        if before != after:
            shapes |= _both(f"{at}.{name}.nin_shortcut", after, before, 1, 1)
    for name in ("mid.attn_1", "up.1.attn.0", "up.1.attn.1"):
        shapes |= _both(f"{at}.{name}.norm", wide)
        for part in ("q", "k", "v", "proj_out"):
            shapes |= _both(f"{at}.{name}.{part}", wide, wide, 1, 1)
    return shapes | _both(f"{at}.up.1.upsample.conv", wide, wide, 3, 3)


def _depth_shapes() -> dict[str, tuple[int, ...]]:
    shapes = _both("rqtransformer.in_mlp_1", EMBED, WIDTH) | _both("rqtransformer.in_mlp_2", EMBED, WIDTH)
    shapes["rqtransformer.pos_emb_d"] = (1, DEPTH, EMBED)
    for i in range(DEPTH_LAYERS):
        block = f"rqtransformer.head_transformer.blocks.{i}"
        shapes |= _both(f"{block}.ln1", EMBED) | _both(f"{block}.ln2", EMBED)
        for name in ("query", "key", "value", "proj"):
            shapes |= _both(f"{block}.attn.{name}", EMBED, EMBED)
        shapes |= _both(f"{block}.mlp.0", 4 * EMBED, EMBED) | _both(f"{block}.mlp.2", EMBED, 4 * EMBED)
    shapes |= _both("rqtransformer.classifier_mlp.layer_norm", EMBED)
    return shapes | _both("rqtransformer.classifier_mlp.linear", CODES, EMBED)


def states(*, key_heads: int = 4, shared: bool = True) -> dict[str, dict[str, Tensor]]:
    """Random tensors of each part, by released name."""
    projector = _both("layers.0", WIDTH, WIDTH) | _both("layers.2", WIDTH, WIDTH)
    parts = {
        "llm": llama_shapes(key_heads=key_heads),
        "vision_tower": tower_shapes(shared=shared),
        "mm_projector": projector,
    }
    generator = torch.Generator().manual_seed(0)
    return {
        part: {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
        for part, shapes in parts.items()
    }


def write_checkpoint(folder: Path, *, key_heads: int = 4, shared: bool = True) -> Path:
    """Write a whole checkpoint, one safetensors file a part; return the folder."""
    for name, values in configs(key_heads=key_heads, shared=shared).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    for part, state in states(key_heads=key_heads, shared=shared).items():
        save_file(state, folder / part / "model.safetensors")
    (folder / "llm/tokenizer.model").write_bytes(tokenizer_model())
    return folder
