"""What a checkpoint's JSON may say, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hart_infer.checkpoints.autoencoder import AUTOENCODER_KEYS
from hart_infer.checkpoints.configs import config_from_dict, config_to_dict, read_config
from hart_infer.checkpoints.hart import TRANSFORMER_KEYS
from hart_infer.errors import CheckpointNotFoundError, ConfigError
from hart_infer.models.hart import HartConfig
from hart_infer.models.parts.autoencoder import AutoencoderConfig

CONFIGS = {HartConfig: "llm/config.json", AutoencoderConfig: "tokenizer/config.json"}
KEYS = {HartConfig: TRANSFORMER_KEYS, AutoencoderConfig: AUTOENCODER_KEYS}
Config = type[HartConfig] | type[AutoencoderConfig]
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
MINIMAL: dict[Any, dict[str, Any]] = {HartConfig: TRANSFORMER, AutoencoderConfig: AUTOENCODER}
REMOVED = object()


def build(config: Config, values: dict[str, Any], **options: Any) -> Any:
    return config_from_dict(config, values, KEYS[config], **options)


def read(config: Config, file: Path) -> Any:
    return read_config(config, file, KEYS[config])


def refusal(config: Config, **changes: Any) -> str:
    """What the error says of a minimal configuration with changes."""
    values = {key: value for key, value in (MINIMAL[config] | changes).items() if value is not REMOVED}
    with pytest.raises(ConfigError) as caught:
        build(config, values, origin="x/config.json")
    message = str(caught.value)
    assert message.startswith("x/config.json")
    return message


@both
def test_released_layout_reads(config: Config, hart_tiny: Path) -> None:
    file = hart_tiny / CONFIGS[config]
    stored = json.loads(file.read_text())
    found = read(config, file)
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        expected = stored.get(field.name, field.default)  # norm_groups is this project's own
        assert (list(value) if isinstance(value, tuple) else value) == expected


@both
def test_to_dict_gives_it_back_as_json(config: Config, hart_tiny: Path) -> None:
    found = read(config, hart_tiny / CONFIGS[config])
    assert build(config, json.loads(json.dumps(config_to_dict(found, KEYS[config])))) == found
    assert set(KEYS[config].fixed) <= set(config_to_dict(found, KEYS[config]))  # written out, so that no reader has to guess


@both
def test_frozen_and_keyword_only(config: Config) -> None:
    found = build(config, MINIMAL[config])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.patch_nums = (1, 2)  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        config((1, 2, 4))  # type: ignore[call-arg, misc]
    assert len({found, build(config, MINIMAL[config])}) == 1


def test_derived_sizes() -> None:
    found = build(HartConfig, TRANSFORMER | {"mlp_type": "llama"})
    assert (found.head_dim, found.mlp_dim) == (64, 512)  # 128 * 4 * 2 / 3 = 341, up to a multiple of 256
    assert build(HartConfig, TRANSFORMER | {"mlp_type": "gpt2"}).mlp_dim == 512
    assert build(AutoencoderConfig, AUTOENCODER).downsample == 16
    assert build(AutoencoderConfig, AUTOENCODER | {"ch_mult": [1, 1, 2]}).downsample == 4


@both
def test_unknown_keys_are_ignored_with_one_warning_that_names_them(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    values = MINIMAL[config] | {"rope_theta": 10000, "a_new_trick": True}
    assert build(config, values, origin="x/config.json") == build(config, MINIMAL[config])
    (record,) = caplog.records
    assert record.getMessage().startswith("x/config.json has keys")
    assert "a_new_trick, rope_theta" in record.getMessage()


@both
def test_strict_reading_refuses_unknown_keys(config: Config) -> None:
    with pytest.raises(ConfigError, match="a_new_trick, rope_theta"):
        build(config, MINIMAL[config] | {"rope_theta": 10000, "a_new_trick": True}, strict=True)


@both
@pytest.mark.parametrize("key", ["architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "id2label"])
def test_bookkeeping_is_ignored(config: Config, key: str) -> None:
    assert build(config, MINIMAL[config] | {key: "anything"}) == build(config, MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "key"),
    [(config, key) for config in CONFIGS for key in sorted(KEYS[config].ignored)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_keys_are_ignored(config: Config, key: str) -> None:
    assert build(config, MINIMAL[config] | {key: "anything"}) == build(config, MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (HartConfig, "attn_type", "gpt2"),
        (HartConfig, "attn_type", REMOVED),  # the released default is gpt2
        (HartConfig, "use_cross_attn", True),
        (HartConfig, "num_sampling_steps", "100"),
        (HartConfig, "use_cross_attn", "false"),  # a text that is there is true
        (HartConfig, "num_sampling_steps", 9),
        (AutoencoderConfig, "quant_conv_ks", "3"),
        (HartConfig, "num_sampling_steps", ""),
        (HartConfig, "sampler", "dpm"),
        (HartConfig, "sampler", None),
        (HartConfig, "model_type", "hart_transformer_c2i"),
        (HartConfig, "model_type", "hart_autoencoder"),
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
    assert repr(KEYS[config].fixed[key][0]) in message
    shown = KEYS[config].released_defaults[key] if value is REMOVED else value
    assert repr(shown) in message


@pytest.mark.parametrize(
    ("config", "key"),
    [(config, key) for config in CONFIGS for key in sorted(KEYS[config].fixed) if key not in KEYS[config].released_defaults],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fixed_key_may_be_missing_or_say_what_is_supported(config: Config, key: str) -> None:
    plain = build(config, MINIMAL[config])
    for value in KEYS[config].fixed[key]:
        assert build(config, MINIMAL[config] | {key: value}) == plain


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (HartConfig, "num_sampling_steps", 8),
        (HartConfig, "use_cross_attn", None),
        (HartConfig, "use_cross_attn", 0),
        (AutoencoderConfig, "quant_conv_ks", 3.0),
        (AutoencoderConfig, "double_decoder", 0),
    ],
)
def test_a_fixed_key_is_compared_as_the_released_code_would(config: Config, key: str, value: Any) -> None:
    assert build(config, MINIMAL[config] | {key: value}) == build(config, MINIMAL[config])


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (HartConfig, {"mlp_type": "moe"}, "mlp_type must be one of gpt2, llama, not 'moe'"),
        (HartConfig, {"sep_aln_pooling_mode": "min"}, "sep_aln_pooling_mode must be one of avg, max, not 'min'"),
        (HartConfig, {"shared_aln": True}, "shared_aln = true without disable_aln"),
        (HartConfig, {"embed_dim": 130, "num_heads": 4}, "embed_dim 130 must split into 4 heads"),
        (HartConfig, {"embed_dim": 12, "num_heads": 2}, "embed_dim 12 must split into 2 heads of a multiple of 4"),
        (HartConfig, {"patch_nums": []}, "patch_nums must rise from 1"),
        (HartConfig, {"patch_nums": [1]}, "patch_nums must rise from 1"),
        (HartConfig, {"patch_nums": [2, 4]}, "patch_nums must rise from 1"),
        (HartConfig, {"patch_nums": [1, 4, 4]}, "patch_nums must rise from 1"),
        (HartConfig, {"patch_nums": [1, 4, 2]}, "patch_nums must rise from 1"),
        (HartConfig, {"depth": 0}, "depth must be positive, not 0"),
        (HartConfig, {"num_heads": 0}, "num_heads must be positive, not 0"),
        (HartConfig, {"context_token": -1}, "context_token must be positive, not -1"),
        (HartConfig, {"mlp_ratio": 0}, "mlp_ratio must be positive, not 0"),
        (HartConfig, {"mlp_ratio": float("nan")}, "mlp_ratio must be positive, not nan"),
        (HartConfig, {"norm_eps": float("inf")}, "norm_eps must be positive, not inf"),
        (AutoencoderConfig, {"v_patch_nums": [1, 1]}, "v_patch_nums must rise from 1"),
        (AutoencoderConfig, {"share_quant_resi": 2}, "share_quant_resi must be one of 0, 1, 4, not 2"),
        (AutoencoderConfig, {"quantizer_type": "fsq"}, "quantizer_type must be one of var, var_hybrid, not 'fsq'"),
        (AutoencoderConfig, {"ch": 48}, "ch must be a multiple of norm_groups 32"),
        (AutoencoderConfig, {"norm_groups": 0}, "norm_groups must be positive"),
        (AutoencoderConfig, {"ch": 0}, "ch must be positive"),
        (AutoencoderConfig, {"ch_mult": []}, "ch_mult must have positive entries"),
        (AutoencoderConfig, {"ch_mult": [1, 0]}, "ch_mult must have positive entries"),
        (AutoencoderConfig, {"z_channels": 0}, "z_channels must be positive"),
        (HartConfig, {"depth": 10**9}, "depth must be at most 1,024, not 1,000,000,000"),
        (HartConfig, {"diff_depth": 10**9}, "diff_depth must be at most"),
        (HartConfig, {"embed_dim": 10**12}, "embed_dim must be at most"),
        (HartConfig, {"context_dim": 10**9}, "context_dim must be at most"),
        (HartConfig, {"context_token": 10**9}, "context_token must be at most"),
        (HartConfig, {"mlp_ratio": 1e30}, "mlp_ratio must be at most"),
        (HartConfig, {"patch_nums": [1, 10**9]}, "at most 64 entries of at most 1024"),
        (HartConfig, {"patch_nums": list(range(1, 10**6))}, "not 999999 sides"),
        (AutoencoderConfig, {"v_patch_nums": [1, 10**9]}, "at most 64 entries of at most 1024"),
        (AutoencoderConfig, {"vocab_size": 10**9}, "vocab_size must be at most"),
        (AutoencoderConfig, {"z_channels": 10**9}, "z_channels must be at most"),
        (AutoencoderConfig, {"ch": 32 * 10**9}, "ch must be at most"),
        (AutoencoderConfig, {"ch_mult": [1] * 1000}, "ch_mult must have positive entries, at most 8"),
        (AutoencoderConfig, {"ch_mult": [1, 10**9]}, "at most 8 of at most 64"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value).replace("\n", " ")[:40],
)
def test_impossible_values_are_refused(config: Config, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(config, **changes)


@pytest.mark.parametrize(
    ("config", "key", "value", "wanted"),
    [
        (HartConfig, "depth", "3", "int"),
        (HartConfig, "depth", 3.0, "int"),
        (HartConfig, "depth", True, "int"),
        (HartConfig, "depth", None, "int"),
        (HartConfig, "mlp_ratio", "4", "float"),
        (HartConfig, "mlp_ratio", True, "float"),
        (HartConfig, "attn_l2_norm", 2, "bool"),
        (HartConfig, "attn_l2_norm", "false", "bool"),
        (HartConfig, "mlp_type", 1, "str"),
        (HartConfig, "patch_nums", "1_2_4", "list of int"),
        (HartConfig, "patch_nums", [1, 2.0], "list of int"),
        (HartConfig, "patch_nums", 4, "list of int"),
        (AutoencoderConfig, "share_quant_resi", False, "int"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_wrong_type_is_named_with_the_right_one(config: Config, key: str, value: Any, wanted: str) -> None:
    assert f"{key} must be of type {wanted}, not {value!r}" in refusal(config, **{key: value})


@pytest.mark.parametrize("value", [True, 1])
def test_a_flag_may_be_one(value: Any) -> None:
    assert build(HartConfig, TRANSFORMER | {"attn_l2_norm": value}).attn_l2_norm is True


def test_a_whole_number_is_a_float() -> None:
    ratio = build(HartConfig, TRANSFORMER | {"mlp_ratio": 4}).mlp_ratio
    assert (ratio, type(ratio)) == (4.0, float)


def test_missing_keys_are_all_named() -> None:
    message = refusal(HartConfig, depth=REMOVED, patch_nums=REMOVED)
    assert message.endswith("lacks patch_nums, depth.")


def test_a_class_conditional_checkpoint_says_so(tmp_path: Path) -> None:
    message = refusal(HartConfig, model_type="hart_transformer_c2i", context_token=REMOVED, context_dim=REMOVED)
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
        read(config, file)
    assert f"{file} {words}" in str(caught.value)


@both
def test_an_error_inside_the_file_names_it(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MINIMAL[config] | {"ch": 1, "depth": 0}))
    with pytest.raises(ConfigError) as caught:
        read(config, file)
    assert str(caught.value).startswith(str(file))


@both
def test_a_missing_file_and_a_folder_in_its_place(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="config.json does not exist"):
        read(config, tmp_path / "config.json")
    with pytest.raises(ConfigError, match="is not a file"):
        read(config, tmp_path)


@both
@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
def test_a_pipe_and_a_device_are_not_waited_for(config: Config, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for file in (tmp_path / "config.json", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is not a file"):
            read(config, file)


@both
def test_a_file_far_too_large_is_not_read(config: Config, tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match="too large"):
        read(config, tmp_path / "config.json")
