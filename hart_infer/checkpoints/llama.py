"""Read transformers' `config.json` of a Llama or a Qwen2, and name its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..models.llama import LlamaConfig, linear_rope_factor
from ..models.parts.checks import require
from .configs import BOOKKEEPING, Keys, config_from_dict

_IGNORED = BOOKKEEPING | frozenset(
    "attention_dropout head_dim initializer_range max_position_embeddings rope_parameters rope_scaling use_cache".split()
)
LLAMA_KEYS = Keys(
    fixed={
        "model_type": ("llama",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (False,),
        "pretraining_tp": (1,),
    },
    ignored=_IGNORED | {"model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"},
)
QWEN2_KEYS = Keys(
    fixed={"model_type": ("qwen2",), "hidden_act": ("silu", "swish"), "use_sliding_window": (False,)},
    ignored=_IGNORED | {"layer_types", "max_window_layers", "sliding_window", "use_mrope"},
)


def read_decoder(
    values: Mapping[str, Any], keys: Keys, *, origin: str, qkv_bias: bool = False, strict: bool = False
) -> LlamaConfig:
    """Read a `config.json`, of any version of transformers, by LLAMA_KEYS or QWEN2_KEYS; null means absent.

    Raises ConfigError.
    """
    values = {key: value for key, value in values.items() if value is not None}
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    layers, first = values.get("num_hidden_layers"), values.get("max_window_layers")
    if "sliding_window" not in values or (isinstance(layers, int) and isinstance(first, int) and first >= layers):
        values.pop("use_sliding_window", None)  # no layer slides
    try:
        require(rope is None or isinstance(rope, dict), f"rope_scaling must be an object, not {rope!r}.")
        factor = linear_rope_factor(rope)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    heads = {"num_key_value_heads": values["num_attention_heads"]} if "num_attention_heads" in values else {}
    found = {"rope_factor": factor, "qkv_bias": qkv_bias}
    if rope and "rope_theta" in rope:  # of transformers 5, which takes it before one beside it
        found["rope_theta"] = rope["rope_theta"]
    config = config_from_dict(LlamaConfig, heads | values | found, keys, origin=origin, strict=strict)
    if values.get("head_dim", config.head_dim) != config.head_dim:
        raise ConfigError(
            f"{origin}: head_dim {values['head_dim']!r} is not hidden_size / num_attention_heads {config.head_dim}."
        )
    return config


def qwen2_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a text encoder, which transformers 4 and 5 read."""
    return {
        "architectures": ["Qwen2Model"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_factor == 1 else {"rope_type": "linear", "factor": config.rope_factor},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


_NAMES = (  # ours, transformers'; q, k and v apart
    ("attn_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attn.proj", "self_attn.o_proj"),
    *((f"attn.{x}", f"self_attn.{x}_proj") for x in "qkv"),
    *((f"mlp.{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
)


def decoder_rules(config: LlamaConfig, prefix: str) -> list[tuple[str, str]]:
    """Return the rules for the names of a decoder's tensors, which start with the pattern `prefix`."""
    layer = rf"{prefix}(layers\.\d+)\."
    merged = {f"attn.{x}": ("attn.qkv", f"[{i}]") for i, x in enumerate("qkv")} if config.is_merged else {}
    rules = [(rf"{prefix}(embed_tokens|norm)\.weight", r"\1.weight")]
    for ours, theirs in _NAMES:
        name, third = merged.get(ours, (ours, ""))
        rules.append((rf"{layer}{re.escape(theirs)}\.(weight|bias)", rf"\1.{name}.\2{third}"))
    return rules


def qwen2_name(name: str) -> str:
    """Return transformers' name of a text encoder's tensor, from ours."""
    found = re.fullmatch(r"(layers\.\d+)\.(.+)\.(weight|bias)", name)
    return f"{found[1]}.{dict(_NAMES)[found[2]]}.{found[3]}" if found else name
