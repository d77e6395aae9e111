"""Find text encoders on disk or on the Hub, load them, and save them as transformers does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import CheckpointNotFoundError, ConfigError, WeightsError, is_out_of_memory
from ..models.llama import Decoder
from ..models.text import TextEncoder
from .configs import read_json
from .hub import HUB, HubOptions, Repository
from .layouts import hub_id, local_path
from .llama import QWEN2_KEYS, decoder_rules, qwen2_config, qwen2_name, read_decoder
from .saving import write_module
from .tokenizer import load_tokenizer
from .weights import RenameTable, load_module

TEXT_FOLDERS = ("text_encoder", "text-encoder")  # beside a checkpoint's weights
_TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # configuration and tokenizer
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_READ, _DROPPED = r"(model\.)?(embed_tokens|layers|norm)\..*", r".*rotary_emb\.inv_freq"
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
    """Choose the files of a text encoder: JSON, tokenizer and weights, safetensors if there are any."""
    own = [name for name in sorted(names) if name.startswith(folder) and "/" not in name.removeprefix(folder)]
    weights = [name for name in own if name.endswith(".safetensors")]
    weights = weights or [name for name in own if re.fullmatch(r"pytorch_model.*\.bin", name.removeprefix(folder))]
    return (*(name for name in own if Path(name).suffix in _TEXT_SUFFIXES), *weights)


def load_text_encoder(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    width: int | None = None,
    strict: bool = False,
) -> TextEncoder:
    """Load from a folder; a weight that is missing or of the wrong shape is an error, others than the encoder's are not read.

    `dtype` None keeps the stored one. `width`: the features that the context must have. `strict` refuses unknown keys of
    config.json. Raises CheckpointNotFoundError, ConfigError, WeightsError.
    """
    title = f"The text encoder in {path}"
    if not any((path / name).exists() for name in _VOCABULARIES):  # transformers would create an empty tokenizer
        raise CheckpointNotFoundError(f"{title} has no tokenizer: tokenizer.json is not in it.")
    values = read_json(path / "config.json")
    kind = values.get("model_type")
    if kind != "qwen2":
        raise ConfigError(f"{title} is {f'a {kind} model' if kind else 'of no model_type'}; only qwen2 is supported.")
    config = read_decoder(values, QWEN2_KEYS, origin=str(path / "config.json"), qkv_bias=True, strict=strict)
    if width is not None and config.hidden_size != width:
        raise ConfigError(
            f"The text encoder {path} gives {config.hidden_size} features, the checkpoint expects {width}; pass the "
            "checkpoint's own as text_encoder=..."
        )
    rename = RenameTable(decoder_rules(config, r"(?:model\.)?"), dropped=_DROPPED).only(_READ)
    model = load_module(lambda: Decoder(config), _weights(path, title), rename, dtype=dtype)
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = CheckpointNotFoundError if isinstance(error, OSError) else WeightsError
        raise kind(f"{title} can't be loaded: {_first_line(error)}") from error
    return TextEncoder(model.to(device), tokenizer)


def _weights(path: Path, title: str) -> list[Path]:
    """Return the files that hold the weights: one, or those that its index lists; safetensors before .bin."""
    for name in _WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(Path(str(file)).name == file for file in listed.values()):
                raise ConfigError(f"{index} must list the files of its folder under weight_map.")
            return [path / file for file in sorted(set(listed.values()))]
    raise CheckpointNotFoundError(
        f"{title} has no weights: expected {' or '.join(_WEIGHTS)}, or the shards of one and its index."
    )


def save_text_encoder(encoder: TextEncoder, path: Path, *, max_shard_size: int | str) -> None:
    """Write model and tokenizer into one folder, which is created."""
    config = qwen2_config(encoder.model.config, str(encoder.model.dtype).removeprefix("torch."))
    write_module(encoder.model, config, path, max_shard_size=max_shard_size, rename=qwen2_name)
    encoder.tokenizer.save_pretrained(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
