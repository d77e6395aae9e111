"""A checkpoint's configurations and the weight files that are on this machine; nothing large is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import INDEX, find_checkpoint, hub_id
from ..config import AutoencoderConfig, TransformerConfig
from ..errors import CheckpointNotFoundError
from ..hub import Repository

RELEASED_FOLDERS, OWN_FOLDERS = ("llm", "tokenizer"), ("transformer", "autoencoder")


@dataclass(frozen=True)
class Summary:
    """What can be known of a checkpoint without its weights; `files` is empty where they are not on this machine."""

    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    files: tuple[Path, ...]
    text_encoder: Path | None


def summarise(path_or_id: str, *, revision: str | None, local_files_only: bool, use_ema: bool) -> Summary:
    """Read a checkpoint's configurations, those of a Hub id from the cache or the Hub."""
    is_local = Path(path_or_id).expanduser().exists()
    try:
        found = find_checkpoint(path_or_id, use_ema=use_ema, revision=revision, local_files_only=True, with_text_encoder=False)
    except CheckpointNotFoundError:
        if is_local or "/" not in path_or_id:
            raise
    else:
        files = found.transformer_files + found.autoencoder_files
        return Summary(found.transformer, found.autoencoder, files, found.text_encoder)
    repository = Repository.open(hub_id(path_or_id), revision=revision, local_files_only=local_files_only)
    folders = _folders(repository.names)
    root = repository.fetch([f"{folder}/config.json" for folder in folders])
    transformer, autoencoder = (root / folder / "config.json" for folder in folders)
    return Summary(TransformerConfig.from_json(transformer), AutoencoderConfig.from_json(autoencoder), (), None)


def _folders(names: Iterable[str]) -> tuple[str, str]:
    available = set(names)
    folders = OWN_FOLDERS if INDEX in available else RELEASED_FOLDERS
    if not available.issuperset(f"{folder}/config.json" for folder in folders):
        raise CheckpointNotFoundError("The repository holds no HART checkpoint: no llm/config.json is in it.")
    return folders
