"""Prompts to context: the kept system prompt, padding, limits, warnings."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Model

from hart_infer import ConfigError, HartPipeline, WeightsError
from hart_infer.checkpoints.text_encoder import load_text_encoder, save_text_encoder
from hart_infer.models.text import PromptEmbeds, TextEncoder, attended, system_prompt
from tests.golden.data import golden

T = 24
FP32 = 1e-5  # relative: the bound for a step fed equal inputs in fp32
PROMPTS = ["a", "a cat", "a photo of a red fox in the snow"]  # 1, 2 and 17 tokens
LONG = "a photo of a red fox in the snow, morning light, 35mm film, very detailed"


def load(side: str, **options: Any) -> TextEncoder:
    return load_text_encoder(golden(f"text-tiny-{side}"), **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module", params=["right", "left"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    """A text encoder that pads on either side."""
    return load(request.param)


@pytest.fixture(scope="module")
def right() -> TextEncoder:
    return load("right")


def relative(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


def padded_tokens(encoder: TextEncoder, prompts: list[str], limit: int = T) -> tuple[Tensor, Tensor]:
    """Transformers' tokenizer with its own padding and truncation: tokens and mask."""
    tokenizer = transformers_tokenizer(encoder.tokenizer.padding_side)
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


@cache
def transformers_model(side: str) -> Qwen2Model:
    return Qwen2Model.from_pretrained(golden(f"text-tiny-{side}")).float().eval()


@cache
def transformers_tokenizer(side: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(golden(f"text-tiny-{side}"))


def in_one_go(encoder: TextEncoder, prompts: list[str], *, with_system_prompt: bool, limit: int = T) -> Tensor:
    """What transformers' model says to the system prompt and the prompts as one sequence, no cache, default positions."""
    tokens, mask = padded_tokens(encoder, prompts, limit)
    model, before = transformers_model(encoder.tokenizer.padding_side), 0
    if with_system_prompt:
        tokenizer = transformers_tokenizer(encoder.tokenizer.padding_side)
        system = tokenizer(system_prompt(), truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        before = system.shape[1]
        system = system.expand(len(prompts), -1)
        tokens, mask = torch.cat([system, tokens], dim=1), torch.cat([torch.ones_like(system), mask], dim=1)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state[:, before:]


@contextmanager
def calls_of(encoder: TextEncoder) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tokens that the model is run on."""
    seen: list[tuple[int, ...]] = []
    hook = encoder.model.embed_tokens.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        hook.remove()


# The system prompt's keys and values, kept.


@pytest.mark.parametrize("with_system_prompt", [True, False])
def test_the_context_is_that_of_one_plain_call(encoder: TextEncoder, with_system_prompt: bool) -> None:
    expected = in_one_go(encoder, PROMPTS, with_system_prompt=with_system_prompt)
    for _ in range(2):  # the second time from the kept keys and values
        embeds = encoder.encode(PROMPTS, context_tokens=T, use_system_prompt=with_system_prompt)
        # Left padding without a system prompt has nothing to attend to, and transformers' versions differ in what comes of it.
        defined = torch.ones_like(embeds.mask) if with_system_prompt else embeds.position_ids >= 0
        assert relative(embeds.context[defined], expected[defined]) <= FP32


def test_the_system_prompt_matters(encoder: TextEncoder) -> None:
    plain, instructed = (encoder.encode(PROMPTS, context_tokens=T, use_system_prompt=on).context for on in (False, True))
    assert relative(plain, instructed) > 0.01


def test_the_system_prompt_is_run_once_for_each_limit() -> None:
    encoder = load("right")
    system = len(encoder.tokenizer(system_prompt())["input_ids"])

    def tokens_run(**options: Any) -> list[tuple[int, ...]]:
        with calls_of(encoder) as calls:
            encoder.encode(["a"], **{"context_tokens": T, **options})
        return calls

    assert tokens_run() == [(1, T), (1, T)]  # the system prompt is longer than T, so cut to it
    assert tokens_run() == [(1, T)]
    assert tokens_run(context_tokens=300) == [(1, system), (1, 300)]
    assert tokens_run(context_tokens=300, max_sequence_length=5) == [(1, 300)]
    assert tokens_run(use_system_prompt=False) == tokens_run() == [(1, T)]
    encoder.to(dtype=torch.bfloat16)  # the kept ones are of other weights now
    assert tokens_run() == [(1, T), (1, T)]


def test_the_kept_system_prompt_does_not_outlive_the_weights() -> None:
    encoder = load("right")
    before = encoder.encode(["a"], context_tokens=T).context
    with torch.no_grad():
        encoder.model.layers[0].mlp.up.weight.mul_(1.5)
    changed = encoder.encode(["a"], context_tokens=T).context
    encoder._prefixes.clear()
    assert torch.equal(encoder.encode(["a"], context_tokens=T).context, changed)
    assert not torch.equal(changed, before)


def test_a_left_padded_row_of_the_mask_sees_nothing_and_others_see_no_padding() -> None:
    mask = torch.tensor([[False, False, True, True]])
    assert attended(mask, 0)[0, 0].any(dim=-1).tolist() == [False, False, True, True]
    assert attended(mask, 2)[0, 0].tolist() == [  # a system prompt of two tokens is always seen
        [True, True, False, False, False, False],
        [True, True, False, False, False, False],
        [True, True, False, False, True, False],
        [True, True, False, False, True, True],
    ]


def test_on_a_gpu_cudnn_s_attention_is_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from hart_infer.ops.held import without_cudnn_attention

    before = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn_attention(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize(("side", "system"), [("left", False), ("left", True), ("right", False)])
def test_contexts_are_finite_whatever_is_padded(side: str, system: bool) -> None:
    assert load(side).encode(["a"], context_tokens=T, use_system_prompt=system).context.isfinite().all()


def test_use_leaves_the_kept_keys_and_values_alone(right: TextEncoder) -> None:
    alone = right.encode(["a cat"], context_tokens=T).context
    right.encode(PROMPTS, context_tokens=T, batch_size=1)
    assert torch.equal(right.encode(["a cat"], context_tokens=T).context, alone)
    other = load("right")
    other.encode(PROMPTS, context_tokens=T)
    assert torch.equal(other.encode(["a cat"], context_tokens=T).context, alone)


# Form, padding, limits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_context_is_fp32_and_the_mask_bool(dtype: torch.dtype) -> None:
    embeds = load("right", dtype=dtype).encode(PROMPTS, context_tokens=T)
    assert (embeds.context.shape, embeds.context.dtype) == ((3, T, 48), torch.float32)
    assert (embeds.mask.shape, embeds.mask.dtype) == ((3, T), torch.bool)


@pytest.mark.parametrize(
    ("side", "words", "padding"), [("right", slice(0, 2), slice(2, None)), ("left", slice(-2, None), slice(-2))]
)
def test_padding_is_on_the_tokenizer_s_side(side: str, words: slice, padding: slice) -> None:
    embeds = load(side).encode(["a cat"], context_tokens=T)
    assert embeds.mask[0, words].all()
    assert not embeds.mask[0, padding].any()
    assert embeds.position_ids[0, words].tolist() == [0, 1]
    assert embeds.position_ids[0, padding].unique().tolist() == [-1 if side == "left" else 1]


def test_mask_and_tokens_are_the_tokenizer_s(encoder: TextEncoder) -> None:
    _, mask = padded_tokens(encoder, PROMPTS)
    assert torch.equal(encoder.encode(PROMPTS, context_tokens=T).mask, mask.bool())


def test_a_prompt_s_context_does_not_depend_on_the_others(encoder: TextEncoder) -> None:
    together = encoder.encode(PROMPTS, context_tokens=T, batch_size=1)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt], context_tokens=T)
        assert torch.equal(alone.context[0], together.context[i])
        assert torch.equal(alone.mask[0], together.mask[i])


@pytest.mark.filterwarnings("ignore:Prompt 0 has")
def test_a_long_prompt_is_cut_to_the_limit(encoder: TextEncoder) -> None:
    embeds = encoder.encode([LONG], context_tokens=T)
    assert embeds.mask.all()
    assert relative(embeds.context, in_one_go(encoder, [LONG], with_system_prompt=True)) <= FP32


@pytest.mark.filterwarnings("ignore:Prompt 0 has")
def test_max_sequence_length_cuts_and_the_rest_is_padding(right: TextEncoder) -> None:
    embeds = right.encode([LONG], context_tokens=T, max_sequence_length=3)
    assert (embeds.context.shape[1], embeds.mask.sum().item()) == (T, 3)
    whole = right.encode([LONG], context_tokens=T)
    # Causal: the first three tokens know nothing of the cut.
    assert relative(embeds.context[:, :3], whole.context[:, :3]) <= FP32


def test_position_ids_count_the_tokens_before() -> None:
    mask = torch.tensor([[True, True, False], [False, True, True]])
    embeds = PromptEmbeds(torch.zeros(2, 3, 4), mask)
    assert embeds.position_ids.tolist() == [[0, 1, 1], [-1, 0, 1]]
    assert embeds.position_ids.dtype == torch.int64


# Warnings about what was cut.


def test_the_warning_says_what_was_cut_and_quotes_nothing(pipe: HartPipeline) -> None:
    limit = pipe.transformer.config.context_token
    with pytest.warns(UserWarning) as caught:
        cut = pipe.encode_prompt(["a cat", LONG])
    (message,) = [str(warning.message) for warning in caught]
    found = re.fullmatch(
        rf"Prompt 1 has (\d+) tokens; the limit is {limit}\. Its text from character (\d+) of {len(LONG)} on was cut\.", message
    )
    assert found
    tokens, character = map(int, found.groups())
    assert tokens == len(pipe.text_encoder.tokenizer(LONG)["input_ids"])
    # What is left by that account is the same prompt to the encoder.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = pipe.encode_prompt(["a cat", LONG[:character]])
    assert torch.equal(left.context, cut.context)


@pytest.mark.parametrize("through", ["call", "embeds", "negative", "list"])
def test_the_warning_points_at_the_caller_s_line(pipe: HartPipeline, through: str) -> None:
    def here() -> None:
        if through == "call":
            pipe(LONG, output_type="latent")
        elif through == "embeds":
            pipe.encode_prompt(LONG)
        elif through == "negative":
            pipe("a", negative_prompt=LONG, output_type="latent")
        else:
            pipe(["a", LONG], output_type="latent")

    with pytest.warns(UserWarning, match="was cut") as caught:
        here()
    (warning,) = caught
    assert warning.filename == __file__
    assert here.__code__.co_firstlineno < warning.lineno <= max(line for *_, line in here.__code__.co_lines() if line)
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "LONG" in lines[warning.lineno - 1]


def test_a_slow_tokenizer_warns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no offsets to say where."""
    encoder = load("right")

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(fast, name)

        def __call__(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
            assert not return_offsets_mapping
            return fast(*args, **kwargs)

    fast = encoder.tokenizer
    expected = encoder.encode(["a cat"], context_tokens=T, max_sequence_length=2)
    monkeypatch.setattr(encoder, "tokenizer", Slow())
    with pytest.warns(UserWarning, match=r"Prompt 0 has \d+ tokens; the limit is 2\. Its end was cut\."):
        cut = encoder.encode(["a cat and more"], context_tokens=T, max_sequence_length=2)
    assert torch.equal(cut.context, expected.context)


@pytest.mark.parametrize("limit", [2, None])
def test_a_prompt_that_just_fits_is_no_reason_to_warn(pipe: HartPipeline, limit: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embeds = pipe.encode_prompt("a cat", max_sequence_length=limit)
    assert embeds.mask.sum() == 2


def test_max_sequence_length_of_a_call_cuts_too(pipe: HartPipeline) -> None:
    with pytest.warns(UserWarning, match="Prompt 0 has 2 tokens; the limit is 1"):
        cut = pipe("a cat", max_sequence_length=1, seed=0, output_type="latent").images
    assert torch.equal(cut, pipe("a", seed=0, output_type="latent").images)


# Loading.


def test_a_tokenizer_without_a_padding_token_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(golden("text-tiny-right"), folder)
    config = folder / "tokenizer_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": None}))
    with pytest.raises(WeightsError, match=r"has no padding token.*\.$"):
        load_text_encoder(folder)


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load("right")
    assert capfd.readouterr() == ("", "")


def test_the_model_is_for_inference(right: TextEncoder) -> None:
    assert right.width == 48
    assert not right.model.training
    assert not any(parameter.requires_grad for parameter in right.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_transformers_too(encoder: TextEncoder, tmp_path: Path, dtype: torch.dtype) -> None:
    ours = load(encoder.tokenizer.padding_side, dtype=dtype)
    save_text_encoder(ours, tmp_path / "text", max_shard_size="50KB")
    theirs = Qwen2Model.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(theirs[1].values())
    assert theirs[0].dtype == dtype
    tokens, mask = ours.tokenize(["a cat"], context_tokens=2)
    with torch.no_grad():
        expected = theirs[0].float()(input_ids=tokens).last_hidden_state
        assert relative(ours.to(dtype=torch.float32).hidden_states(tokens, mask), expected) <= FP32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
            "use_sliding_window = True is not supported; False is.",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling of type 'yarn' is not supported; 'linear' is.",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; 'silu' or 'swish' is."),
        ({"head_dim": 24}, "head_dim 24 is not hidden_size / num_attention_heads 12."),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3."),
    ],
)
def test_a_configuration_that_nothing_computes_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    shutil.copytree(golden("text-tiny-right"), tmp_path / "text")
    config = tmp_path / "text" / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ConfigError, match=re.escape(f"{config}: {words}")):
        load_text_encoder(tmp_path / "text")


def test_a_rope_theta_of_either_version_is_read(tmp_path: Path) -> None:
    contexts = []
    for place, rope in enumerate(({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {})):
        folder = tmp_path / str(place)
        shutil.copytree(golden("text-tiny-right"), folder)
        config = folder / "config.json"
        config.chmod(0o644)
        values = json.loads(config.read_text())
        del values["rope_parameters"]
        config.write_text(json.dumps(values | rope))
        contexts.append(load_text_encoder(folder).encode(PROMPTS, context_tokens=T).context)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])


def changed(folder: Path, **changes: Any) -> Path:
    """A copy of the tiny encoder with other values in its configuration."""
    shutil.copytree(golden("text-tiny-right"), folder)
    config = folder / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": None},
        {"hidden_act": "swish"},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_theta": 7.0},  # the one within rope_parameters goes before it
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(right: TextEncoder, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = load_text_encoder(changed(tmp_path / "text", **changes), dtype=torch.float32, strict=True)
    assert torch.equal(found.encode(PROMPTS, context_tokens=T).context, right.encode(PROMPTS, context_tokens=T).context)


def test_unknown_keys_are_refused_on_request(hart_tiny: Path, tmp_path: Path) -> None:
    folder = changed(tmp_path / "text", window_of_opportunity=3)
    load_text_encoder(folder)
    with pytest.raises(ConfigError, match="keys that hart_infer does not know: window_of_opportunity"):
        HartPipeline.from_pretrained(hart_tiny, text_encoder=folder, device="cpu", strict_config=True)


def test_other_tensors_are_not_read_and_an_index_says_which_files_are(right: TextEncoder, tmp_path: Path) -> None:
    folder = changed(tmp_path / "text")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part} | {f"visual.{file}": torch.ones(2)}, folder / file)
    save_file({"norm.weight": torch.ones(3)}, folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    found = load_text_encoder(folder, dtype=torch.float32)
    assert torch.equal(found.encode(["a"], context_tokens=T).context, right.encode(["a"], context_tokens=T).context)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"norm.weight": "absent.bin"}}')
    assert load_text_encoder(folder).width == found.width, "the index of another format is not asked"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../one.safetensors"}}))
    with pytest.raises(ConfigError, match="must list the files of its folder under weight_map"):
        load_text_encoder(folder)


def test_a_model_of_transformers_is_refused(right: TextEncoder) -> None:
    with pytest.raises(WeightsError, match=r"is a hart_infer\.models\.llama\.Decoder, not a Qwen2Model"):
        TextEncoder(transformers_model("right"), right.tokenizer)  # type: ignore[arg-type]
