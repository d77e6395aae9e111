"""Load a text encoder's tokenizer: by the tokenizers library where all of it is in tokenizer.json, else by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ..models.text import PromptTokenizer
from .configs import read_json

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 5 and 4: classes that only load tokenizer.json
_NAMED = {"bos_token", "eos_token", "pad_token", "unk_token"}
_PLAIN = {"backend", "is_local", "local_files_only", "model_max_length", "padding_side", "tokenizer_class", *_NAMED}
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # which transformers would read too


class FileTokenizer:
    """A tokenizer.json, run as transformers' generic class runs it, without that import: what a `TextEncoder` needs of it."""

    is_fast = True

    def __init__(self, text: str, config: Mapping[str, Any]) -> None:
        """`text` of tokenizer.json, and the values of tokenizer_config.json."""
        self._inner = tokenizers.Tokenizer.from_str(text)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._config = dict(config)
        self.pad_token: str | None = config.get("pad_token")
        self.padding_side: str = config.get("padding_side", "right")

    @property
    def pad_token_id(self) -> int | None:
        """As transformers': None without a padding token."""
        return None if self.pad_token is None else self._inner.token_to_id(self.pad_token)

    def __call__(
        self, text: str, *, truncation: bool = False, max_length: int | None = None, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Tokenize one text -> its "input_ids", and "offset_mapping" if asked; at most `max_length` of them with `truncation`.

        Not to be called in two threads at once.
        """
        if truncation and max_length is not None:
            self._inner.enable_truncation(max_length)
        try:
            found = self._inner.encode(text)
        finally:
            self._inner.no_truncation()
        return {"input_ids": found.ids} | ({"offset_mapping": found.offsets} if return_offsets_mapping else {})

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids."""
        vocabulary: dict[str, int] = self._inner.get_vocab()
        return vocabulary

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, which is created, for any version of transformers."""
        config = {name: value for name, value in self._config.items() if name != "backend"}  # of transformers 5 alone
        config |= {"pad_token": self.pad_token, "padding_side": self.padding_side, "tokenizer_class": _GENERIC[1]}
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, _FILE).write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        Path(path, _CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: Path) -> PromptTokenizer:
    """Load the tokenizer in a folder. Raises what the libraries raise."""
    config = read_json(path / _CONFIG) if (path / _CONFIG).exists() else {}
    is_generic = config.get("tokenizer_class") in _GENERIC and (path / _FILE).exists()
    if is_generic:
        text = (path / _FILE).read_text(encoding="utf-8")
        if _is_whole(text, config) and not any((path / name).exists() for name in _BESIDE):
            return FileTokenizer(text, config)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    kind = PreTrainedTokenizerFast if is_generic else AutoTokenizer  # which makes transformers 5 apply Qwen2's pre-tokenizer
    with quiet_transformers():
        tokenizer: PromptTokenizer = kind.from_pretrained(str(path), **options)
    return tokenizer


def _is_whole(text: str, config: Mapping[str, Any]) -> bool:
    """Return whether tokenizer_config.json adds nothing to the `text` of tokenizer.json but the names of its special tokens."""
    try:
        file = json.loads(text)
        added = {token["content"] for token in file["added_tokens"] if token["special"]}
        preset = file.get("truncation") or file.get("padding")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    named = [value for name, value in config.items() if name in _NAMED and value is not None]
    is_plain = set(config) <= _PLAIN and config.get("padding_side", "right") in ("left", "right") and not preset
    return is_plain and all(isinstance(token, str) and token in added for token in named)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and logs."""
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
