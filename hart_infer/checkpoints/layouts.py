"""Where a checkpoint's files are: a Hub id, a folder, or the folder's `llm/`, in the released layout or the project's own.

Released: `llm/` (transformer; `ema_model.bin` beside `model.safetensors`) and `tokenizer/` (autoencoder). The project's own
(`save_pretrained`): `model_index.json`, `transformer/`, `autoencoder/`, `text_encoder/`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError, ConfigError
from ..models.config import AutoencoderConfig, Defaults, TransformerConfig, read_json
from .hub import Repository, file_names

RELEASED_MODEL = "mit-han-lab/hart-0.7b-1024px"
EMBEDDED_MODEL = "hart-mini"  # comes with this package, in models/
RELEASED_TEXT_ENCODER = "mit-han-lab/Qwen2-VL-1.5B-Instruct"
INDEX = "model_index.json"
TEXT_FOLDERS = ("text_encoder", "text-encoder")
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / EMBEDDED_MODEL
_LAYOUTS = {INDEX: ("transformer", "autoencoder"), "llm/config.json": ("llm", "tokenizer")}
_EMA = re.compile(r"llm/ema_model[.-].*(safetensors|bin)$")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(llm|transformer))?/?")
_TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # configuration and tokenizer
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, configurations read and weight files chosen; no weights read."""

    name: str  # as the user gave it
    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    transformer_files: tuple[Path, ...]
    autoencoder_files: tuple[Path, ...]
    text_encoder: Path | None  # a folder beside the weights, if there is one
    defaults: Defaults = Defaults()


def find_checkpoint(
    repo_or_path: str | Path,
    *,
    use_ema: bool = True,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    with_text_encoder: bool = True,
    strict_config: bool = False,
) -> Checkpoint:
    """Find a checkpoint, downloading what is needed of it if it is on the Hub.

    Raises CheckpointNotFoundError where nothing is found and ConfigError where its configuration is not supported.
    """
    path = local_path(repo_or_path)
    if path is not None:
        root = _root(path)
        plan = _plan(file_names(root), str(repo_or_path), use_ema, variant, with_text_encoder)
        return _read(root, plan, str(repo_or_path), strict_config)
    repository = Repository.open(
        hub_id(repo_or_path), revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    plan = _plan(repository.names, repository.title, use_ema, variant, with_text_encoder)
    found = _read(
        repository.fetch(plan.configs()), plan, str(repo_or_path), strict_config
    )  # refused before gigabytes have come
    repository.fetch(plan.files())
    if repository.cached and use_ema and plan.transformer == "llm" and not _EMA.match(plan.transformer_files[0]):
        logger.warning(
            "%s has no EMA weights, so the plain ones are used; connect once to get them if the Hub has them, or pass "
            "use_ema=False.",
            repository.title,
        )
    return found


def inspect_checkpoint(
    repo_or_path: str | Path, *, use_ema: bool = True, revision: str | None = None, local_files_only: bool = False
) -> Checkpoint:
    """A checkpoint of which no weights are downloaded: its lists of files are empty where they aren't on this machine.

    Raises as `find_checkpoint` does.
    """
    if local_path(repo_or_path) is not None:
        return find_checkpoint(repo_or_path, use_ema=use_ema)
    repository = Repository.open(hub_id(repo_or_path), revision=revision, local_files_only=local_files_only)
    plan = _parts(repository.names, repository.title)
    root = repository.fetch(plan.configs())
    with suppress(CheckpointNotFoundError):  # not all of it is in the cache
        whole = _plan(repository.names, repository.title, use_ema, variant=None, with_text_encoder=False)
        plan = whole if all((root / name).exists() for name in whole.files()) else plan
    return _read(root, plan, str(repo_or_path))


def find_text_encoder(source: str | Path, **hub: Any) -> Path:
    """The folder of a text encoder, itself or downloaded; `hub` goes to `Repository.open`."""
    path = local_path(source)
    if path is None:
        repository = Repository.open(hub_id(source), **hub)
        if "config.json" not in repository.names:
            raise CheckpointNotFoundError(f"{repository.title} holds no text encoder: config.json is not in it.")
        files = _text_files(repository.names)
        if not any(name.endswith((".safetensors", ".bin")) for name in files):
            raise CheckpointNotFoundError(f"{repository.title} holds no weights of a text encoder: expected model.safetensors.")
        return repository.fetch(files)
    if not (path / "config.json").is_file():
        raise CheckpointNotFoundError(f"{source} is not a text encoder's folder: config.json is not in it.")
    return path


def local_path(repo_or_path: str | Path) -> Path | None:
    """The path if something is there, `~` expanded; for the embedded model's bare name, where it lies in this package."""
    if str(repo_or_path) == EMBEDDED_MODEL and not isinstance(repo_or_path, Path):
        return _EMBEDDED_FOLDER
    path = Path(os.path.expanduser(repo_or_path))
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # no name of a file
        return None


def hub_id(repo_or_path: str | Path) -> str:
    """`owner/name` of a Hub id, given so or with `/llm` behind; raises CheckpointNotFoundError if it can't be one."""
    match = _HUB_ID.fullmatch(str(repo_or_path))
    if match is None:
        raise CheckpointNotFoundError(
            f"{repo_or_path} is neither an existing folder nor a Hub id (owner/name); check the path."
        )
    return match["repo"]


@dataclass(frozen=True)
class _Plan:
    """Names, relative to the root, of what is needed."""

    transformer: str
    autoencoder: str
    index: tuple[str, ...]
    transformer_files: tuple[str, ...] = ()
    autoencoder_files: tuple[str, ...] = ()
    text_encoder: str | None = None
    text_files: tuple[str, ...] = ()

    def configs(self) -> list[str]:
        """What says whether the rest is of use."""
        return [*self.index, f"{self.transformer}/config.json", f"{self.autoencoder}/config.json"]

    def files(self) -> list[str]:
        """All that is needed."""
        return [*self.configs(), *self.transformer_files, *self.autoencoder_files, *self.text_files]


def _root(path: Path) -> Path:
    """The checkpoint's folder, given it, its `llm/`, or its `transformer/`."""
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path} is a file; give the checkpoint's folder.")
    is_part = not any((path / marker).exists() for marker in _LAYOUTS) and (path / "config.json").exists()
    parent = _parent(path)
    return parent if is_part and any((parent / marker).exists() for marker in _LAYOUTS) else path


def _parent(path: Path) -> Path:
    """The folder that a path lies in, `.` and `..` included, links left alone."""
    return Path(os.path.abspath(path)).parent


def _parts(names: Iterable[str], origin: str) -> _Plan:
    """The layout that `names` are in, without weights."""
    available = set(names)
    folders = next((parts for marker, parts in _LAYOUTS.items() if marker in available), None)
    if folders is None:
        raise CheckpointNotFoundError(
            f"{origin} holds no HART checkpoint: neither {' nor '.join(_LAYOUTS)} is in it. Give a Hub id, the checkpoint's "
            "folder, or its llm/ folder."
        )
    return _Plan(*folders, tuple(available & {INDEX}))


def _plan(names: Iterable[str], origin: str, use_ema: bool, variant: str | None, with_text_encoder: bool) -> _Plan:
    """Choose the files that are needed among `names`."""
    available = set(names)
    parts = _parts(available, origin)
    stems = ["ema_model"] if use_ema and parts.transformer == "llm" else []
    text = next((folder for folder in TEXT_FOLDERS if f"{folder}/config.json" in available), None)
    plan = replace(
        parts,
        transformer_files=_weights_among(available, parts.transformer, [*stems, "model", "pytorch_model"], variant, origin),
        autoencoder_files=_weights_among(available, parts.autoencoder, ["model", "pytorch_model"], variant, origin),
        text_encoder=text if with_text_encoder else None,
        text_files=_text_files(available, f"{text}/") if with_text_encoder and text else (),
    )
    is_plain = not _EMA.match(plan.transformer_files[0])
    if stems and variant and is_plain and any(_EMA.match(name) for name in available):
        raise CheckpointNotFoundError(
            f"{origin} has EMA weights, but not as variant {variant!r}; pass use_ema=False to take the plain ones, or drop the "
            "variant."
        )
    return plan


def _text_files(names: Iterable[str], folder: str = "") -> tuple[str, ...]:
    """What transformers needs of a text encoder: JSON, tokenizer and weights, safetensors if there are any."""
    own = [name for name in sorted(names) if name.startswith(folder) and "/" not in name.removeprefix(folder)]
    weights = [name for name in own if name.endswith(".safetensors")]
    weights = weights or [name for name in own if re.fullmatch(r"pytorch_model.*\.bin", name.removeprefix(folder))]
    return (*(name for name in own if Path(name).suffix in _TEXT_SUFFIXES), *weights)


def _weights_among(names: set[str], folder: str, stems: list[str], variant: str | None, origin: str) -> tuple[str, ...]:
    """The weights of one folder: the first stem that exists, safetensors before .bin, one file or all its shards."""
    marked = f"\\.{re.escape(variant)}" if variant else ""
    for stem in stems:
        for suffix in ("safetensors", "bin"):
            pattern = rf"{folder}/{stem}(?:{marked}(-\d+-of-(?P<a>\d+))?|(-\d+-of-(?P<b>\d+)){marked})\.{suffix}"
            matches = [match for name in sorted(names) if (match := re.fullmatch(pattern, name))]
            if matches:
                shards = int(matches[-1]["a"] or matches[-1]["b"] or 1)
                chosen = [match.string for match in matches if int(match["a"] or match["b"] or 1) == shards]
                if len(chosen) != shards:
                    raise CheckpointNotFoundError(
                        f"{origin} has {len(chosen)} of {shards} shards of {folder}/{stem}.{suffix}; copy the others too."
                    )
                return tuple(chosen)
    wanted = " or ".join(f"{stem}{'.' + variant if variant else ''}.safetensors" for stem in stems)
    raise CheckpointNotFoundError(f"{origin} has no weights in {folder}/: expected {wanted} (or .bin).")


def _read(root: Path, plan: _Plan, name: str, strict: bool = False) -> Checkpoint:
    transformer = TransformerConfig.from_json(root / plan.transformer / "config.json", strict=strict)
    autoencoder = AutoencoderConfig.from_json(root / plan.autoencoder / "config.json", strict=strict)
    if transformer.patch_nums != autoencoder.v_patch_nums:
        raise ConfigError(
            f"{name}: the transformer's patch_nums {list(transformer.patch_nums)} are not the autoencoder's v_patch_nums "
            f"{list(autoencoder.v_patch_nums)}; both must come from the same checkpoint."
        )
    defaults = read_json(root / INDEX).get("defaults", {}) if plan.index else {}
    if not isinstance(defaults, dict):
        raise ConfigError(f"{root / INDEX}: defaults must be an object, not {defaults!r}.")
    beside = _parent(root) / RELEASED_TEXT_ENCODER.split("/")[1]
    return Checkpoint(
        name,
        transformer,
        autoencoder,
        tuple(root / file for file in plan.transformer_files),
        tuple(root / file for file in plan.autoencoder_files),
        root / plan.text_encoder if plan.text_encoder else beside if beside.is_dir() else None,
        Defaults.from_dict(defaults, origin=f"{root / INDEX}: defaults", strict=True),
    )
