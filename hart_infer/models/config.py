"""What a checkpoint's `config.json` files say, as frozen dataclasses.

Every key is one of four kinds: read (a field below), fixed (the released code has other values, but only this one is
shown to be right by recorded data, so another is refused), ignored (training or bookkeeping, no effect on inference),
or unknown (ignored with a warning, as the released code ignores it; refused on request).
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from ..errors import CheckpointNotFoundError, ConfigError

_BOOKKEEPING = frozenset(
    """
    _name_or_path _attn_implementation_autoset architectures auto_map dtype torch_dtype torchscript model_type
    transformers_version problem_type return_dict return_dict_in_generate output_attentions
    output_hidden_states output_scores id2label label2id num_labels chunk_size_feed_forward is_encoder_decoder
    is_decoder use_bfloat16 add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    tie_word_embeddings pruned_heads prefix finetuning_task task_specific_params tokenizer_class
    tf_legacy_loss bad_words_ids begin_suppress_tokens suppress_tokens bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty remove_invalid_values diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size length_penalty max_length min_length no_repeat_ngram_size num_beams
    num_beam_groups num_return_sequences repetition_penalty temperature top_k top_p typical_p
    """.split()
)

ConfigT = TypeVar("ConfigT", bound="_Config")
logger = logging.getLogger(__name__)


class _Config:
    """Shared reading and checking; the subclasses say which keys they know."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    BOOKKEEPING: ClassVar[frozenset[str]] = _BOOKKEEPING  # of transformers, in its models' configurations
    RELEASED_DEFAULTS: ClassVar[dict[str, Any]] = {}  # of FIXED keys, where a missing key means another value

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any], *, origin: str = "config", strict: bool = False) -> ConfigT:
        """Check every key of `values` and build the configuration; `origin` names the source in messages.

        Keys that nobody knows are named in one warning, or with `strict` refused. Raises ConfigError.
        """
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known) - set(cls.FIXED) - cls.IGNORED - cls.BOOKKEEPING)
        if unknown and strict:
            raise ConfigError(f"{origin} has keys that hart_infer does not know: {', '.join(unknown)}; remove them, or don't "
                              "ask for strict_config.")  # fmt: skip
        if unknown:
            logger.warning("%s has keys that hart_infer does not know and ignores: %s.", origin, ", ".join(unknown))
        for key, allowed in cls.FIXED.items():
            value = values.get(key, cls.RELEASED_DEFAULTS.get(key, allowed[0]))
            if not any(_means(value, choice) for choice in allowed):
                supported = " or ".join(repr(choice) for choice in allowed)
                raise ConfigError(f"{origin}: {key} = {value!r} is not supported; {supported} is.")
        hints = get_type_hints(cls)
        read = {name: _typed(values[name], hints[name], f"{origin}: {name}") for name in known if name in values}
        missing = [name for name in known if name not in values and _required(known[name])]
        if missing:
            raise ConfigError(f"{origin} lacks {', '.join(missing)}.")
        try:
            return cls(**read)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error

    @classmethod
    def from_json(cls: type[ConfigT], path: str | Path, *, strict: bool = False) -> ConfigT:
        """Read a `config.json`. Raises CheckpointNotFoundError, or ConfigError for anything wrong inside it."""
        return cls.from_dict(read_json(path), origin=str(path), strict=strict)

    def to_dict(self) -> dict[str, Any]:
        """All that `from_dict` needs to give an equal configuration, as JSON types."""
        read = asdict(self)  # type: ignore[call-overload]
        fixed = {key: allowed[0] for key, allowed in self.FIXED.items()}
        return fixed | {key: list(value) if isinstance(value, tuple) else value for key, value in read.items()}

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(0 < value < math.inf, f"{name} must be positive, not {value}.")

    def _require_rising(self, name: str) -> None:
        sides = getattr(self, name)
        self._require(
            len(sides) > 1 and sides[0] == 1 and all(a < b for a, b in zip(sides, sides[1:], strict=False)),
            f"{name} must rise from 1 and have at least two entries, not {list(sides)}.",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(_Config):
    """The scalable-resolution transformer and its residual diffusion (paper section 3; released `HARTForT2IConfig`)."""

    patch_nums: tuple[int, ...]
    context_token: int
    context_dim: int
    embed_dim: int
    num_heads: int
    depth: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    mlp_type: str = "gpt2"
    disable_aln: bool = False
    shared_aln: bool = False
    sep_aln_pooling_mode: str = "max"
    attn_l2_norm: bool = False
    use_timestep_embed: bool = False
    use_context_norm: bool = False
    diff_width: int = 1024
    diff_depth: int = 6

    FIXED = {
        "model_type": ("hart_transformer_t2i",),
        "attn_type": ("llama",),
        "use_cross_attn": (False,),
        "num_sampling_steps": ("8",),
        "sampler": ("iddpm",),
    }
    IGNORED = frozenset(
        """
    vae_path drop_rate attn_drop_rate drop_path_rate cond_drop_rate flash_if_available fused_if_available
    diffusion_batch_mul diffusion_head_repeats context_norm_scale
    """.split()
    )
    RELEASED_DEFAULTS = {"attn_type": "gpt2"}

    def __post_init__(self) -> None:
        """Refuse sizes and combinations that no recorded data covers."""
        self._require_rising("patch_nums")
        self._require_positive("context_token", "context_dim", "embed_dim", "num_heads", "depth", "mlp_ratio", "norm_eps")
        self._require_positive("diff_width", "diff_depth")
        self._require(
            self.embed_dim % self.num_heads == 0 and self.head_dim % 4 == 0,
            f"embed_dim {self.embed_dim} must split into {self.num_heads} heads of a multiple of 4.",
        )
        for name, allowed in (("mlp_type", ("gpt2", "llama")), ("sep_aln_pooling_mode", ("avg", "max"))):
            value = getattr(self, name)
            self._require(value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
        self._require(self.disable_aln or not self.shared_aln, "shared_aln = true without disable_aln = true is not supported.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP: SwiGLU rounds up to a multiple of 256."""
        if self.mlp_type == "llama":
            return (int(self.embed_dim * self.mlp_ratio * 2 / 3) + 255) // 256 * 256
        return round(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(_Config):
    """The hybrid tokenizer: VQGAN encoder and decoder, multi-scale quantizer (paper section 3.1; `HARTAutoEncoderConfig`)."""

    v_patch_nums: tuple[int, ...]
    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    share_quant_resi: int = 4
    quantizer_type: str = "var"
    norm_groups: int = 32  # of the group norms; the released code has no such key, and 32

    FIXED = {
        "model_type": ("hart_autoencoder_with_disc", "hart_autoencoder"),
        "using_znorm": (False,),
        "quant_conv_ks": (3,),
        "quant_resi": (0.5,),
        "disable_quant_resi": (False,),
        "double_decoder": (False,),
        "default_qresi_counts": (0,),
    }
    IGNORED = frozenset(
        """
    dropout beta levels hybrid freeze_codebook_for_hybrid test_mode
    """.split()
    )

    def __post_init__(self) -> None:
        """Refuse values that no recorded data covers."""
        self._require_rising("v_patch_nums")
        self._require_positive("vocab_size", "z_channels", "ch", "norm_groups")
        self._require(
            len(self.ch_mult) > 0 and min(self.ch_mult) > 0,
            f"ch_mult must have positive entries, not {list(self.ch_mult)}.",
        )
        self._require(self.share_quant_resi in (0, 1, 4), f"share_quant_resi must be 0, 1 or 4, not {self.share_quant_resi}.")
        self._require(
            self.quantizer_type in ("var", "var_hybrid"),
            f"quantizer_type must be var or var_hybrid, not {self.quantizer_type!r}.",
        )
        self._require(
            self.ch % self.norm_groups == 0, f"ch must be a multiple of norm_groups {self.norm_groups}, not {self.ch}."
        )

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along a side."""
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class Defaults(_Config):
    """What a call takes where the caller says nothing: `defaults` in a `model_index.json`; else as the released scripts do."""

    guidance_scale: float = 4.5
    top_p: float = 0.0
    use_system_prompt: bool = True

    BOOKKEEPING = frozenset()

    def __post_init__(self) -> None:
        """Refuse what no call may have."""
        self._require(0 <= self.guidance_scale < math.inf, f"guidance_scale must be 0 or more, not {self.guidance_scale}.")
        self._require(0 <= self.top_p <= 1, f"top_p must be from 0 to 1, not {self.top_p}.")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from `path`; raises CheckpointNotFoundError or ConfigError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist; a checkpoint needs it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(values).__name__}.")
    return values


def _means(value: Any, allowed: Any) -> bool:
    """Whether the released code would take `value` for `allowed`: flags by their truth, text by how it is written."""
    if isinstance(allowed, bool):
        return bool(value) is allowed
    if isinstance(allowed, str):
        return str(value) == allowed
    return isinstance(value, int | float) and not isinstance(value, bool) and value == allowed


def _required(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is MISSING and field.default_factory is MISSING


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Convert a JSON value to a field's type; lists become tuples, whole floats stay exact."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, bool, str) and type(value) is hint:
        return value
    if hint is bool and type(value) is int and value in (0, 1):
        return bool(value)
    is_int_list = isinstance(value, list | tuple) and all(type(item) is int for item in value)
    if hint == tuple[int, ...] and is_int_list:
        return tuple(value)
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be of type {'list of int' if hint == tuple[int, ...] else name}, not {value!r}.")
