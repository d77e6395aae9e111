"""Find, load and save HART's checkpoints: layouts, configuration keys, names of tensors.

Released: `llm/` (transformer; `ema_model.bin` beside `model.safetensors`) and `tokenizer/` (autoencoder). The project's own
(`save_pretrained`): `model_index.json`, `transformer/`, `autoencoder/`, `text_encoder/`.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointNotFoundError, ConfigError
from ..models.hart import HartConfig, HartTransformer
from ..models.parts.autoencoder import Autoencoder, AutoencoderConfig
from ..models.parts.checks import require
from ..models.text import TextEncoder
from .autoencoder import AUTOENCODER_KEYS, AUTOENCODER_SUFFIXES, autoencoder_rules, check_sides
from .configs import (
    BOOKKEEPING,
    LATE_TEMPERATURES,
    MAX_GUIDANCE,
    Keys,
    config_from_dict,
    config_to_dict,
    read_config,
    read_json,
)
from .hub import HUB, HubOptions, Repository
from .layouts import INDEX, Source, choose_weights, open_source, parent
from .saving import WritePart, check_shard_size, save_checkpoint, write_module
from .text_encoder import TEXT_FOLDERS, find_text_encoder, save_text_encoder, text_files
from .var import is_var
from .weights import RenameTable, load_module

RELEASED_TEXT_ENCODER = "mit-han-lab/Qwen2-VL-1.5B-Instruct"
LAYOUTS = {INDEX: ("transformer", "autoencoder"), "llm/config.json": ("llm", "tokenizer")}  # by the file that marks the layout
_EMA = re.compile(r"llm/ema_model[.-].*(safetensors|bin)$")
logger = logging.getLogger(__name__)

TRANSFORMER_KEYS = Keys(
    fixed={
        "model_type": ("hart_transformer_t2i",),
        "attn_type": ("llama",),
        "use_cross_attn": (False,),
        "num_sampling_steps": ("8",),
        "sampler": ("iddpm",),
    },
    ignored=BOOKKEEPING
    | frozenset(
        """
        vae_path drop_rate attn_drop_rate drop_path_rate cond_drop_rate flash_if_available fused_if_available
        diffusion_batch_mul diffusion_head_repeats context_norm_scale
        """.split()
    ),
    released_defaults={"attn_type": "gpt2"},
)
DEFAULTS_KEYS = Keys()

# name[i]: third i of the merged qkv bias; released checkpoints store only those of q and v, and k's is zero.
RENAMES = RenameTable(
    rules=(
        (r"(blocks\.\d+)\.ln_wo_grad\.(.*)", r"\1.norm.\2"),
        (r"(blocks\.\d+)\.attn\.qkv_proj\.weight", r"\1.attn.qkv.weight"),
        (r"(blocks\.\d+)\.attn\.q_bias", r"\1.attn.qkv.bias[0]"),
        (r"(blocks\.\d+)\.attn\.v_bias", r"\1.attn.qkv.bias[2]"),
        (r"(blocks\.\d+)\.attn\.scale_mul_1H11", r"\1.attn.log_scale"),
        (r"(blocks\.\d+)\.ffn\.(gate|up|down)_proj\.(.*)", r"\1.mlp.\2.\3"),
        (r"(blocks\.\d+)\.ffn\.(fc[12])\.(.*)", r"\1.mlp.\2.\3"),
        (r"(blocks\.\d+)\.ada_lin\.1\.(.*)", r"\1.modulation.\2"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation.table"),
        (r"(blocks\.\d+)\.modulation_table", r"\1.modulation.table"),  # as this project saved it before
        (r"head_nm\.ln_wo_grad\.(.*)", r"head.norm.\1"),
        (r"head_nm\.ada_lin\.1\.(.*)", r"head.modulation.\1"),
        (r"head\.(weight|bias)", r"head.linear.\1"),
        (r"lvl_embed\.mlp\.0\.(.*)", r"level_embed.fc1.\1"),
        (r"lvl_embed\.mlp\.2\.(.*)", r"level_embed.fc2.\1"),
        (r"lvl_embed\.weight", r"level_embed.weight"),
        (r"diffloss\.net\.time_embed\.mlp\.0\.(.*)", r"diffusion.time_embed.fc1.\1"),
        (r"diffloss\.net\.time_embed\.mlp\.2\.(.*)", r"diffusion.time_embed.fc2.\1"),
        (r"diffloss\.net\.cond_embed\.(.*)", r"diffusion.condition_embed.\1"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.(.*)", r"diffusion.blocks.\1.norm.\2"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0\.(.*)", r"diffusion.blocks.\1.fc1.\2"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2\.(.*)", r"diffusion.blocks.\1.fc2.\2"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.(.*)", r"diffusion.blocks.\1.modulation.\2"),
        (r"diffloss\.net\.final_layer\.adaLN_modulation\.1\.(.*)", r"diffusion.out_modulation.\1"),
        (r"diffloss\.net\.final_layer\.linear\.(.*)", r"diffusion.out_proj.\1"),
        (r"diffloss\.net\.(input_proj\..*)", r"diffusion.\1"),
        *autoencoder_rules("vae."),
        (r"vae\.(.*)", r"\1"),
    ),
    then=AUTOENCODER_SUFFIXES,
    dropped=r"attn_bias_for_masking|lvl_1L|blocks\.\d+\.attn\.zero_k_bias|vae\.quantize\.ema_vocab_hit_SV|disc\..*",
    kept_in_fp32=r"quantizer\..*",
    zero=r"blocks\.\d+\.attn\.qkv\.bias\[1\]",
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default arguments of a call: `defaults` in `model_index.json`, else those of the released scripts."""

    guidance_scale: float = 4.5
    top_p: float = 0.0
    use_system_prompt: bool = True
    residual_temperature: float = 1.0
    late_temperature: float = 1.0  # of late scales without guidance; benchmarks/fit_late_temperature.py fits it

    def __post_init__(self) -> None:
        """Raise ConfigError for values that no call accepts."""
        guidance = self.guidance_scale
        require(0 <= guidance <= MAX_GUIDANCE, f"guidance_scale must be from 0 to {MAX_GUIDANCE:g}, not {guidance}.")
        require(0 <= self.top_p <= 1, f"top_p must be from 0 to 1, not {self.top_p}.")
        noise = self.residual_temperature
        require(0 <= noise <= 1, f"residual_temperature must be from 0 to 1, not {noise}.")
        (low, high), late = LATE_TEMPERATURES, self.late_temperature
        require(low <= late <= high, f"late_temperature must be from {low:g} to {high:g}, not {late}.")


@dataclass(frozen=True)
class HartCheckpoint:
    """A checkpoint on disk: its configurations are read and its weight files chosen, but no weights are read."""

    name: str  # as the user gave it
    transformer: HartConfig
    autoencoder: AutoencoderConfig
    transformer_files: tuple[Path, ...]
    autoencoder_files: tuple[Path, ...]
    text_encoder: Path | None  # a folder beside the weights, if there is one
    defaults: Defaults = Defaults()

    def load_transformer(self, dtype: torch.dtype | None) -> HartTransformer:
        """Load the transformer on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        vocab_size, channels = self.autoencoder.vocab_size, self.autoencoder.z_channels
        return load_module(
            lambda: HartTransformer(self.transformer, vocab_size=vocab_size, channels=channels),
            self.transformer_files,
            RENAMES,
            dtype=dtype,
        )

    def load_autoencoder(self, dtype: torch.dtype | None) -> Autoencoder:
        """Load the autoencoder on the CPU; `dtype` None keeps the stored one. Raises WeightsError."""
        return load_module(lambda: Autoencoder(self.autoencoder), self.autoencoder_files, RENAMES, dtype=dtype)

    def locate_text_encoder(self, source: str | Path | None, hub: HubOptions) -> Path:
        """Return the folder of the text encoder `source` (id or folder), downloaded if necessary.

        None: the one beside the weights, else the released one. Raises CheckpointNotFoundError or OutputError.
        """
        source = source or self.text_encoder
        try:
            return find_text_encoder(source or RELEASED_TEXT_ENCODER, hub)
        except CheckpointNotFoundError as error:
            if source:
                raise
            raise CheckpointNotFoundError(
                f"No text encoder is beside {self.name}, and the released one can't be had: {error} Or pass text_encoder=...; "
                "or text_encoder=False, and prompt_embeds in the calls."
            ) from error


def find_checkpoint(
    repo_or_path: str | Path,
    *,
    use_ema: bool = True,
    variant: str | None = None,
    with_text_encoder: bool = True,
    strict_config: bool = False,
    hub: HubOptions = HUB,
) -> HartCheckpoint:
    """Find a checkpoint in a folder or on the Hub, from which the needed files are downloaded.

    Raises CheckpointNotFoundError if nothing is found, ConfigError if its configuration is not supported, and OutputError if
    the cache can't be written.
    """
    source = open_source(repo_or_path, LAYOUTS, hub)
    plan = _plan(source, use_ema, variant, with_text_encoder)
    # Check the configuration before downloading weights.
    found = _read(source.fetch(plan.configs()), plan, str(repo_or_path), strict_config)
    source.fetch(plan.files())
    is_cached = isinstance(source, Repository) and source.cached
    if is_cached and use_ema and plan.transformer == "llm" and not _EMA.match(plan.transformer_files[0]):
        logger.warning(
            "%s has no EMA weights, so the plain ones are used; connect once to get them if the Hub has them, or pass "
            "use_ema=False.",
            source.title,
        )
    return found


def inspect_checkpoint(
    repo_or_path: str | Path, *, use_ema: bool = True, variant: str | None = None, hub: HubOptions = HUB
) -> HartCheckpoint:
    """Read a checkpoint's configuration without downloading weights; file lists are empty if the weights are not local.

    Raises as `find_checkpoint` does.
    """
    source = open_source(repo_or_path, LAYOUTS, hub)
    if not isinstance(source, Repository):
        return find_checkpoint(repo_or_path, use_ema=use_ema, variant=variant)
    plan = _parts(source)
    root = source.fetch(plan.configs())
    with suppress(CheckpointNotFoundError):  # not all of it is in the cache
        whole = _plan(source, use_ema, variant, with_text_encoder=False)
        plan = whole if all((root / name).exists() for name in whole.files()) else plan
    return _read(root, plan, str(repo_or_path))


@dataclass(frozen=True)
class _Plan:
    """The needed folders and files, by their names relative to the root."""

    transformer: str
    autoencoder: str
    index: tuple[str, ...]
    transformer_files: tuple[str, ...] = ()
    autoencoder_files: tuple[str, ...] = ()
    text_encoder: str | None = None
    text_files: tuple[str, ...] = ()

    def configs(self) -> list[str]:
        """Return the configuration files, which are fetched first."""
        return [*self.index, f"{self.transformer}/config.json", f"{self.autoencoder}/config.json"]

    def files(self) -> list[str]:
        """Return all needed files."""
        return [*self.configs(), *self.transformer_files, *self.autoencoder_files, *self.text_files]


def _parts(source: Source) -> _Plan:
    """Return the layout of a source, without weights. Raises CheckpointNotFoundError if it has none."""
    available = set(source.names)
    folders = next((parts for marker, parts in LAYOUTS.items() if marker in available), None)
    if folders is None:
        raise CheckpointNotFoundError(
            f"{source.title} holds no HART checkpoint: neither {' nor '.join(LAYOUTS)} is in it. Give a Hub id, the "
            "checkpoint's folder, or its llm/ folder."
            + (" It holds VAR's; load that by VarPipeline." if is_var(available) else "")
        )
    return _Plan(*folders, tuple(available & {INDEX}))


def _plan(source: Source, use_ema: bool, variant: str | None, with_text_encoder: bool) -> _Plan:
    """Choose the needed files. Raises CheckpointNotFoundError if weights are missing."""
    available, origin = set(source.names), source.title
    parts = _parts(source)
    stems = ["ema_model"] if use_ema and parts.transformer == "llm" else []
    text = next((folder for folder in TEXT_FOLDERS if f"{folder}/config.json" in available), None)
    plan = replace(
        parts,
        transformer_files=choose_weights(available, parts.transformer, [*stems, "model", "pytorch_model"], variant, origin),
        autoencoder_files=choose_weights(available, parts.autoencoder, ["model", "pytorch_model"], variant, origin),
        text_encoder=text if with_text_encoder else None,
        text_files=text_files(available, f"{text}/") if with_text_encoder and text else (),
    )
    is_plain = not _EMA.match(plan.transformer_files[0])
    if stems and variant and is_plain and any(_EMA.match(name) for name in available):
        raise CheckpointNotFoundError(
            f"{origin} has EMA weights, but not as variant {variant!r}; pass use_ema=False to take the plain ones, or drop the "
            "variant."
        )
    return plan


def _read(root: Path, plan: _Plan, name: str, strict: bool = False) -> HartCheckpoint:
    """Read the configurations and check that they belong together. Raises ConfigError."""
    index = read_json(root / INDEX) if plan.index else {}
    if (kind := index.get("_class_name", "HartPipeline")) != "HartPipeline":
        raise ConfigError(f"{name} is a checkpoint of {kind!r}, not of HartPipeline; load it by that class.")
    transformer = read_config(HartConfig, root / plan.transformer / "config.json", TRANSFORMER_KEYS, strict=strict)
    autoencoder = read_config(AutoencoderConfig, root / plan.autoencoder / "config.json", AUTOENCODER_KEYS, strict=strict)
    check_sides(name, transformer.patch_nums, autoencoder.v_patch_nums)
    defaults = index.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{root / INDEX}: defaults must be an object, not {defaults!r}.")
    beside = parent(root) / RELEASED_TEXT_ENCODER.split("/")[1]
    return HartCheckpoint(
        name,
        transformer,
        autoencoder,
        tuple(root / file for file in plan.transformer_files),
        tuple(root / file for file in plan.autoencoder_files),
        root / plan.text_encoder if plan.text_encoder else beside if beside.is_dir() else None,
        config_from_dict(Defaults, defaults, DEFAULTS_KEYS, origin=f"{root / INDEX}: defaults", strict=True),
    )


def save(
    path: Path,
    transformer: HartTransformer,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder | None,
    defaults: Defaults,
    *,
    max_shard_size: str,
) -> Path:
    """Write a checkpoint in the project's own layout. Raises OutputError, or InputError for a bad `max_shard_size`."""
    check_shard_size(max_shard_size)
    configs = {
        "transformer": config_to_dict(transformer.config, TRANSFORMER_KEYS),
        "autoencoder": config_to_dict(autoencoder.config, AUTOENCODER_KEYS),
    }
    parts: dict[str, WritePart] = {
        name: partial(write_module, module, configs[name], max_shard_size=max_shard_size)
        for name, module in (("transformer", transformer), ("autoencoder", autoencoder))
    }
    if text_encoder is not None:
        parts["text_encoder"] = partial(save_text_encoder, text_encoder, max_shard_size=max_shard_size)
    index = {"_class_name": "HartPipeline", "defaults": config_to_dict(defaults, DEFAULTS_KEYS)}
    return save_checkpoint(path, parts, index)
