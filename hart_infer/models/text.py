"""Prompts to context: a Qwen2 with HART's padding, mask and system prompt (released `encode_prompts`)."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import WeightsError
from .llama import Decoder
from .parts.cache import KVCache
from .parts.stamp import Stamp

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


class PromptTokenizer(Protocol):
    """What is used of a tokenizer: one of transformers', or tokenizer.json by itself (`checkpoints.tokenizer`)."""

    is_fast: bool
    padding_side: str

    @property
    def pad_token_id(self) -> Any:
        """The id of what fills a prompt up, None if there is no such token."""
        ...

    def __call__(
        self, text: str, *, truncation: bool = ..., max_length: int | None = ..., return_offsets_mapping: bool = ...
    ) -> Mapping[str, Any]:
        """Tokenize one text -> its "input_ids", and its "offset_mapping" if asked."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Return all tokens with their ids."""
        ...

    def save_pretrained(self, path: str | Path) -> object:
        """Write its files into a folder."""
        ...


class TextEncoder:
    """A Qwen2 and its tokenizer.

    The Qwen2 is causal, so the system prompt's keys and values don't depend on the prompt behind it: they are computed once
    for each token limit and reused.
    """

    def __init__(self, model: Decoder, tokenizer: PromptTokenizer) -> None:
        """`tokenizer`, one of transformers' or alike, must have a padding token; its padding side is honoured."""
        if not isinstance(model, Decoder):
            raise WeightsError(f"A text encoder's model is a hart_infer.models.llama.Decoder, not a {type(model).__name__}.")
        if tokenizer.pad_token_id is None:
            raise WeightsError("The text encoder's tokenizer has no padding token; HART pads every prompt, so it needs one.")
        vocab_size, highest = model.config.vocab_size, max(*tokenizer.get_vocab().values(), tokenizer.pad_token_id)
        if highest >= vocab_size:
            raise WeightsError(
                f"The text encoder's tokenizer has ids up to {highest}, and its embedding has {vocab_size} rows; both must "
                "come from the same model."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._prefixes: dict[int, tuple[Stamp, KVCache]] = {}  # of the system prompt, by token limit

    @property
    def width(self) -> int:
        """Features of the context."""
        return self.model.config.hidden_size

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move or cast the model, in place."""
        self.model.to(device=device, dtype=dtype)
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
        prefix = self._system_prefix(context_tokens) if use_system_prompt else None
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

    def hidden_states(self, tokens: Tensor, mask: Tensor, prefix: KVCache | None = None) -> Tensor:
        """Return the hidden states [U, T, width], after the final norm, of tokens and mask [U, T] behind `prefix`, of one row.

        Positions count padding.
        """
        rows, length = tokens.shape
        before = prefix.keys.shape[3] if prefix is not None else 0
        cache = self.model.new_cache(rows=rows, length=before + length)
        if prefix is not None:
            cache.keys[:, :, :, :before].copy_(prefix.keys)
            cache.values[:, :, :, :before].copy_(prefix.values)
        return self._run(tokens, mask, cache, before)

    def _run(self, tokens: Tensor, mask: Tensor, cache: KVCache, before: int) -> Tensor:
        positions = torch.arange(before, before + tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        place = cache.at(before, tokens.shape[1])
        return self.model(self.model.embed_tokens(tokens), positions, place, attended(mask, before))

    def _system_prefix(self, limit: int) -> KVCache:
        """Return the system prompt's prefix, truncated to `limit` tokens; anew only after weights or settings have changed."""
        kept = self._prefixes.get(limit)
        if kept is None or not kept[0].fits(self.model):
            stamp = Stamp(self.model)
            with _TOKENIZING:
                ids = self.tokenizer(system_prompt(), truncation=True, max_length=limit)["input_ids"]
            ids = torch.tensor([ids], device=self.model.device)
            cache = self.model.new_cache(rows=1, length=ids.shape[1])
            self._run(ids, torch.ones_like(ids, dtype=torch.bool), cache, 0)
            kept = self._prefixes[limit] = (stamp, cache)
        return kept[1]


def attended(mask: Tensor, before: int) -> Tensor:
    """Mask [U, T] bool behind `before` visible tokens -> [U, 1, T, before + T] bool, True where a query attends.

    Causal, padding hidden. Transformers' versions differ in what a left-padded row attends to; here, as in the recorded data,
    to nothing. Its output matters: HART uses the contexts of padding positions.
    """
    rows, length = mask.shape
    shown = torch.cat([mask.new_ones(rows, before), mask], dim=1)[:, None, None]
    return shown & mask.new_ones(length, before + length).tril(before)


def _warn_caller(message: str) -> None:
    """Warn at the first frame outside hart_infer and torch."""
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hart_infer", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
