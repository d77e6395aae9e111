"""Llama-2 (arXiv:2307.09288, transformers' `LlamaForCausalLM`), VILA-U's reader and first half of its drawing; Qwen2
(arXiv:2407.10671, transformers' `Qwen2Model`), HART's text encoder, is one with biases in q, k and v."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from ..ops.held import without_cudnn_attention
from ..ops.rope import rope
from .parts.cache import KVCache, Place
from .parts.checks import require, require_positive
from .parts.layers import Embedding, Linear, RMSNorm, SwiGLU
from .parts.rope import Table


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The language model; field names as in its `config.json`, except `rope_factor`, read by `linear_rope_factor`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it
    qkv_bias: bool = False  # of Qwen2

    def __post_init__(self) -> None:
        """Raise ConfigError for heads that don't divide and sizes out of range."""
        require_positive(self, vocab_size=2**24, hidden_size=2**16, intermediate_size=2**20, num_hidden_layers=2**10)
        require_positive(self, num_attention_heads=2**12, num_key_value_heads=2**12)
        require_positive(self, rms_norm_eps=1, rope_theta=1e12, rope_factor=2**16)
        require(
            self.hidden_size % self.num_attention_heads == 0 and self.head_dim % 2 == 0,
            f"hidden_size {self.hidden_size} must split into {self.num_attention_heads} heads of an even width.",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
            f"{self.num_key_value_heads}.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_merged(self) -> bool:
        """Whether q, k and v are one matrix: of as many key heads as query heads, without biases."""
        return self.num_key_value_heads == self.num_attention_heads and not self.qkv_bias


def linear_rope_factor(scaling: Mapping[str, Any] | None) -> float:
    """Return the factor of a released `rope_scaling`, 1 for none. Raises ConfigError for any kind but `linear`."""
    if not scaling:
        return 1.0
    kind = scaling.get("rope_type", scaling.get("type"))  # transformers 4.43 renamed it
    if kind == "default" or (kind is None and "factor" not in scaling):
        return 1.0
    require(kind == "linear", f"rope_scaling of type {kind!r} is not supported; 'linear' is.")
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ConfigError(f"rope_scaling's factor must be a number from 1 on, not {factor!r}.")
    return float(factor)


def rotary_table(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Table:
    """Return cos, sin [R, 1, L, d] of positions [R, L]; computed in fp32, then rounded to `dtype`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = (positions.float() / config.rope_factor)[..., None] * (1.0 / config.rope_theta**exponents)  # [R, L, d/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module, ABC):
    """Self-attention with rotary positions over the key/value cache, softmax scale 1 / sqrt(d)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = 1 / math.sqrt(self.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    @abstractmethod
    def write(self, x: Tensor, table: Table, keys: Tensor, values: Tensor) -> Tensor:
        """Return rotated queries [R, H, L, d] of x [R, L, D], and write its rotated keys, and values, [R, G, L, d]."""

    def forward(self, x: Tensor, table: Table, place: Place, layer: int, mask: Tensor | None) -> Tensor:
        """x [R, L, D] -> [R, L, D]; `mask` as in `Decoder.forward`."""
        q = self.write(x, table, *place.slot(layer))
        keys, values = place.visible(layer)
        return self.proj(ops.causal_attention(q, keys, values, scale=self.scale, mask=mask))


class MergedAttention(Attention):
    """As many key heads as query heads; q, k and v in one matrix, rotated and cached by one kernel."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def write(self, x: Tensor, table: Table, keys: Tensor, values: Tensor) -> Tensor:
        """As `Attention.write`."""
        return ops.rope_cache(self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)), *table, keys, values)


class SplitAttention(Attention):
    """Fewer key heads than query heads, or biases; q, k and v have a matrix each."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        width, bias = self.num_key_heads * self.head_dim, config.qkv_bias
        self.q = Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k = Linear(config.hidden_size, width, bias=bias)
        self.v = Linear(config.hidden_size, width, bias=bias)

    def write(self, x: Tensor, table: Table, keys: Tensor, values: Tensor) -> Tensor:
        """As `Attention.write`."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        rope(k, *table, out=keys)
        values.copy_(v)
        return rope(q, *table)


class LlamaLayer(nn.Module):
    """Attention and SwiGLU, each after a norm of its own (released `LlamaDecoderLayer`)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = MergedAttention(config) if config.is_merged else SplitAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, update: Tensor | None, table: Table, place: Place, layer: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on x + update, [R, L, D] each; `update` is what the layer before left to add, if there is one.

        Returns the sum with attention's update, and the MLP's update, which is left to the next norm.
        """
        x, normed = self.attn_norm.after(x, update)
        x, normed = self.mlp_norm.after(x, self.attn(normed, table, place, layer, mask))
        return x, self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, layers and final norm (transformers' `LlamaModel`, `Qwen2Model`)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    def new_cache(self, *, rows: int, length: int) -> KVCache:
        """Allocate keys and values of `length` positions in each of `rows` rows."""
        return KVCache(
            depth=self.config.num_hidden_layers,
            rows=rows,
            num_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            length=length,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(self, hidden: Tensor, positions: Tensor, place: Place, mask: Tensor | None = None) -> Tensor:
        """Run inputs [R, L, D] at `positions` [R, L] through all layers -> hidden states [R, L, D] after the final norm.

        Keys and values are written to `place`, whose N = offset + L positions are attended to: causally, or where `mask`
        [R, 1, L, N] bool is True, which then has to be causal too. A query that it leaves no key attends to nothing.
        """
        table, update = rotary_table(positions, self.config, hidden.dtype), None
        with without_cudnn_attention(hidden.device):  # every position has another number of keys
            for index, layer in enumerate(self.layers):
                hidden, update = layer(hidden, update, table, place, index, mask)
        return self.norm.after(hidden, update)[1]


class Llama(Decoder):
    """Everything in a VILA-U checkpoint's `llm/`: a decoder, and the head that only text needs."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits over the text vocabulary [..., V] fp32; codes are not drawn from these."""
        return self.lm_head(hidden).float()


def seen_mask(padding: Tensor, length: int) -> Tensor:
    """Return [R, 1, 1, length] bool, False for each row's first `padding` [R] positions: what a later position attends to."""
    return (torch.arange(length, device=padding.device) >= padding[:, None])[:, None, None]


def prefill_mask(padding: Tensor, length: int) -> Tensor:
    """Return the mask [R, 1, L, L] bool of rows whose first `padding` [R] positions are padding, L: `length`.

    A position attends to itself and what is before, padding excepted. Padding attends to itself, so that its keys and values
    are finite: they are multiplied by 0, not left out.
    """
    before = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    return (seen_mask(padding, length) & before) | torch.eye(length, dtype=torch.bool, device=padding.device)
