"""Prompts to context: transformers' Qwen2 with HART's padding, mask and system prompt (released `encode_prompts`)."""

from __future__ import annotations

import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.weights import shorten
from ..errors import CheckpointNotFoundError, ConfigError, WeightsError
from ..pipelines.arguments import check_int
from .config import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZING = threading.RLock()  # a tokenizer changes itself in a call, and fails if two threads do so at once
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 5 and 4: what tokenizer.json says
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts: `context` [U, T, width] fp32 and `mask` [U, T] bool (True where a token is not padding)."""

    context: Tensor
    mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """[U, T] int64: cumsum(mask) - 1, so -1 at left-padding positions."""
        return self.mask.long().cumsum(dim=1) - 1


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
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._prefixes: dict[int, _Prefix] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> TextEncoder:
        """Load from a folder; strictly: a weight that is missing or of the wrong shape is an error."""
        path = Path(path)
        if not any((path / name).exists() for name in _VOCABULARIES):  # transformers would make an empty one up
            raise CheckpointNotFoundError(f"The text encoder in {path} has no tokenizer: tokenizer.json is not in it.")
        try:
            with _quiet_transformers():
                model, report = _load_model(path, torch_dtype)
                tokenizer = _load_tokenizer(path)
        except Exception as error:
            if _was_refused(error):
                raise WeightsError(
                    f"The text encoder in {path} holds more than tensors and was refused: loading it could run code. Use "
                    "safetensors instead."
                ) from error
            kind = CheckpointNotFoundError if isinstance(error, OSError) else WeightsError
            raise kind(f"The text encoder in {path} can't be loaded: {_first_line(error)}") from error
        if model.config.model_type != "qwen2":
            raise ConfigError(f"The text encoder in {path} is a {model.config.model_type} model; only qwen2 is supported.")
        problems = {kind: report.get(f"{kind}_keys") for kind in ("missing", "mismatched")}
        if any(problems.values()):
            listed = "; ".join(f"{kind}: {shorten(map(_key, keys))}" for kind, keys in problems.items() if keys)
            raise WeightsError(f"The text encoder in {path} does not fit its configuration; {listed}.")
        return cls(model.to(device), tokenizer)

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

    def save_pretrained(self, path: Path, *, max_shard_size: int | str) -> None:
        """Write model and tokenizer into one folder."""
        with _quiet_transformers():
            self.model.save_pretrained(path, max_shard_size=max_shard_size)
        self.tokenizer.save_pretrained(path)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        context_tokens: int,
        max_sequence_length: int | None = None,
        use_system_prompt: bool = True,
    ) -> PromptEmbeds:
        """Encode `prompts`, padded to `context_tokens` T and truncated to `max_sequence_length` (T by default).

        Warns about a prompt that is cut, saying from which character on.
        """
        tokens, mask = self.tokenize(prompts, context_tokens=context_tokens, max_sequence_length=max_sequence_length)
        prefix = self._system_prefix(context_tokens) if use_system_prompt else NO_PREFIX
        at_once = 1 if tokens.device.type == "cpu" else len(tokens)  # so that a context doesn't depend on its batch
        hidden = [self.hidden(*part, prefix) for part in zip(tokens.split(at_once), mask.split(at_once), strict=True)]
        return PromptEmbeds(torch.cat(hidden).float(), mask)

    def tokenize(
        self, prompts: Sequence[str], *, context_tokens: int, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids [U, T] int64 of `prompts`, cut and padded as in `encode`, and their mask [U, T] bool."""
        limit = context_tokens
        if max_sequence_length is not None:
            limit = check_int(max_sequence_length, "max_sequence_length", 1, context_tokens)
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
        output = self.model(
            input_ids=tokens,
            attention_mask=_attention_mask(mask, prefix.length, self.model.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _system_prefix(self, limit: int) -> _Prefix:
        if limit not in self._prefixes:
            with _TOKENIZING:
                ids = self.tokenizer(system_prompt(), truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
            ids = ids.to(self.model.device)
            layers: list[tuple[Tensor, Tensor]] = []
            self.hidden(ids, torch.ones_like(ids, dtype=torch.bool), record=layers)
            self._prefixes[limit] = _Prefix(layers, ids.shape[1])
        return self._prefixes[limit]


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


def _dtype_argument(version: str) -> str:
    """What transformers calls the dtype argument: renamed in 4.56."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _load_model(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report on what didn't fit."""
    import transformers

    options: dict[str, Any] = {_dtype_argument(transformers.__version__): dtype or "auto"}
    return transformers.AutoModel.from_pretrained(
        str(path),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused by us with their names
        trust_remote_code=False,
        local_files_only=True,
        attn_implementation="sdpa",  # the one that takes the mask of `_attention_mask` in every version
        **options,
    )


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    config = path / "tokenizer_config.json"
    kind = read_json(config).get("tokenizer_class") if config.exists() else None
    if kind in _GENERIC and (path / "tokenizer.json").exists():  # else transformers 5 takes Qwen2's way of splitting words
        return PreTrainedTokenizerFast.from_pretrained(str(path), **options)
    return AutoTokenizer.from_pretrained(str(path), **options)


def _was_refused(error: BaseException | None) -> bool:
    """Whether a pickle that holds more than tensors is at the bottom of an error."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def _key(entry: Any) -> str:
    """The name in an entry of transformers' report, which may have shapes beside it."""
    return entry if isinstance(entry, str) else str(entry[0])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars over shards, and its reports, which become our errors."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
