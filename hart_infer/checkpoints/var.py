"""Find, load and save VAR's checkpoints: layouts, configuration from tensors, names of tensors.

Released (`FoundationVision/var`): flat pickles without a configuration, `var_d16.pth` and its like and one `vae_*.pth`. The
project's own (`save_pretrained`): `model_index.json`, `transformer/`, `autoencoder/`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointNotFoundError, ConfigError, WeightsError
from ..models.parts.autoencoder import Autoencoder, AutoencoderConfig
from ..models.parts.checks import require
from ..models.var import VarConfig, VarTransformer
from .autoencoder import AUTOENCODER_KEYS, AUTOENCODER_SUFFIXES, autoencoder_rules, check_sides
from .configs import LATE_TEMPERATURES, MAX_GUIDANCE, Keys, config_from_dict, config_to_dict, read_config, read_json
from .hub import HUB, HubOptions
from .layouts import INDEX, Source, choose_weights, open_source
from .saving import CLASSES, WritePart, check_shard_size, save_checkpoint, write_module
from .weights import RenameTable, load_module, read_tensor, tensor_shapes

TRANSFORMER_KEYS = Keys()
DEFAULTS_KEYS = Keys()
_PICKLE = re.compile(r"var_(?P<variant>.+)\.pth")
_AUTOENCODER_PICKLE = re.compile(r"vae_.+\.pth")
MAX_TOKENS = 2**24  # of all scales, a limit; the released models have 680 or 2240
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

RENAMES = RenameTable(
    rules=(
        (r"class_emb\.weight", r"class_embed.weight"),
        (r"lvl_embed\.weight", r"level_embed.weight"),
        (r"pos_start", r"start"),
        (r"pos_1LC", r"position_embed.weight"),
        (r"shared_ada_lin\.1\.(.*)", r"shared_modulation.\1"),
        (r"(blocks\.\d+)\.attn\.mat_qkv\.weight", r"\1.attn.qkv.weight"),
        (r"(blocks\.\d+)\.attn\.q_bias", r"\1.attn.qkv.bias[0]"),
        (r"(blocks\.\d+)\.attn\.v_bias", r"\1.attn.qkv.bias[2]"),
        (r"(blocks\.\d+)\.attn\.scale_mul_1H11", r"\1.attn.log_scale"),
        (r"(blocks\.\d+)\.ffn\.(fc[12])\.(.*)", r"\1.mlp.\2.\3"),
        (r"(blocks\.\d+)\.ada_lin\.1\.(.*)", r"\1.modulation.\2"),
        (r"(blocks\.\d+)\.ada_gss", r"\1.modulation.table"),
        (r"head_nm\.ada_lin\.1\.(.*)", r"head.modulation.\1"),
        (r"head\.(weight|bias)", r"head.linear.\1"),
        *autoencoder_rules(""),
    ),
    then=AUTOENCODER_SUFFIXES,
    dropped=r"attn_bias_for_masking|lvl_1L|blocks\.\d+\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV",
    kept_in_fp32=r"quantizer\..*",
    zero=r"blocks\.\d+\.attn\.qkv\.bias\[1\]",
    batched=r"start|position_embed\.weight|blocks\.\d+\.modulation\.table",
)


@dataclass(frozen=True, kw_only=True)
class VarDefaults:
    """Default arguments of a call: `defaults` in `model_index.json`, else those that the released notebook draws with."""

    guidance_scale: float = 4.0
    top_k: int = 900
    top_p: float = 0.95
    late_temperature: float = 1.0  # of late scales without guidance; benchmarks/fit_late_temperature.py fits it

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no call accepts."""
        guidance = self.guidance_scale
        require(0 <= guidance <= MAX_GUIDANCE, f"guidance_scale must be from 0 to {MAX_GUIDANCE:g}, not {guidance}.")
        require(self.top_k >= 0, f"top_k must be 0 or more, not {self.top_k}.")
        require(0 <= self.top_p <= 1, f"top_p must be from 0 to 1, not {self.top_p}.")
        (low, high), late = LATE_TEMPERATURES, self.late_temperature
        require(low <= late <= high, f"late_temperature must be from {low:g} to {high:g}, not {late}.")


@dataclass(frozen=True)
class VarCheckpoint:
    """A checkpoint on disk: its configurations are read and its weight files chosen, but no weights are read."""

    name: str  # as the user gave it
    transformer: VarConfig
    autoencoder: AutoencoderConfig
    transformer_files: tuple[Path, ...]
    autoencoder_files: tuple[Path, ...]
    classes: Path | None  # the file of names beside the weights, if there is one
    defaults: VarDefaults = VarDefaults()

    def load_transformer(self, dtype: torch.dtype | None) -> VarTransformer:
        """Load the transformer on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        vocab_size, channels = self.autoencoder.vocab_size, self.autoencoder.z_channels
        return load_module(
            lambda: VarTransformer(self.transformer, vocab_size=vocab_size, channels=channels),
            self.transformer_files,
            RENAMES,
            dtype=dtype,
        )

    def load_autoencoder(self, dtype: torch.dtype | None) -> Autoencoder:
        """Load the autoencoder on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        return load_module(lambda: Autoencoder(self.autoencoder), self.autoencoder_files, RENAMES, dtype=dtype)


def is_var(names: Collection[str]) -> bool:
    """Return whether a folder's file names are those of a released VAR checkpoint."""
    return any(_PICKLE.fullmatch(name) for name in names)


def find_checkpoint(repo_or_path: str | Path, *, variant: str | None = None, hub: HubOptions = HUB) -> VarCheckpoint:
    """Find a checkpoint in a folder or on the Hub, from which only the needed files are downloaded.

    `variant`: which `var_<variant>.pth`, such as "d16"; needed where there are several. Raises CheckpointNotFoundError if
    nothing is found, ConfigError or WeightsError for files that are not VAR's, and OutputError if the cache can't be written.
    """
    source = open_source(repo_or_path, (INDEX,), hub)
    available = set(source.names)
    if INDEX in available:
        return _read_own(source, available, variant, str(repo_or_path))
    if not is_var(available):
        hint = " It holds HART's; load that by HartPipeline." if "tokenizer/config.json" in available else ""
        raise CheckpointNotFoundError(
            f"{source.title} holds no VAR checkpoint: neither {INDEX} nor a var_*.pth is in it. Give a Hub id or the "
            f"checkpoint's folder.{hint}"
        )
    transformer, autoencoder = _pickles(available, variant, source.title)
    root = source.fetch([transformer, autoencoder, *available & {CLASSES}])
    return _read_released(root, transformer, autoencoder, str(repo_or_path))


def _pickles(names: Collection[str], variant: str | None, origin: str) -> tuple[str, str]:
    """Choose the transformer's and the autoencoder's pickle. Raises CheckpointNotFoundError."""
    found = {match["variant"]: match.string for name in sorted(names) if (match := _PICKLE.fullmatch(name))}
    if variant is None and len(found) > 1:
        raise CheckpointNotFoundError(
            f"{origin} has several VAR models; choose one by variant= (--variant): {', '.join(found)}."
        )
    chosen = next(iter(found)) if variant is None else variant
    if chosen not in found:
        raise CheckpointNotFoundError(f"{origin} has no variant {chosen!r}; it has {', '.join(found)}.")
    autoencoders = sorted(name for name in names if _AUTOENCODER_PICKLE.fullmatch(name))
    if len(autoencoders) != 1:
        have = f"has {len(autoencoders)} ({', '.join(autoencoders)})" if autoencoders else "has none"
        raise CheckpointNotFoundError(f"{origin} must hold one autoencoder, vae_*.pth, and {have}.")
    return found[chosen], autoencoders[0]


def _read_released(root: Path, transformer: str, autoencoder: str, name: str) -> VarCheckpoint:
    """Read the configurations from the tensors of two pickles. Raises WeightsError or ConfigError."""
    transformer_file, autoencoder_file = root / transformer, root / autoencoder
    shapes, autoencoder_shapes = tensor_shapes(transformer_file), tensor_shapes(autoencoder_file)
    try:
        config = config_from_tensors(shapes, transformer_file)
        autoencoder_config = autoencoder_from_tensors(autoencoder_shapes, autoencoder_file, config.patch_nums)
    except ConfigError as error:
        raise ConfigError(f"{transformer_file} with {autoencoder_file}: {error}") from error
    expected = (autoencoder_config.vocab_size, autoencoder_config.z_channels)
    found = (shapes["head.weight"][0][0], shapes["word_embed.weight"][0][1])
    if expected != found:
        raise ConfigError(
            f"{transformer_file} draws {found[0]} codes of {found[1]} channels, and {autoencoder_file} has {expected[0]} of "
            f"{expected[1]}; both must come from the same checkpoint."
        )
    classes = root / CLASSES
    return VarCheckpoint(
        name,
        config,
        autoencoder_config,
        (transformer_file,),
        (autoencoder_file,),
        classes if classes.is_file() else None,
    )


def config_from_tensors(shapes: Shapes, file: Path) -> VarConfig:
    """Return the configuration that a released transformer's tensors imply. Raises WeightsError or ConfigError."""
    _require_tensors(
        shapes,
        {
            "lvl_1L": 2, "pos_1LC": 3, "class_emb.weight": 2, "word_embed.weight": 2, "head.weight": 2,
            "blocks.0.attn.scale_mul_1H11": 4, "blocks.0.ffn.fc1.weight": 2,
        },
        file,
        "a VAR transformer",
    )  # fmt: skip
    shared = {"blocks.0.ada_gss": "blocks.0.ada_gss" in shapes, "shared_ada_lin.1.weight": "shared_ada_lin.1.weight" in shapes}
    if len(set(shared.values())) > 1:
        absent, present = sorted(shared, key=lambda name: shared[name])
        raise WeightsError(f"{file} has {present} of a shared adaLN and lacks {absent}; download or copy it again.")
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,4})\.", name))]
    embed_dim = shapes["word_embed.weight"][0][0]
    return VarConfig(
        patch_nums=_sides(file),
        num_classes=shapes["class_emb.weight"][0][0] - 1,
        embed_dim=embed_dim,
        num_heads=shapes["blocks.0.attn.scale_mul_1H11"][0][1],
        depth=max(blocks) + 1,
        mlp_ratio=shapes["blocks.0.ffn.fc1.weight"][0][0] / max(embed_dim, 1),
        shared_aln="blocks.0.ada_gss" in shapes,
    )


def autoencoder_from_tensors(shapes: Shapes, file: Path, patch_nums: tuple[int, ...]) -> AutoencoderConfig:
    """Return the configuration that a released autoencoder's tensors imply. Raises WeightsError or ConfigError."""
    _require_tensors(shapes, {"encoder.conv_in.weight": 4, "quantize.embedding.weight": 2}, file, "VAR's autoencoder")
    channels = max(shapes["encoder.conv_in.weight"][0][0], 1)
    level = re.compile(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = {int(match[1]): shapes[name][0][0] for name in shapes if (match := level.fullmatch(name))}
    per_scale = any(re.fullmatch(r"quantize\.quant_resi\.\d+\.weight", name) for name in shapes)
    shared = sum(re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.\d+\.weight", name) is not None for name in shapes)
    vocab_size, z_channels = shapes["quantize.embedding.weight"][0]
    return AutoencoderConfig(
        v_patch_nums=patch_nums,
        vocab_size=vocab_size,
        z_channels=z_channels,
        ch=channels,
        ch_mult=tuple(width // channels for _, width in sorted(widths.items())),
        share_quant_resi=0 if per_scale else shared or 1,
    )


def _require_tensors(shapes: Shapes, wanted: Mapping[str, int], file: Path, what: str) -> None:
    """Raise WeightsError unless every wanted tensor is there, with so many dimensions."""
    missing = [name for name, dimensions in wanted.items() if len(shapes.get(name, ((), None))[0]) != dimensions]
    if missing:
        raise WeightsError(f"{file} is not {what}: it lacks {', '.join(missing)}, or has it in another shape.")


def _sides(file: Path) -> tuple[int, ...]:
    """Return the sides of the scales from `lvl_1L`, the scale of every position. Raises WeightsError."""
    levels = read_tensor(file, "lvl_1L")
    is_row = levels.dtype == torch.int64 and levels.shape[0] == 1 and levels.shape[1] < MAX_TOKENS
    levels = levels[0] if is_row else torch.empty(0, dtype=torch.int64)
    plain = bool((levels >= 0).all() and (levels < len(levels)).all())
    lengths = torch.bincount(levels).tolist() if plain else []
    sides = tuple(math.isqrt(length) for length in lengths)
    if not sides or [side * side for side in sides] != lengths or not bool((levels.diff() >= 0).all()):
        raise WeightsError(f"{file} is not a VAR transformer: lvl_1L does not count off squares, one per scale.")
    return sides


def _read_own(source: Source, available: Collection[str], variant: str | None, name: str) -> VarCheckpoint:
    """Read a folder that `save` wrote. Raises CheckpointNotFoundError or ConfigError."""
    configs = [INDEX, "transformer/config.json", "autoencoder/config.json"]
    root = source.fetch([file for file in configs if file in available])
    index = read_json(root / INDEX)
    if index.get("_class_name") != "VarPipeline":
        raise ConfigError(f"{name} is a checkpoint of {index.get('_class_name')!r}, not of VarPipeline; load it by that class.")
    transformer = read_config(VarConfig, root / configs[1], TRANSFORMER_KEYS)
    autoencoder = read_config(AutoencoderConfig, root / configs[2], AUTOENCODER_KEYS)
    check_sides(name, transformer.patch_nums, autoencoder.v_patch_nums)
    transformer_files, autoencoder_files = (
        choose_weights(available, part, ["model", "pytorch_model"], variant, source.title)
        for part in ("transformer", "autoencoder")
    )
    source.fetch([*configs, *transformer_files, *autoencoder_files, *({CLASSES} & set(available))])
    defaults = index.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{root / INDEX}: defaults must be an object, not {defaults!r}.")
    classes = root / CLASSES
    return VarCheckpoint(
        name,
        transformer,
        autoencoder,
        tuple(root / file for file in transformer_files),
        tuple(root / file for file in autoencoder_files),
        classes if classes.is_file() else None,
        config_from_dict(VarDefaults, defaults, DEFAULTS_KEYS, origin=f"{root / INDEX}: defaults", strict=True),
    )


def save(
    path: Path,
    transformer: VarTransformer,
    autoencoder: Autoencoder,
    defaults: VarDefaults,
    *,
    class_names: Sequence[Sequence[str]] | None,
    max_shard_size: str,
) -> Path:
    """Write a checkpoint in the project's own layout. Raises OutputError, or InputError for a bad `max_shard_size`."""
    check_shard_size(max_shard_size)
    parts: dict[str, WritePart] = {
        name: partial(write_module, module, config, max_shard_size=max_shard_size)
        for name, module, config in (
            ("transformer", transformer, config_to_dict(transformer.config, TRANSFORMER_KEYS)),
            ("autoencoder", autoencoder, config_to_dict(autoencoder.config, AUTOENCODER_KEYS)),
        )
    }
    if class_names is not None:
        parts[CLASSES] = lambda file: _write_classes(class_names, file)
    index = {"_class_name": "VarPipeline", "defaults": config_to_dict(defaults, DEFAULTS_KEYS)}
    return save_checkpoint(path, parts, index)


def _write_classes(names: Sequence[Sequence[str]], file: Path) -> None:
    file.write_text("[\n" + ",\n".join(json.dumps(each) for each in names) + "\n]\n", encoding="utf-8")
