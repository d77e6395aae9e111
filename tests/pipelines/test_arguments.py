"""Bad arguments: a typed error with one clear sentence, before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hart_infer import HartPipeline, InputError, PromptEmbeds
from hart_infer.pipelines.arguments import seeds_for
from hart_infer.pipelines.checks import MAX_SEED, check_float, check_int, check_prompts, check_size

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
TOKENS, WIDTH, VOCABULARY = 12, 48, 1024  # of hart-tiny


class CudaGenerator(torch.Generator):
    """A generator that says it is on a GPU."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


def fresh(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def used(seed: int = 7) -> torch.Generator:
    generator = fresh(seed)
    torch.rand(1, generator=generator)
    return generator


def rejected(call: Callable[[], object], message: str) -> None:
    """The call raises InputError with one sentence that holds `message`."""
    with pytest.raises(InputError, match=message) as caught:
        call()
    said = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert said.endswith(".")
    assert "\n" not in said


# The call: every argument that can be wrong.

BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, r"prompt\[0\] is empty"),
    ({"prompt": " \n"}, r"prompt\[0\] is empty"),
    ({"prompt": ["a", ""]}, r"prompt\[1\] is empty"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ["a", 3]}, r"prompt\[1\] must be a string, not int"),
    ({"prompt": ["a", None]}, r"prompt\[1\] must be a string, not NoneType"),
    ({"prompt": b"a"}, "prompt must be a string or a list of strings, not bytes"),
    ({"prompt": 0}, "prompt must be a string or a list of strings, not int"),
    ({"prompt": {"a": 1}}, "not dict"),
    ({"prompt": ["a", "\ud83d"]}, r"prompt\[1\] is not valid Unicode text"),
    ({"prompt": None}, "Give either prompt or prompt_embeds"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, TOKENS, WIDTH)}, "Give either prompt or prompt_embeds"),
    ({"prompt": None, "prompt_embeds": [[0.0]]}, "must come from encode_prompt or be a tensor, not list"),
    *(
        (
            {"prompt": None, "prompt_embeds": torch.zeros(shape)},
            rf"\[U, 12, 48\] and a mask \[U, 12\], not {re.escape(str(shape))}",
        )
        for shape in (
            [TOKENS],
            [TOKENS, WIDTH],
            [0, TOKENS, WIDTH],
            [1, TOKENS - 1, WIDTH],
            [1, TOKENS, WIDTH + 1],
            [1, 1, 1, 1],
        )
    ),
    (
        {"prompt": None, "prompt_embeds": PromptEmbeds(torch.zeros(2, TOKENS, WIDTH), torch.ones(1, TOKENS).bool())},
        r"not \[2, 12, 48\] and \[1, 12\]",
    ),
    ({"prompt": None, "prompt_embeds": torch.full((1, TOKENS, WIDTH), NAN)}, "must be finite numbers"),
    ({"prompt": None, "prompt_embeds": PromptEmbeds(torch.zeros(1, TOKENS, WIDTH), None)}, "with a mask tensor"),  # type: ignore[arg-type]
    ({"negative_prompt": 3}, "negative_prompt must be a string or a list of strings, not int"),
    ({"negative_prompt": []}, "negative_prompt is an empty list"),
    ({"negative_prompt": ["a", ""], "prompt": ["a", "b"]}, r"negative_prompt\[1\] is empty"),
    ({"negative_prompt": ["a", "b"], "prompt": ["a", "b", "c"]}, "negative_prompt has 2 entries for 3 prompts"),
    ({"negative_prompt": 3, "guidance_scale": 0}, "negative_prompt must be a string"),
    *(
        ({"size": size}, r"not one that this checkpoint was trained for; it has 32")
        for size in (31, 64, 0, -32, "32", True, [32])
    ),
    *(
        ({"num_images_per_prompt": bad}, "num_images_per_prompt must be a whole number of 1 or more")
        for bad in (0, -1, 1.0, "1", None, True, NAN)
    ),
    *(
        ({"guidance_scale": bad}, "guidance_scale must be a number from 0 to 1000")
        for bad in (-0.1, 1001, 1e40, NAN, INF, "4", [3], True)
    ),
    *(
        ({"num_inference_steps": bad}, "num_inference_steps must be a whole number from 0 to 1000")
        for bad in (-1, 1001, 8.0, "8", NAN, False)
    ),
    ({"num_inference_steps": 1}, "num_inference_steps must be 0 .* or from 2 to 1000, not 1"),
    *(
        ({"residual_temperature": bad}, "residual_temperature must be a number from 0 to 1, not")
        for bad in (-0.1, 1.1, NAN, "1", True)
    ),
    *(({"speed": bad}, "speed must be one of exact, fast, turbo, draft, not") for bad in ("Fast", "", None, 1, ["fast"])),
    *(({"guidance_stops_at": bad}, "guidance_stops_at must be the side of one of") for bad in (0, 5, "6", True, [6])),
    *(({"stop_after": bad}, "stop_after must be the side of one of") for bad in (0, 5, "6", True, NAN)),
    *(
        ({"guidance_stops_at": 6, "late_temperature": bad}, "late_temperature must be a number from 0.01 to 100")
        for bad in (0, -1, 101, NAN, "1", True)
    ),
    ({"late_temperature": 1.0}, "late_temperature is of scales that lost their guidance"),
    ({"prune": 0.5}, "prune must be a Prune, or its fields by name, not float"),
    ({"prune": {"share": 0.5}}, "prune takes at, drop, cache_at, once and score, not share"),
    ({"prune": {"drop": 0.5}}, "prune.drop must list a share"),
    ({"prune": {"at": ("3", 5)}}, "prune.at must be 2 rising sides, one for each of drop, not"),
    ({"prune": {"at": (3, 5)}}, "prune.at must be the side of one of"),
    *(({"top_k": bad}, "top_k must be a whole number from 0 to 1024") for bad in (-1, VOCABULARY + 1, 5.0, "5", True, NAN)),
    *(({"top_p": bad}, "top_p must be a number from 0 to 1, not") for bad in (-0.1, 1.1, NAN, INF, "1", True)),
    *(
        ({"max_sequence_length": bad}, "max_sequence_length must be a whole number from 1 to 12")
        for bad in (0, -1, TOKENS + 1, 3.0, "3", True)
    ),
    *(({"seed": bad}, "seed must be a whole number from 0 to") for bad in (-1, 2**64, 1.5, True, NAN, {1}, torch.tensor(3))),
    *(({"seed": [bad]}, "seed must be a whole number from 0 to") for bad in (-1, 2**64, 1.5, True, None, "1")),
    ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "seed must be a whole number from 0 to"),
    ({"seed": [1, 2]}, "seed has 2 entries for 1 images"),
    ({"seed": []}, "seed has 0 entries for 1 images"),
    ({"seed": [1], "num_images_per_prompt": 2}, "seed has 1 entries for 2 images"),
    ({"seed": 1, "generator": fresh()}, "seed and generator contradict each other"),
    ({"generator": 7}, "generator must be a torch.Generator or a list of them, not int"),
    ({"generator": [7]}, "generator must be a torch.Generator or a list of them, not int"),
    ({"generator": []}, "generator has 0 entries for 1 images"),
    ({"generator": [fresh()], "num_images_per_prompt": 2}, "generator has 1 entries for 2 images"),
    ({"generator": CudaGenerator()}, "generator is on cuda:0; make it on the CPU"),
    ({"generator": [CudaGenerator()]}, "generator is on cuda:0; make it on the CPU"),
    *(({"output_type": bad}, "output_type must be one of pil, np, pt, latent") for bad in ("jpeg", "PIL", "", None, 1)),
    ({"callback_on_step_end": "print"}, "callback_on_step_end must be a function, not str"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_a_bad_argument_is_refused_before_the_model_runs(
    pipe: HartPipeline, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(pipe.transformer, "forward", runs)
    rejected(lambda: pipe(**{"prompt": "a", **arguments}), message)


@pytest.mark.parametrize(("prompt", "message"), [("", r"prompt\[0\] is empty"), ([], "empty list"), (3, "not int")])
def test_encode_prompt_checks_as_the_call_does(pipe: HartPipeline, prompt: Any, message: str) -> None:
    rejected(lambda: pipe.encode_prompt(prompt), message)


@pytest.mark.parametrize("mode", ["Hybrid", "", 0, ["hybrid"]])
def test_an_unknown_reconstruction_is_refused(pipe: HartPipeline, mode: Any) -> None:
    rejected(lambda: pipe.reconstruct(torch.zeros(1, 3, 32, 32), mode), "mode must be hybrid or discrete")


@pytest.mark.parametrize("tile", [7, 0, -1, 8.0, "8", True])
def test_a_bad_tile_is_refused(pipe: HartPipeline, tile: Any) -> None:
    rejected(lambda: pipe.enable_decoder_tiling(tile), "tile must be a whole number of 8 or more")


def test_without_a_text_encoder_only_embeddings_will_do(pipe: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = pipe.encode_prompt("a")
    monkeypatch.setattr(pipe, "text_encoder", None)
    rejected(lambda: pipe("a"), "loaded without a text encoder; pass prompt_embeds")
    rejected(lambda: pipe.encode_prompt("a"), "loaded without a text encoder")
    rejected(lambda: pipe(prompt_embeds=embeds, negative_prompt="b"), "loaded without a text encoder")
    assert len(pipe(prompt_embeds=embeds).images) == 1


# The checks by themselves: what passes, and as what.


@pytest.mark.parametrize(("given", "listed"), [("a", ["a"]), (["a", "b"], ["a", "b"]), (("a",), ["a"])])
def test_prompts_become_a_list(given: Any, listed: list[str]) -> None:
    assert check_prompts(given) == listed


def test_the_list_is_a_copy() -> None:
    given = ["a"]
    assert check_prompts(given) is not given


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_every_kind(value: Any) -> None:
    assert check_int(value, "n", 3, 3) == 3
    assert type(check_int(value, "n", 0)) is int


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
def test_numbers_of_every_kind(value: Any) -> None:
    assert check_float(value, "x", 0.5, 0.5) == 0.5
    assert type(check_float(value, "x", 0)) is float
    assert check_float(1, "x", 0) == 1.0


@pytest.mark.parametrize("value", [np.bool_(True), np.array([3]), torch.tensor(3), 3j])
def test_what_looks_like_a_number_is_none(value: Any) -> None:
    rejected(lambda: check_int(value, "n", 0), "n must be a whole number of 0 or more")
    rejected(lambda: check_float(value, "x", 0), "x must be a number of 0 or more")


@pytest.mark.parametrize("size", [None, 512, 1024])
def test_every_size_of_the_checkpoint_passes(size: int | None) -> None:
    check_size(size, (512, 1024))


def test_a_size_that_is_not_there_brings_the_list() -> None:
    rejected(lambda: check_size(768, (1024, 512)), "it has 512, 1024")


# Seeds.


def test_a_number_seeds_consecutive_images() -> None:
    assert seeds_for(3, 7, None, CPU) == ([7, 8, 9], CPU)
    assert seeds_for(1, 0, None, CPU)[0] == [0]
    assert seeds_for(2, MAX_SEED - 1, None, CPU)[0] == [MAX_SEED - 1, MAX_SEED]
    assert seeds_for(1, np.int64(7), None, CPU)[0] == [7]


@pytest.mark.parametrize("listed", [[5, 5, 0], (5, 5, 0), [np.int64(5), 5, 0]])
def test_a_list_seeds_image_by_image(listed: Any) -> None:
    assert seeds_for(3, listed, None, CPU)[0] == [5, 5, 0]


def test_without_a_seed_every_image_gets_a_new_one() -> None:
    torch.manual_seed(0)
    first = seeds_for(4, None, None, CPU)[0]
    torch.manual_seed(0)
    second = seeds_for(4, None, None, CPU)[0]
    assert len({*first, *second}) == 8  # by chance otherwise once in 150 million runs


def test_a_fresh_generator_stands_for_its_seed() -> None:
    assert seeds_for(1, None, fresh(7), CPU) == ([7], CPU)
    assert seeds_for(2, None, [fresh(7), fresh(3)], CPU)[0] == [7, 3]


@pytest.mark.parametrize("seed", [2**63, -1])
def test_every_seed_that_a_generator_takes_can_be_given_back(seed: int) -> None:
    seeds, _ = seeds_for(1, None, fresh(seed), CPU)
    assert seeds == [seed % 2**64]
    assert seeds_for(1, seeds[0], None, CPU)[0] == seeds


def test_a_generator_moves_on() -> None:
    generator = fresh()
    first, second = (seeds_for(1, None, generator, CPU)[0] for _ in range(2))
    assert first == [7]
    assert second != first
    again = fresh()
    assert [seeds_for(1, None, again, CPU)[0] for _ in range(2)] == [first, second]


def test_one_generator_s_seed_is_counted_up() -> None:
    assert seeds_for(3, None, fresh(), CPU)[0] == [7, 8, 9]
    first, second = seeds_for(2, None, used(), CPU)[0]
    assert second == first + 1


def test_a_used_generator_draws_its_seed() -> None:
    seeds, _ = seeds_for(1, None, used(), CPU)
    assert seeds != [7]
    assert seeds_for(1, None, used(), CPU)[0] == seeds
    assert 0 <= seeds[0] <= MAX_SEED


@pytest.mark.parametrize(("device", "draws"), [("cuda:0", "cuda:0"), ("cpu", "cpu"), ("mps", "cpu")])
def test_cuda_draws_for_itself_and_the_cpu_for_the_others(device: str, draws: str) -> None:
    assert seeds_for(1, 7, None, torch.device(device)) == ([7], torch.device(draws))
    assert seeds_for(1, None, None, torch.device(device))[1] == torch.device(draws)
    assert seeds_for(1, None, fresh(), torch.device(device)) == ([7], CPU)


def test_generators_share_one_device() -> None:
    rejected(lambda: seeds_for(2, None, [fresh(), CudaGenerator()], torch.device("cuda:0")), "are on different devices")
