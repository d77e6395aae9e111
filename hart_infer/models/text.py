"""Prompts to context: transformers' Qwen2 with HART's padding, mask and system prompt (released `encode_prompts`)."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ops.held import without_cudnn_attention
from .parts.stamp import Stamp

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZING = threading.RLock()  # fast tokenizers change state in a call and are not thread-safe


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts: `context` [U, T, width] fp32 and `mask` [U, T] bool (True where a token is not padding)."""

    context: Tensor
    mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """[U, T] int64: cumsum(mask) - 1, so -1 at left-padding positions."""
        return self.mask.long().cumsum(dim=1) - 1

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.context)

    def split(self, batch_size: int) -> list[PromptEmbeds]:
        """Split into parts of `batch_size` prompts each."""
        pairs = zip(self.context.split(batch_size), self.mask.split(batch_size), strict=True)
        return [PromptEmbeds(context, mask) for context, mask in pairs]


@lru_cache(maxsize=1)
def system_prompt() -> str:
    """Return the instruction that the released scripts put before every prompt (model data, MIT)."""
    return (resources.files("hart_infer") / "assets" / "system_prompt.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class _SystemPrefix:
    """The system prompt's keys and values, one pair [1, kv heads, length, d] per layer."""

    layers: list[tuple[Tensor, Tensor]]
    length: int


NO_PREFIX = _SystemPrefix([], 0)


class TextEncoder:
    """A Qwen2 model and its tokenizer.

    The encoder is causal, so the system prompt's keys and values don't depend on the prompt behind it: they are computed
    once for each token limit and reused.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` must have a padding token; its padding side is honoured."""
        if tokenizer.pad_token_id is None:
            raise WeightsError("The text encoder's tokenizer has no padding token; HART pads every prompt, so it needs one.")
        vocab_size, highest = int(model.config.vocab_size), max(*tokenizer.get_vocab().values(), tokenizer.pad_token_id)
        if highest >= vocab_size:
            raise WeightsError(
                f"The text encoder's tokenizer has ids up to {highest}, and its embedding has {vocab_size} rows; both must "
                "come from the same model."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._cache_argument = _cache_argument(model)
        self._prefixes: dict[int, tuple[Stamp, _SystemPrefix]] = {}  # by token limit

    @property
    def width(self) -> int:
        """Features of the context."""
        return int(self.model.config.hidden_size)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move or cast the model, in place; only its weights are cast: the rotary frequencies are fp32 in every dtype."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype=dtype)
        self.model.to(device=device)
        self._prefixes.clear()
        return self

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        context_tokens: int,
        max_sequence_length: int | None = None,
        use_system_prompt: bool = True,
        batch_size: int | None = None,
    ) -> PromptEmbeds:
        """Encode `prompts`, padded to `context_tokens` T and truncated to `max_sequence_length` (T by default).

        `batch_size`: prompts per forward pass, None for all; 1 makes each result independent of the others. Warns of a
        truncated prompt.
        """
        tokens, mask = self.tokenize(prompts, context_tokens=context_tokens, max_sequence_length=max_sequence_length)
        prefix = self._system_prefix(context_tokens) if use_system_prompt else NO_PREFIX
        batch_size = batch_size or len(tokens)
        parts = zip(tokens.split(batch_size), mask.split(batch_size), strict=True)
        return PromptEmbeds(torch.cat([self.hidden_states(*part, prefix) for part in parts]).float(), mask)

    def tokenize(
        self, prompts: Sequence[str], *, context_tokens: int, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return token ids [U, T] int64 of `prompts`, truncated and padded as in `encode`, and their mask [U, T] bool."""
        limit = max_sequence_length or context_tokens
        with _TOKENIZING:
            tokens = torch.stack([self._tokenize(i, prompt, limit, context_tokens) for i, prompt in enumerate(prompts)])
        tokens = tokens.to(self.model.device)
        return tokens, tokens != self.tokenizer.pad_token_id

    def _tokenize(self, index: int, prompt: str, limit: int, padded: int) -> Tensor:
        encoding = self.tokenizer(prompt, return_offsets_mapping=self.tokenizer.is_fast)
        ids = encoding["input_ids"]
        if len(ids) > limit:
            spans = encoding.get("offset_mapping")  # of fast tokenizers only
            cut = f"text from character {spans[limit][0]} of {len(prompt)} on" if spans else "end"
            _warn_caller(f"Prompt {index} has {len(ids)} tokens; the limit is {limit}. Its {cut} was cut.")
            ids = self.tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        padding = [self.tokenizer.pad_token_id] * (padded - len(ids))
        return torch.tensor(padding + ids if self.tokenizer.padding_side == "left" else ids + padding)

    def hidden_states(
        self, tokens: Tensor, mask: Tensor, prefix: _SystemPrefix = NO_PREFIX, record: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Return the last hidden states [U, T, width], after the final norm, of tokens and mask [U, T] behind `prefix`."""
        rows, length = tokens.shape
        cache = _recording_cache(record)
        for layer, (keys, values) in enumerate(prefix.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        position_ids = torch.arange(prefix.length, prefix.length + length, device=tokens.device).expand(rows, -1)
        with without_cudnn_attention(tokens.device):
            output = self.model(
                input_ids=tokens,
                attention_mask=_attention_mask(mask, prefix.length, self.model.dtype),
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_argument: cache},
            )
        return output.last_hidden_state

    def _system_prefix(self, limit: int) -> _SystemPrefix:
        """Return the system prompt's prefix, truncated to `limit` tokens; anew only after weights or settings have changed."""
        kept = self._prefixes.get(limit)
        if kept is None or not kept[0].fits(self.model):
            stamp = Stamp(self.model)
            with _TOKENIZING:
                ids = self.tokenizer(system_prompt(), truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
            ids = ids.to(self.model.device)
            layers: list[tuple[Tensor, Tensor]] = []
            self.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool), record=layers)
            kept = self._prefixes[limit] = (stamp, _SystemPrefix(layers, ids.shape[1]))
        return kept[1]


def _cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the cache argument of a model's forward, which transformers 5.24 renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _attention_mask(mask: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Mask [U, T] bool after `prefix` visible tokens -> additive [U, 1, T, prefix + T]: causal, padding hidden.

    Built here because transformers' versions treat rows that are masked entirely (left padding) differently. With -inf such a
    row attends to nothing, as in the recorded data. Its output matters: HART uses the contexts of padding positions.
    """
    rows, length = mask.shape
    shown = torch.cat([mask.new_ones(rows, prefix), mask], dim=1)[:, None, None]
    causal = mask.new_ones(length, prefix + length).tril(prefix)
    return torch.zeros(rows, 1, *causal.shape, dtype=dtype, device=mask.device).masked_fill_(~(shown & causal), -torch.inf)


def _warn_caller(message: str) -> None:
    """Warn at the first frame outside hart_infer and torch."""
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hart_infer", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _recording_cache(record: list[tuple[Tensor, Tensor]] | None) -> Any:
    """Return a transformers cache that appends what each layer stores to `record`, and overrides only the public `update`."""
    from transformers import DynamicCache

    class RecordingCache(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if record is not None:
                record.append((key_states, value_states))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return RecordingCache()
