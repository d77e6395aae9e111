"""Where a checkpoint's files are: a Hub id, a folder, or the folder's `llm/`, in the released layout or the project's own.

Released: `llm/` (transformer; `ema_model.bin` beside `model.safetensors`) and `tokenizer/` (autoencoder). The project's own
(`save_pretrained`): `model_index.json`, `transformer/`, `autoencoder/`, `text_encoder/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .config import AutoencoderConfig, TransformerConfig
from .errors import CheckpointNotFoundError, ConfigError
from .hub import download, file_names

RELEASED_MODEL = "mit-han-lab/hart-0.7b-1024px"
RELEASED_TEXT_ENCODER = "mit-han-lab/Qwen2-VL-1.5B-Instruct"
INDEX = "model_index.json"
TEXT_FOLDERS = ("text_encoder", "text-encoder")
_LAYOUTS = {INDEX: ("transformer", "autoencoder"), "llm/config.json": ("llm", "tokenizer")}
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/llm/?)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, configurations read and weight files chosen; no weights read."""

    name: str  # as the user gave it
    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    transformer_files: tuple[Path, ...]
    autoencoder_files: tuple[Path, ...]
    text_encoder: Path | None  # a folder beside the weights, if there is one


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
) -> Checkpoint:
    """Find a checkpoint, downloading what is needed of it if it is on the Hub.

    Raises CheckpointNotFoundError where nothing is found and ConfigError where its configuration is not supported.
    """
    path = Path(repo_or_path).expanduser()
    if path.exists():
        root = _root(path)
        plan = _plan(file_names(root), str(repo_or_path), use_ema, variant, with_text_encoder)
    else:
        match = _HUB_ID.fullmatch(str(repo_or_path))
        if match is None:
            raise CheckpointNotFoundError(
                f"{repo_or_path} is neither an existing folder nor a Hub id (owner/name); check the path."
            )
        root, plan = download(
            match["repo"],
            lambda names: _plan(names, str(repo_or_path), use_ema, variant, with_text_encoder),
            _Plan.files,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    return _read(root, plan, str(repo_or_path))


@dataclass(frozen=True)
class _Plan:
    """Names, relative to the root, of what is needed."""

    transformer: str
    autoencoder: str
    transformer_files: tuple[str, ...]
    autoencoder_files: tuple[str, ...]
    text_encoder: str | None

    index: tuple[str, ...] = ()
    text_files: tuple[str, ...] = ()

    def files(self) -> list[str]:
        """What to download."""
        configs = [f"{self.transformer}/config.json", f"{self.autoencoder}/config.json"]
        return [*self.index, *configs, *self.transformer_files, *self.autoencoder_files, *self.text_files]


def _root(path: Path) -> Path:
    """The checkpoint's folder, given it, its `llm/`, or its `transformer/`."""
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path} is a file; give the checkpoint's folder.")
    is_part = not any((path / marker).exists() for marker in _LAYOUTS) and (path / "config.json").exists()
    parent = path.resolve().parent
    return parent if is_part and any((parent / marker).exists() for marker in _LAYOUTS) else path


def _plan(names: Iterable[str], origin: str, use_ema: bool, variant: str | None, with_text_encoder: bool) -> _Plan:
    """Choose the files that are needed among `names`."""
    available = set(names)
    folders = next((parts for marker, parts in _LAYOUTS.items() if marker in available), None)
    if folders is None:
        raise CheckpointNotFoundError(
            f"{origin} holds no HART checkpoint: neither {' nor '.join(_LAYOUTS)} is in it. Give a Hub id, the checkpoint's "
            "folder, or its llm/ folder."
        )
    transformer, autoencoder = folders
    stems = ["ema_model"] if use_ema and transformer == "llm" else []
    text = next((folder for folder in TEXT_FOLDERS if f"{folder}/config.json" in available), None)
    return _Plan(
        transformer,
        autoencoder,
        _weights_among(available, transformer, [*stems, "model", "pytorch_model"], variant, origin),
        _weights_among(available, autoencoder, ["model", "pytorch_model"], variant, origin),
        text if with_text_encoder else None,
        tuple(available & {INDEX}),
        tuple(name for name in sorted(available) if with_text_encoder and text and name.startswith(f"{text}/")),
    )


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


def _read(root: Path, plan: _Plan, name: str) -> Checkpoint:
    transformer = TransformerConfig.from_json(root / plan.transformer / "config.json")
    autoencoder = AutoencoderConfig.from_json(root / plan.autoencoder / "config.json")
    if transformer.patch_nums != autoencoder.v_patch_nums:
        raise ConfigError(
            f"{name}: the transformer's patch_nums {list(transformer.patch_nums)} are not the autoencoder's v_patch_nums "
            f"{list(autoencoder.v_patch_nums)}; both must come from the same checkpoint."
        )
    text = root / plan.text_encoder if plan.text_encoder else root.parent / RELEASED_TEXT_ENCODER.split("/")[1]
    return Checkpoint(
        name,
        transformer,
        autoencoder,
        tuple(root / file for file in plan.transformer_files),
        tuple(root / file for file in plan.autoencoder_files),
        text if text.is_dir() else None,
    )
