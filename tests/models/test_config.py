"""What a checkpoint's JSON may say, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hart_infer.errors import CheckpointNotFoundError, ConfigError
from hart_infer.models.config import AutoencoderConfig, TransformerConfig

CONFIGS = {TransformerConfig: "llm/config.json", AutoencoderConfig: "tokenizer/config.json"}
Config = type[TransformerConfig] | type[AutoencoderConfig]
both = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)

TRANSFORMER: dict[str, Any] = {
    "attn_type": "llama",
    "patch_nums": [1, 2, 4],
    "context_token": 12,
    "context_dim": 48,
    "embed_dim": 128,
    "num_heads": 2,
    "depth": 3,
}
AUTOENCODER: dict[str, Any] = {"v_patch_nums": [1, 2, 4]}
MINIMAL: dict[Any, dict[str, Any]] = {TransformerConfig: TRANSFORMER, AutoencoderConfig: AUTOENCODER}
REMOVED = object()


def refusal(config: Config, **changes: Any) -> str:
    """What the error says of a minimal configuration with changes."""
    values = {key: value for key, value in (MINIMAL[config] | changes).items() if value is not REMOVED}
    with pytest.raises(ConfigError) as caught:
        config.from_dict(values, origin="x/config.json")
    message = str(caught.value)
    assert message.startswith("x/config.json")
    return message


@both
def test_released_layout_reads(config: Config, hart_tiny: Path) -> None:
    file = hart_tiny / CONFIGS[config]
    stored = json.loads(file.read_text())
    read = config.from_json(file)
    for field in dataclasses.fields(read):
        value = getattr(read, field.name)
        expected = stored.get(field.name, field.default)  # norm_groups is this project's own
        assert (list(value) if isinstance(value, tuple) else value) == expected


@both
def test_to_dict_gives_it_back_as_json(config: Config, hart_tiny: Path) -> None:
    read = config.from_json(hart_tiny / CONFIGS[config])
    assert config.from_dict(json.loads(json.dumps(read.to_dict()))) == read
    assert set(config.FIXED) <= set(read.to_dict())  # written out, so that no reader has to guess


@both
def test_frozen_and_keyword_only(config: Config) -> None:
    read = config.from_dict(MINIMAL[config])
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.patch_nums = (1, 2)  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        config((1, 2, 4))  # type: ignore[call-arg, misc]
    assert len({read, config.from_dict(MINIMAL[config])}) == 1


def test_derived_sizes() -> None:
    read = TransformerConfig.from_dict(TRANSFORMER | {"mlp_type": "llama"})
    assert (read.head_dim, read.mlp_dim) == (64, 512)  # 128 * 4 * 2 / 3 = 341, up to a multiple of 256
    assert TransformerConfig.from_dict(TRANSFORMER | {"mlp_type": "gpt2"}).mlp_dim == 512
    assert AutoencoderConfig.from_dict(AUTOENCODER).downsample == 16
    assert AutoencoderConfig.from_dict(AUTOENCODER | {"ch_mult": [1, 1, 2]}).downsample == 4


@both
def test_unknown_keys_are_ignored_with_one_warning_that_names_them(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    values = MINIMAL[config] | {"rope_theta": 10000, "a_new_trick": True}
    assert config.from_dict(values, origin="x/config.json") == config.from_dict(MINIMAL[config])
    (record,) = caplog.records
    assert record.getMessage().startswith("x/config.json has keys")
    assert "a_new_trick, rope_theta" in record.getMessage()


@both
def test_strict_reading_refuses_unknown_keys(config: Config) -> None:
    with pytest.raises(ConfigError, match="a_new_trick, rope_theta"):
        config.from_dict(MINIMAL[config] | {"rope_theta": 10000, "a_new_trick": True}, strict=True)


@both
@pytest.mark.parametrize("key", ["architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "id2label"])
def test_bookkeeping_is_ignored(config: Config, key: str) -> None:
    assert config.from_dict(MINIMAL[config] | {key: "anything"}) == config.from_dict(MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "key"),
    [(config, key) for config in CONFIGS for key in sorted(config.IGNORED)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_keys_are_ignored(config: Config, key: str) -> None:
    assert config.from_dict(MINIMAL[config] | {key: "anything"}) == config.from_dict(MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (TransformerConfig, "attn_type", "gpt2"),
        (TransformerConfig, "attn_type", REMOVED),  # the released default is gpt2
        (TransformerConfig, "use_cross_attn", True),
        (TransformerConfig, "num_sampling_steps", "100"),
        (TransformerConfig, "use_cross_attn", "false"),  # a text that is there is true
        (TransformerConfig, "num_sampling_steps", 9),
        (AutoencoderConfig, "quant_conv_ks", "3"),
        (TransformerConfig, "num_sampling_steps", ""),
        (TransformerConfig, "sampler", "dpm"),
        (TransformerConfig, "sampler", None),
        (TransformerConfig, "model_type", "hart_transformer_c2i"),
        (TransformerConfig, "model_type", "hart_autoencoder"),
        (AutoencoderConfig, "model_type", "hart_transformer_t2i"),
        (AutoencoderConfig, "using_znorm", True),
        (AutoencoderConfig, "quant_resi", 0.25),
        (AutoencoderConfig, "quant_conv_ks", 1),
        (AutoencoderConfig, "disable_quant_resi", True),
        (AutoencoderConfig, "double_decoder", True),
        (AutoencoderConfig, "default_qresi_counts", 3),
    ],
    ids=lambda value: "missing" if value is REMOVED else getattr(value, "__name__", repr(value)),
)
def test_unsupported_value_is_refused_by_name_with_the_supported_one(config: Config, key: str, value: Any) -> None:
    message = refusal(config, **{key: value})
    assert key in message
    assert "not supported" in message
    assert repr(config.FIXED[key][0]) in message
    shown = config.RELEASED_DEFAULTS[key] if value is REMOVED else value
    assert repr(shown) in message


@pytest.mark.parametrize(
    ("config", "key"),
    [(config, key) for config in CONFIGS for key in sorted(config.FIXED) if key not in config.RELEASED_DEFAULTS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fixed_key_may_be_missing_or_say_what_is_supported(config: Config, key: str) -> None:
    plain = config.from_dict(MINIMAL[config])
    for value in config.FIXED[key]:
        assert config.from_dict(MINIMAL[config] | {key: value}) == plain


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (TransformerConfig, "num_sampling_steps", 8),
        (TransformerConfig, "use_cross_attn", None),
        (TransformerConfig, "use_cross_attn", 0),
        (AutoencoderConfig, "quant_conv_ks", 3.0),
        (AutoencoderConfig, "double_decoder", 0),
    ],
)
def test_a_fixed_key_is_compared_as_the_released_code_would(config: Config, key: str, value: Any) -> None:
    assert config.from_dict(MINIMAL[config] | {key: value}) == config.from_dict(MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (TransformerConfig, {"mlp_type": "moe"}, "mlp_type must be one of gpt2, llama, not 'moe'"),
        (TransformerConfig, {"sep_aln_pooling_mode": "min"}, "sep_aln_pooling_mode must be one of avg, max, not 'min'"),
        (TransformerConfig, {"shared_aln": True}, "shared_aln = true without disable_aln"),
        (TransformerConfig, {"embed_dim": 130, "num_heads": 4}, "embed_dim 130 must split into 4 heads"),
        (TransformerConfig, {"embed_dim": 12, "num_heads": 2}, "embed_dim 12 must split into 2 heads of a multiple of 4"),
        (TransformerConfig, {"patch_nums": []}, "patch_nums must rise from 1"),
        (TransformerConfig, {"patch_nums": [1]}, "patch_nums must rise from 1"),
        (TransformerConfig, {"patch_nums": [2, 4]}, "patch_nums must rise from 1"),
        (TransformerConfig, {"patch_nums": [1, 4, 4]}, "patch_nums must rise from 1"),
        (TransformerConfig, {"patch_nums": [1, 4, 2]}, "patch_nums must rise from 1"),
        (TransformerConfig, {"depth": 0}, "depth must be positive, not 0"),
        (TransformerConfig, {"num_heads": 0}, "num_heads must be positive, not 0"),
        (TransformerConfig, {"context_token": -1}, "context_token must be positive, not -1"),
        (TransformerConfig, {"mlp_ratio": 0}, "mlp_ratio must be positive, not 0"),
        (TransformerConfig, {"mlp_ratio": float("nan")}, "mlp_ratio must be positive, not nan"),
        (TransformerConfig, {"norm_eps": float("inf")}, "norm_eps must be positive, not inf"),
        (AutoencoderConfig, {"v_patch_nums": [1, 1]}, "v_patch_nums must rise from 1"),
        (AutoencoderConfig, {"share_quant_resi": 2}, "share_quant_resi must be 0, 1 or 4, not 2"),
        (AutoencoderConfig, {"quantizer_type": "fsq"}, "quantizer_type must be var or var_hybrid, not 'fsq'"),
        (AutoencoderConfig, {"ch": 48}, "ch must be a multiple of norm_groups 32"),
        (AutoencoderConfig, {"norm_groups": 0}, "norm_groups must be positive"),
        (AutoencoderConfig, {"ch": 0}, "ch must be positive"),
        (AutoencoderConfig, {"ch_mult": []}, "ch_mult must have positive entries"),
        (AutoencoderConfig, {"ch_mult": [1, 0]}, "ch_mult must have positive entries"),
        (AutoencoderConfig, {"z_channels": 0}, "z_channels must be positive"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value).replace("\n", " ")[:40],
)
def test_impossible_values_are_refused(config: Config, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(config, **changes)


@pytest.mark.parametrize(
    ("config", "key", "value", "wanted"),
    [
        (TransformerConfig, "depth", "3", "int"),
        (TransformerConfig, "depth", 3.0, "int"),
        (TransformerConfig, "depth", True, "int"),
        (TransformerConfig, "depth", None, "int"),
        (TransformerConfig, "mlp_ratio", "4", "float"),
        (TransformerConfig, "mlp_ratio", True, "float"),
        (TransformerConfig, "attn_l2_norm", 2, "bool"),
        (TransformerConfig, "attn_l2_norm", "false", "bool"),
        (TransformerConfig, "mlp_type", 1, "str"),
        (TransformerConfig, "patch_nums", "1_2_4", "list of int"),
        (TransformerConfig, "patch_nums", [1, 2.0], "list of int"),
        (TransformerConfig, "patch_nums", 4, "list of int"),
        (AutoencoderConfig, "share_quant_resi", False, "int"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_wrong_type_is_named_with_the_right_one(config: Config, key: str, value: Any, wanted: str) -> None:
    assert f"{key} must be of type {wanted}, not {value!r}" in refusal(config, **{key: value})


@pytest.mark.parametrize("value", [True, 1])
def test_a_flag_may_be_one(value: Any) -> None:
    assert TransformerConfig.from_dict(TRANSFORMER | {"attn_l2_norm": value}).attn_l2_norm is True


def test_a_whole_number_is_a_float() -> None:
    ratio = TransformerConfig.from_dict(TRANSFORMER | {"mlp_ratio": 4}).mlp_ratio
    assert (ratio, type(ratio)) == (4.0, float)


def test_missing_keys_are_all_named() -> None:
    message = refusal(TransformerConfig, depth=REMOVED, patch_nums=REMOVED)
    assert message.endswith("lacks patch_nums, depth.")


def test_a_class_conditional_checkpoint_says_so(tmp_path: Path) -> None:
    message = refusal(TransformerConfig, model_type="hart_transformer_c2i", context_token=REMOVED, context_dim=REMOVED)
    assert "model_type = 'hart_transformer_c2i' is not supported; 'hart_transformer_t2i' is." in message


@both
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not readable JSON"),
        (b'{"depth": 3', "is not readable JSON"),
        (b"\xff\xfe\x00", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
    ],
    ids=["empty", "truncated", "binary", "deep", "list", "null"],
)
def test_unreadable_json_names_the_file(config: Config, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.from_json(file)
    assert f"{file} {words}" in str(caught.value)


@both
def test_an_error_inside_the_file_names_it(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MINIMAL[config] | {"ch": 1, "depth": 0}))
    with pytest.raises(ConfigError) as caught:
        config.from_json(file)
    assert str(caught.value).startswith(str(file))


@both
def test_a_missing_file_and_a_folder_in_its_place(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="config.json does not exist"):
        config.from_json(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not readable JSON"):
        config.from_json(tmp_path)
