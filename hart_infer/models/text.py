"""Prompts to context: transformers' Qwen2 with HART's padding, mask and system prompt (released `encode_prompts`)."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import WeightsError
from .parts.layers import weights_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZING = threading.RLock()  # a tokenizer changes itself in a call, and fails if two threads do so at once
# For rows that see nothing these give numbers; cuDNN's attention may give NaN, which would spread over the whole picture.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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

    def split(self, rows: int) -> list[PromptEmbeds]:
        """Parts of so many prompts each."""
        pairs = zip(self.context.split(rows), self.mask.split(rows), strict=True)
        return [PromptEmbeds(context, mask) for context, mask in pairs]


@lru_cache(maxsize=1)
def system_prompt() -> str:
    """The instruction that the released scripts put before every prompt (model data, MIT)."""
    return (resources.files("hart_infer") / "assets" / "system_prompt.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Prefix:
    """The system prompt's keys and values, one pair [1, kv heads, length, d] per layer."""

    layers: list[tuple[Tensor, Tensor]]
    length: int


NO_PREFIX = _Prefix([], 0)


class TextEncoder:
    """A Qwen2 model and its tokenizer.

    The encoder is causal, so the system prompt's keys and values don't depend on the prompt behind it: they are computed
    once for each token limit and reused.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` must have a padding token; its padding side is honoured."""
        if tokenizer.pad_token_id is None:
            raise WeightsError("The text encoder's tokenizer has no padding token; HART pads every prompt, so it needs one.")
        rows, highest = int(model.config.vocab_size), max(*tokenizer.get_vocab().values(), tokenizer.pad_token_id)
        if highest >= rows:
            raise WeightsError(
                f"The text encoder's tokenizer has ids up to {highest}, and its embedding has {rows} rows; both must come from "
                "the same model."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._cache_argument = _cache_argument(model)
        self._prefixes: dict[int, tuple[object, _Prefix]] = {}  # by token limit, with the weights that computed it

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
        at_once: int | None = None,
    ) -> PromptEmbeds:
        """Encode `prompts`, padded to `context_tokens` T and truncated to `max_sequence_length` (T by default).

        `at_once`: prompts that go through the model together; None is all of them, 1 makes a context independent of its batch.
        Warns about a prompt that is cut, saying from which character on.
        """
        tokens, mask = self.tokenize(prompts, context_tokens=context_tokens, max_sequence_length=max_sequence_length)
        prefix = self._system_prefix(context_tokens) if use_system_prompt else NO_PREFIX
        at_once = at_once or len(tokens)
        hidden = [self.hidden(*part, prefix) for part in zip(tokens.split(at_once), mask.split(at_once), strict=True)]
        return PromptEmbeds(torch.cat(hidden).float(), mask)

    def tokenize(
        self, prompts: Sequence[str], *, context_tokens: int, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids [U, T] int64 of `prompts`, cut and padded as in `encode`, and their mask [U, T] bool."""
        limit = max_sequence_length or context_tokens
        with _TOKENIZING:
            tokens = torch.stack([self._tokenize(i, prompt, limit, context_tokens) for i, prompt in enumerate(prompts)])
        tokens = tokens.to(self.model.device)
        return tokens, tokens != self.tokenizer.pad_token_id

    def _tokenize(self, index: int, prompt: str, limit: int, padded: int) -> Tensor:
        if self.tokenizer.is_fast:
            spans = self.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            if len(spans) > limit:
                _warn_caller(
                    f"Prompt {index} has {len(spans)} tokens; the limit is {limit}. "
                    f"Its text from character {spans[limit][0]} of {len(prompt)} on was cut."
                )
        ids = self.tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        padding = [self.tokenizer.pad_token_id] * (padded - len(ids))
        return torch.tensor(padding + ids if self.tokenizer.padding_side == "left" else ids + padding)

    def hidden(
        self, tokens: Tensor, mask: Tensor, prefix: _Prefix = NO_PREFIX, record: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Last hidden state [U, T, width] after the final norm, for tokens [U, T] with a mask [U, T], behind a prefix."""
        rows, length = tokens.shape
        cache = _recording_cache(record)
        for layer, (keys, values) in enumerate(prefix.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        position_ids = torch.arange(prefix.length, prefix.length + length, device=tokens.device).expand(rows, -1)
        with _attention_backends(tokens.device):
            output = self.model(
                input_ids=tokens,
                attention_mask=_attention_mask(mask, prefix.length, self.model.dtype),
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_argument: cache},
            )
        return output.last_hidden_state

    def _system_prefix(self, limit: int) -> _Prefix:
        """The system prompt cut to `limit` tokens, run once for each state of the weights."""
        key = weights_key(self.model)
        kept = self._prefixes.get(limit)
        if kept is None or kept[0] != key:
            with _TOKENIZING:
                ids = self.tokenizer(system_prompt(), truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
            ids = ids.to(self.model.device)
            layers: list[tuple[Tensor, Tensor]] = []
            self.hidden(ids, torch.ones_like(ids, dtype=torch.bool), record=layers)
            kept = self._prefixes[limit] = (key, _Prefix(layers, ids.shape[1]))
        return kept[1]


@contextmanager
def _attention_backends(device: torch.device) -> Iterator[None]:
    """Attention by _BACKENDS on a CUDA device; elsewhere there are no others."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(_BACKENDS):
        yield


def _cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its key/value cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _attention_mask(mask: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """[U, T] bool, behind `prefix` visible tokens -> additive [U, 1, T, prefix + T]: causal, padding hidden.

    Written out, because transformers' versions differ in what a left-padding position, which sees nothing, attends to; with
    -inf it is nothing, as when the golden data was recorded, and HART attends to those positions' contexts.
    """
    rows, length = mask.shape
    shown = torch.cat([mask.new_ones(rows, prefix), mask], dim=1)[:, None, None]
    causal = mask.new_ones(length, prefix + length).tril(prefix)
    return torch.zeros(rows, 1, *causal.shape, dtype=dtype, device=mask.device).masked_fill_(~(shown & causal), -torch.inf)


def _warn_caller(message: str) -> None:
    """Warn at the line outside this package that led here, however many functions and torch's decorators lie between."""
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hart_infer", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _recording_cache(record: list[tuple[Tensor, Tensor]] | None) -> Any:
    """A transformers cache that also appends what each layer stores to `record`; its public interface is stable."""
    from transformers import DynamicCache

    class RecordingCache(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if record is not None:
                record.append((key_states, value_states))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return RecordingCache()
