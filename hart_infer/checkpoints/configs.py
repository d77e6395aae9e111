"""Read a checkpoint's `config.json` into a configuration, and check every key.

A key is one of four kinds: a field of the configuration; fixed (the released code has other values, but only these are
verified by recorded data, and others are refused); ignored (training or bookkeeping, no effect on inference); or unknown
(ignored with a warning, as the released code ignores it; refused on request).
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..errors import CheckpointNotFoundError, ConfigError

MAX_JSON_BYTES = 2**24  # a limit; real files have a few KB
LATE_TEMPERATURES = (0.01, 100.0)  # the least and the most: far beyond useful values
MAX_GUIDANCE = 1000.0  # above useful values, below what overflows the logits
ConfigT = TypeVar("ConfigT")
logger = logging.getLogger(__name__)

# Keys that transformers writes into its models' configurations.
BOOKKEEPING = frozenset(
    """
    _name_or_path _attn_implementation_autoset architectures auto_map dtype torch_dtype torchscript
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


@dataclass(frozen=True)
class Keys:
    """Accepted keys of a file besides the configuration's fields."""

    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # the values that are supported
    ignored: frozenset[str] = frozenset()
    # What a missing fixed key means, if not fixed[key][0].
    released_defaults: Mapping[str, Any] = field(default_factory=dict)


def config_from_dict(
    kind: type[ConfigT], values: Mapping[str, Any], keys: Keys, *, origin: str = "config", strict: bool = False
) -> ConfigT:
    """Check every key of `values` and build a configuration of `kind`; `origin` names the source in messages.

    Unknown keys: one warning, or ConfigError with `strict`. Raises ConfigError for unsupported, ill-typed or missing values.
    """
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = ", ".join(sorted(set(values) - set(known) - set(keys.fixed) - keys.ignored))
    if unknown and strict:
        raise ConfigError(f"{origin} has keys that hart_infer does not know: {unknown}; remove them, or drop strict_config.")
    if unknown:
        logger.warning("%s has keys that hart_infer does not know and ignores: %s.", origin, unknown)
    for key, allowed in keys.fixed.items():
        value = values.get(key, keys.released_defaults.get(key, allowed[0]))
        if not any(_means(value, choice) for choice in allowed):
            supported = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"{origin}: {key} = {value!r} is not supported; {supported} is.")
    hints = get_type_hints(kind)
    read = {name: _typed(values[name], hints[name], f"{origin}: {name}") for name in known if name in values}
    missing = [name for name, item in known.items() if name not in values and item.default is MISSING]
    if missing:
        raise ConfigError(f"{origin} lacks {', '.join(missing)}.")
    try:
        return kind(**read)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def read_config(kind: type[ConfigT], path: Path, keys: Keys, *, strict: bool = False) -> ConfigT:
    """Read a `config.json` as `config_from_dict` does. Raises CheckpointNotFoundError, or ConfigError for its contents."""
    return config_from_dict(kind, read_json(path), keys, origin=str(path), strict=strict)


def config_to_dict(config: Any, keys: Keys) -> dict[str, Any]:
    """Return a JSON-ready dict from which `config_from_dict` rebuilds `config`."""
    fixed = {key: allowed[0] for key, allowed in keys.fixed.items()}
    return fixed | {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from the file at `path`; raises CheckpointNotFoundError or ConfigError."""
    values = read_json_value(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(values).__name__}.")
    return values


def read_json_value(path: Path) -> Any:
    """Read any JSON value from the file at `path`; raises CheckpointNotFoundError or ConfigError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is not a file; a checkpoint's configuration is one.")
        if status.st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is too large for a configuration ({status.st_size:,} bytes).")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist; a checkpoint needs it.") from error
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}).") from error


def _means(value: Any, allowed: Any) -> bool:
    """Return whether the released code treats `value` as `allowed`: bools by truth, strings by str(), numbers by ==."""
    if isinstance(allowed, bool):
        return bool(value) is allowed
    if isinstance(allowed, str):
        return str(value) == allowed
    return isinstance(value, int | float) and not isinstance(value, bool) and value == allowed


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Convert lists of ints to tuples, ints to floats, 0 and 1 to bools, as `hint` asks. Raises ConfigError for other types."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{where} must be a number that fits a float.") from error
    if hint in (int, float, bool, str) and type(value) is hint:
        return value
    if hint is bool and type(value) is int and value in (0, 1):
        return bool(value)
    is_int_list = isinstance(value, list | tuple) and all(type(item) is int for item in value)
    if hint == tuple[int, ...] and is_int_list:
        return tuple(value)
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be of type {'list of int' if hint == tuple[int, ...] else name}, not {value!r}.")
