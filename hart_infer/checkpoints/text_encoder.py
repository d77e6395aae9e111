"""Find text encoders on disk or on the Hub, load them by transformers, and save them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointNotFoundError, ConfigError, WeightsError, is_out_of_memory
from ..models.text import TextEncoder
from .configs import read_json
from .hub import HUB, HubOptions, Repository
from .layouts import hub_id, local_path
from .weights import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_FOLDERS = ("text_encoder", "text-encoder")  # beside a checkpoint's weights
_TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # configuration and tokenizer
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 5 and 4: classes that only load tokenizer.json
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def find_text_encoder(source: str | Path, hub: HubOptions = HUB) -> Path:
    """Return a text encoder's folder, downloaded if `source` is a Hub id. Raises CheckpointNotFoundError or OutputError."""
    path = local_path(source)
    if path is None:
        repository = Repository.open(hub_id(source), hub)
        if "config.json" not in repository.names:
            raise CheckpointNotFoundError(f"{repository.title} holds no text encoder: config.json is not in it.")
        files = text_files(repository.names)
        if not any(name.endswith((".safetensors", ".bin")) for name in files):
            raise CheckpointNotFoundError(f"{repository.title} holds no weights of a text encoder: expected model.safetensors.")
        return repository.fetch(files)
    if not (path / "config.json").is_file():
        raise CheckpointNotFoundError(f"{source} is not a text encoder's folder: config.json is not in it.")
    return path


def text_files(names: Iterable[str], folder: str = "") -> tuple[str, ...]:
    """Choose the files that transformers needs of a text encoder: JSON, tokenizer and weights, safetensors if there are any."""
    own = [name for name in sorted(names) if name.startswith(folder) and "/" not in name.removeprefix(folder)]
    weights = [name for name in own if name.endswith(".safetensors")]
    weights = weights or [name for name in own if re.fullmatch(r"pytorch_model.*\.bin", name.removeprefix(folder))]
    return (*(name for name in own if Path(name).suffix in _TEXT_SUFFIXES), *weights)


def load_text_encoder(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", width: int | None = None
) -> TextEncoder:
    """Load from a folder; a weight that is missing or of the wrong shape is an error.

    `dtype` None keeps the stored one. `width`: the features that the context must have. Raises CheckpointNotFoundError,
    ConfigError, WeightsError.
    """
    if not any((path / name).exists() for name in _VOCABULARIES):  # transformers would create an empty tokenizer
        raise CheckpointNotFoundError(f"The text encoder in {path} has no tokenizer: tokenizer.json is not in it.")
    try:
        with _quiet_transformers():
            model, report = _load_model(path, dtype)
            tokenizer = _load_tokenizer(path)
    except Exception as error:
        if is_out_of_memory(error):
            raise
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
    encoder = TextEncoder(model.to(device), tokenizer)
    if width is not None and encoder.width != width:
        raise ConfigError(
            f"The text encoder {path} gives {encoder.width} features, the checkpoint expects {width}; pass the checkpoint's "
            "own as text_encoder=..."
        )
    return encoder


def save_text_encoder(encoder: TextEncoder, path: Path, *, max_shard_size: int | str) -> None:
    """Write model and tokenizer into one folder, which is created."""
    with _quiet_transformers():
        encoder.model.save_pretrained(path, max_shard_size=max_shard_size)
    encoder.tokenizer.save_pretrained(path)


def dtype_argument(version: str) -> str:
    """Return transformers' name of the dtype argument, which was renamed in 4.56."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _load_model(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the model; return it and transformers' report on what didn't fit."""
    import transformers

    options: dict[str, Any] = {dtype_argument(transformers.__version__): dtype or "auto"}
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
    if kind in _GENERIC and (path / "tokenizer.json").exists():  # else transformers 5 applies Qwen2's pre-tokenizer
        return PreTrainedTokenizerFast.from_pretrained(str(path), **options)
    return AutoTokenizer.from_pretrained(str(path), **options)


def _was_refused(error: BaseException | None) -> bool:
    """Return whether the error's cause chain has an UnpicklingError: a pickle with more than tensors."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def _key(entry: Any) -> str:
    """Return the name in an entry of transformers' report, which may have shapes beside it."""
    return entry if isinstance(entry, str) else str(entry[0])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and logs; what they report is raised as errors instead."""
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
