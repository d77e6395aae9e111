"""Find, load and save VILA-U's checkpoints: layouts, files, names of tensors.

Released: `config.json`, and `llm/`, `vision_tower/` (with the depth transformer) and `mm_projector/`, perhaps all in `model/`.
The project's own (`save_pretrained`): `model_index.json`, `tokenizer.model`, and `llm/`, `vision_tower/`, `depth_transformer/`
and `mm_projector/`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointNotFoundError, ConfigError
from ..models.llama import Llama, LlamaConfig
from ..models.vila_u.depth import DepthConfig, DepthTransformer
from ..models.vila_u.projector import Projector, projector_layers
from ..models.vila_u.siglip import SIGLIP_CONFIGS, SiglipConfig
from ..models.vila_u.text import Tokenizer
from ..models.vila_u.vision import VisionConfig, VisionTower
from .configs import ConfigT, Keys, config_from_dict, config_to_dict, read_config, read_json
from .hub import HUB, HubOptions
from .layouts import INDEX, Source, choose_weights, open_source
from .saving import TOKENIZER, WritePart, check_shard_size, save_checkpoint, write_module
from .vila_u_configs import AnswerDefaults, Reader, Settings, VilaUDefaults
from .vila_u_names import DEPTH_NAMES, TOWER_NAMES, renames
from .weights import RenameTable, load_module

MODEL = "model/"  # the folder that a released checkpoint may be in
TOWER = "vision_tower/config.json"  # the file that tells it from HART's
MARKERS = (INDEX, TOWER, MODEL + TOWER)
ADDED_TOKENS = "llm/added_tokens.json"
GENERATION = "llm/generation_config.json"
CONFIGS = ("config.json", "llm/config.json", TOWER, "mm_projector/config.json")
OWN_PARTS = ("llm", "vision_tower", "depth_transformer", "mm_projector")
STEMS = ("model", "pytorch_model")
OWN = RenameTable(())  # our names
OWN_KEYS = Keys()


@dataclass(frozen=True)
class VilaUCheckpoint:
    """A checkpoint on disk: its configurations are read and its weight files chosen, but no weights are read."""

    name: str  # as the user gave it
    llama: LlamaConfig
    vision: VisionConfig
    depth: DepthConfig
    projector: str  # released mm_projector_type
    settings: Settings
    answers: AnswerDefaults
    defaults: VilaUDefaults
    llama_files: tuple[Path, ...]
    vision_files: tuple[Path, ...]
    depth_files: tuple[Path, ...]  # of a released checkpoint, the tower's
    projector_files: tuple[Path, ...]
    tokenizer: Path
    released: bool  # layout and names

    def __post_init__(self) -> None:
        """Raise ConfigError for parts that don't belong together."""
        problem = _mismatch(self.llama, self.vision, self.depth)
        if problem:
            raise ConfigError(f"{self.name}: {problem}; all parts must come from the same checkpoint.")

    @property
    def renames(self) -> RenameTable:
        """Return the table that the weights are read by."""
        return renames(self.llama, self.vision) if self.released else OWN

    def load_llama(self, dtype: torch.dtype | None) -> Llama:
        """Load the Llama on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        return load_module(lambda: Llama(self.llama), self.llama_files, self.renames, dtype=dtype)

    def load_vision_tower(self, dtype: torch.dtype | None) -> VisionTower:
        """Load the vision tower on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        table = self.renames.only(TOWER_NAMES) if self.released else OWN
        return load_module(lambda: VisionTower(self.vision), self.vision_files, table, dtype=dtype)

    def load_depth_transformer(self, dtype: torch.dtype | None) -> DepthTransformer:
        """Load the depth transformer on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        table = self.renames.only(DEPTH_NAMES) if self.released else OWN
        return load_module(lambda: DepthTransformer(self.depth), self.depth_files, table, dtype=dtype)

    def load_projector(self, dtype: torch.dtype | None) -> Projector:
        """Load the projector on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        return load_module(self._projector, self.projector_files, self.renames, dtype=dtype)

    def _projector(self) -> Projector:
        sizes = {"code_dim": self.vision.hidden_size, "hidden_size": self.llama.hidden_size}
        return Projector(self.projector, **sizes)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer.

        Raises CheckpointNotFoundError, BackendError if sentencepiece is not installed, ConfigError, or WeightsError.
        """
        try:
            model = self.tokenizer.read_bytes()
        except OSError as error:
            raise CheckpointNotFoundError(
                f"{self.tokenizer} can't be read ({error.strerror}); a checkpoint needs it."
            ) from error
        return Tokenizer(
            model,
            vocab_size=self.llama.vocab_size,
            max_length=self.settings.tokenizer_model_max_length,
            has_video=self.settings.mm_use_vi_start_end,
        )


def _mismatch(llama: LlamaConfig, vision: VisionConfig, depth: DepthConfig) -> str:
    """Return in what sizes the parts differ that must share them; empty if in none."""
    pairs = (
        ("the tower's features have", vision.hidden_size, "channels, and the depth transformer's", depth.code_dim),
        ("the Llama is", llama.hidden_size, "wide, and the depth transformer's input", depth.hidden_size),
        ("a position has", vision.depth, "codes, and the depth transformer", depth.num_slots),
        *(("a codebook has", size, "codes, and the depth transformer draws", depth.vocab_size) for size in vision.n_embed),
    )
    return next((f"{a} {x} {b} {y}" for a, x, b, y in pairs if x != y), "")


def is_vila_u(names: Collection[str]) -> bool:
    """Return whether a folder's file names are those of a released VILA-U checkpoint."""
    return TOWER in names or MODEL + TOWER in names


def find_checkpoint(
    repo_or_path: str | Path, *, variant: str | None = None, strict_config: bool = False, hub: HubOptions = HUB
) -> VilaUCheckpoint:
    """Find a checkpoint in a folder or on the Hub, from which only the needed files are downloaded.

    Raises CheckpointNotFoundError if nothing is found, ConfigError if its configuration is not supported, and OutputError if
    the cache can't be written.
    """
    source = _open(repo_or_path, hub)
    found, files = _read(source, str(repo_or_path), variant, strict_config)
    source.fetch(files)  # once the configuration is checked
    return found


def inspect_checkpoint(repo_or_path: str | Path, *, variant: str | None = None, hub: HubOptions = HUB) -> VilaUCheckpoint:
    """Read a checkpoint's configuration without downloading weights; file lists are empty if not all weights are local.

    Raises as `find_checkpoint` does.
    """
    found, _ = _read(_open(repo_or_path, hub), str(repo_or_path), variant, strict=False)
    files = (*found.llama_files, *found.vision_files, *found.depth_files, *found.projector_files)
    if all(file.exists() for file in files):
        return found
    return replace(found, llama_files=(), vision_files=(), depth_files=(), projector_files=())


@dataclass(frozen=True)
class _Inside:
    """A folder of a source, as a source."""

    source: Source
    folder: str  # with a slash at the end

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the files in the folder, relative to it."""
        return [name.removeprefix(self.folder) for name in self.source.names if name.startswith(self.folder)]

    @property
    def title(self) -> str:
        """Return the source's name for messages."""
        return self.source.title

    def fetch(self, names: Iterable[str]) -> Path:
        """Make the files local; return the folder's path."""
        return self.source.fetch([self.folder + name for name in names]) / self.folder


def _open(repo_or_path: str | Path, hub: HubOptions) -> Source:
    """Open a checkpoint, or the `model/` in it."""
    source = open_source(repo_or_path, MARKERS, hub)
    return _Inside(source, MODEL) if MODEL + TOWER in source.names else source


def _read(source: Source, name: str, variant: str | None, strict: bool) -> tuple[VilaUCheckpoint, list[str]]:
    """Read the configurations and choose the weight files; return the checkpoint and the names of all its files."""
    available = set(source.names)
    if INDEX in available:
        return _read_own(source, available, variant, name, strict)
    if TOWER not in available:
        raise CheckpointNotFoundError(
            f"{source.title} holds no VILA-U checkpoint: neither {INDEX} nor {TOWER} is in it. Give a Hub id or the "
            "checkpoint's folder."
        )
    return _read_released(source, available, variant, name, strict)


def _read_released(
    source: Source, available: set[str], variant: str | None, name: str, strict: bool
) -> tuple[VilaUCheckpoint, list[str]]:
    _require_files(source, available, (*CONFIGS, f"llm/{TOKENIZER}"))
    beside = sorted({GENERATION, ADDED_TOKENS} & available)
    root = source.fetch([*CONFIGS, *beside])
    values = {file: read_json(root / file) for file in (*CONFIGS, *beside)}
    read = Reader(name, strict)
    llama = read.llama(values["llm/config.json"])
    vision, depth = read.tower(values[TOWER], _siglip(source, available, root, read, values[TOWER]))
    projector = read.projector(values["mm_projector/config.json"])
    settings = read.settings(values["config.json"], values["llm/config.json"])
    _check_widths(name, values["config.json"], llama, vision)
    _check_added_tokens(name, values.get(ADDED_TOKENS, {}), llama, settings)
    chosen = _weights(source, available, ("llm", "vision_tower", "mm_projector"), projector, variant)
    files = {part: tuple(root / file for file in names) for part, names in chosen.items()}
    found = VilaUCheckpoint(
        name,
        llama,
        vision,
        depth,
        projector,
        settings,
        read.answers(values[GENERATION]) if GENERATION in values else AnswerDefaults(),
        VilaUDefaults(),
        files["llm"],
        files["vision_tower"],
        files["vision_tower"],
        files["mm_projector"],
        root / "llm" / TOKENIZER,
        released=True,
    )
    return found, [*CONFIGS, *beside, f"llm/{TOKENIZER}", *(file for names in chosen.values() for file in names)]


def _siglip(source: Source, available: Collection[str], root: Path, read: Reader, tower: Mapping[str, Any]) -> SiglipConfig:
    """Return SigLIP's sizes: those of a released id, or of a `config.json` in the named folder inside `vision_tower/`."""
    named = read.siglip_name(tower)
    if named in SIGLIP_CONFIGS:
        return SIGLIP_CONFIGS[named]
    file = f"vision_tower/{named}/config.json"
    if ".." not in Path(named).parts and not Path(named).is_absolute():
        if file in available:
            source.fetch([file])
        if (root / file).is_file():
            return read.siglip(read_json(root / file), file)
    raise ConfigError(
        f"{read.name}: {TOWER}: pretrained_model {named!r} is not a SigLIP whose sizes are known: {', '.join(SIGLIP_CONFIGS)}. "
        f"Put its config.json at {file}."
    )


def _require_files(source: Source, available: Collection[str], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in available]
    if missing:
        raise CheckpointNotFoundError(f"{source.title} lacks {', '.join(missing)}; a VILA-U checkpoint has it. Copy it there.")


def _check_widths(name: str, values: Mapping[str, Any], llama: LlamaConfig, vision: VisionConfig) -> None:
    """Raise ConfigError where `config.json` speaks of other parts than those beside it."""
    for key, width in (("hidden_size", llama.hidden_size), ("mm_hidden_size", vision.hidden_size)):
        if (said := values.get(key)) not in (None, width):
            raise ConfigError(f"{name}: config.json: {key} is {said!r}, and the part's own config says {width}.")


def _check_added_tokens(name: str, added: Mapping[str, Any], llama: LlamaConfig, settings: Settings) -> None:
    """Raise ConfigError unless the added tokens are the last ids, in the order that they are counted in from the end."""
    order = ["<im_start>", "<im_end>", *(["<vi_start>", "<vi_end>"] if settings.mm_use_vi_start_end else [])]
    expected = {token: llama.vocab_size - len(order) + i for i, token in enumerate(order)}
    wrong = [f"{token} is {added[token]}, not {place}" for token, place in expected.items() if added.get(token, place) != place]
    if not settings.mm_use_vi_start_end and "<vi_start>" in added:
        wrong.append("<vi_start> is one, and mm_use_vi_start_end is false")
    if wrong:
        raise ConfigError(
            f"{name}: {ADDED_TOKENS} does not fit vocab_size {llama.vocab_size} and config.json's flags: {'; '.join(wrong)}."
        )


def _read_own(
    source: Source, available: Collection[str], variant: str | None, name: str, strict: bool
) -> tuple[VilaUCheckpoint, list[str]]:
    """Read a folder that `save` wrote. Raises CheckpointNotFoundError or ConfigError."""
    index = read_json(source.fetch([INDEX]) / INDEX)
    if index.get("_class_name") != "VilaUPipeline":
        kind = index.get("_class_name")
        raise ConfigError(f"{name} is a checkpoint of {kind!r}, not of VilaUPipeline; load it by that class.")
    configs = [f"{part}/config.json" for part in OWN_PARTS]
    _require_files(source, available, (*configs, TOKENIZER))
    root = source.fetch(configs)
    projector = Reader(name, strict).projector(read_json(root / "mm_projector/config.json"))
    chosen = _weights(source, available, OWN_PARTS, projector, variant)
    files = {part: tuple(root / file for file in names) for part, names in chosen.items()}
    found = VilaUCheckpoint(
        name,
        read_config(LlamaConfig, root / "llm/config.json", OWN_KEYS, strict=strict),
        read_config(VisionConfig, root / TOWER, OWN_KEYS, strict=strict),
        read_config(DepthConfig, root / "depth_transformer/config.json", OWN_KEYS, strict=strict),
        projector,
        _section(Settings, index, "settings", root),
        _section(AnswerDefaults, index, "answers", root),
        _section(VilaUDefaults, index, "defaults", root),
        files["llm"],
        files["vision_tower"],
        files["depth_transformer"],
        files["mm_projector"],
        root / TOKENIZER,
        released=False,
    )
    return found, [INDEX, *configs, TOKENIZER, *(file for names in chosen.values() for file in names)]


def _weights(
    source: Source, available: Collection[str], parts: Iterable[str], projector: str, variant: str | None
) -> dict[str, tuple[str, ...]]:
    """Choose the weights of each part; none for a projector without layers. Raises CheckpointNotFoundError."""
    stored = projector_layers(projector) > 0
    return {
        part: choose_weights(available, part, STEMS, variant, source.title) if stored or part != "mm_projector" else ()
        for part in parts
    }


def _section(kind: type[ConfigT], index: Mapping[str, Any], key: str, root: Path) -> ConfigT:
    """Read an object of `model_index.json`. Raises ConfigError."""
    values = index.get(key, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{root / INDEX}: {key} must be an object, not {values!r}.")
    return config_from_dict(kind, values, OWN_KEYS, origin=f"{root / INDEX}: {key}", strict=True)


@dataclass(frozen=True)
class Parts:
    """What `save` writes: modules, the tokenizer, and what belongs to them."""

    llama: Llama
    vision_tower: VisionTower
    depth_transformer: DepthTransformer
    projector: Projector
    projector_type: str  # released mm_projector_type
    tokenizer: Tokenizer
    settings: Settings
    answers: AnswerDefaults
    defaults: VilaUDefaults


def save(path: Path, parts: Parts, *, max_shard_size: str) -> Path:
    """Write a checkpoint in the project's own layout. Raises OutputError, or InputError for a bad `max_shard_size`."""
    check_shard_size(max_shard_size)
    modules: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "llm": (parts.llama, config_to_dict(parts.llama.config, OWN_KEYS)),
        "vision_tower": (parts.vision_tower, config_to_dict(parts.vision_tower.config, OWN_KEYS)),
        "depth_transformer": (parts.depth_transformer, config_to_dict(parts.depth_transformer.config, OWN_KEYS)),
        "mm_projector": (parts.projector, {"mm_projector_type": parts.projector_type}),
    }
    writers: dict[str, WritePart] = {
        name: partial(write_module, module, config, max_shard_size=max_shard_size) for name, (module, config) in modules.items()
    }
    writers[TOKENIZER] = lambda file: _write_bytes(file, parts.tokenizer.model)
    index = {
        "_class_name": "VilaUPipeline",
        "settings": config_to_dict(parts.settings, OWN_KEYS),
        "answers": config_to_dict(parts.answers, OWN_KEYS),
        "defaults": config_to_dict(parts.defaults, OWN_KEYS),
    }
    return save_checkpoint(path, writers, index)


def _write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
