"""Generations by graphs, on a stand-in that replays operators on the same memory: pictures, addresses, what can be captured."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline, VarPipeline
from hart_infer.engine.graphs import Graphs
from hart_infer.errors import InputError, WeightsError
from hart_infer.generation.sampling import PhiloxSampler
from hart_infer.pipelines import next_scale
from tests.engine.tape import NotCapturable, TapeRecorder


@pytest.fixture(autouse=True)
def drawn_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_scale, "make_sampler", lambda seeds, device, schedule: PhiloxSampler(seeds, device, schedule))


@pytest.fixture
def recorder() -> TapeRecorder:
    return TapeRecorder()


@pytest.fixture
def by_graphs(pipe: HartPipeline, recorder: TapeRecorder) -> Iterator[HartPipeline]:
    pipe.engine.graphs = Graphs(recorder)
    yield pipe
    pipe.disable_graphs()


def latents(pipe: Any, *prompt: Any, **arguments: Any) -> Tensor:
    found: Tensor = pipe(*prompt, output_type="latent", **arguments).images
    return found


def eagerly(pipe: Any, *prompt: Any, **arguments: Any) -> Tensor:
    graphs, pipe.engine.graphs = pipe.engine.graphs, None
    try:
        return latents(pipe, *prompt, **arguments)
    finally:
        pipe.engine.graphs = graphs


CALLS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2**64 - 1},
    {"seed": 3, "guidance_scale": 2.0, "top_k": 7},
    {"seed": 4, "guidance_scale": 9.0, "top_k": 40},
    {"seed": 5},
]


def test_replayed_pictures_are_the_eager_ones(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    """Whatever prompt, seed, guidance and top-k: they are numbers on the device. Nothing is captured a third time."""
    scales = len(by_graphs.transformer.config.patch_nums)
    for i, call in enumerate(CALLS):
        prompt = f"a picture, number {i * 17}"
        assert torch.equal(latents(by_graphs, prompt, **call), eagerly(by_graphs, prompt, **call)), call
        assert len(recorder.tapes) == (0 if i == 0 else 1 + scales)
    assert {tape.replays for tape in recorder.tapes} == {len(CALLS) - 1}


def test_an_interruption_ends_all_generations_of_a_call(by_graphs: HartPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run one after the other: those behind the one that was interrupted are not begun. Other calls' graphs stay right."""
    for seed in (1, 2):
        expected = latents(by_graphs, "a cat", seed=seed)
    run_scale, ran = by_graphs.engine.run_scale, []

    def interrupting(states: Any, stage: Any) -> None:
        run_scale(states, stage)
        ran.append(stage.index)
        by_graphs._interrupt = len(ran) == 2

    monkeypatch.setattr(by_graphs.engine, "run_scale", interrupting)
    found = latents(by_graphs, "a cat", seed=1, num_images_per_prompt=3)
    assert ran == [0, 1]
    assert found[0].any() and not found[1:].any()
    assert torch.equal(latents(by_graphs, "a cat", seed=2), expected)


def test_what_a_callback_sees_together_runs_without_graphs(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    for _ in range(3):
        latents(by_graphs, "a cat", seed=1, num_images_per_prompt=2, callback_on_step_end=lambda step: None)
    assert not recorder.tapes


def test_graphs_keep_the_unconditional_prefix_that_they_read(by_graphs: HartPipeline) -> None:
    for seed in (1, 2):
        latents(by_graphs, "a cat", seed=seed)
    prefix = weakref.ref(by_graphs.engine.unconditional())
    by_graphs.engine._unconditional = None
    assert prefix() is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 0.0},
        {"top_p": 0.8},
        {"top_k": 0},
        {"more_smooth": False},
        {"num_inference_steps": 4},
        {"num_inference_steps": 0},
        {"residual_temperature": 0.5},
        {"negative_prompt": "a dog"},
        {"num_images_per_prompt": 3},
        {"speed": "fast"},
        {"speed": "turbo"},
        {"speed": "draft"},
    ],
    ids=str,
)
def test_another_kind_of_call_has_graphs_of_its_own(
    by_graphs: HartPipeline, recorder: TapeRecorder, changes: dict[str, Any]
) -> None:
    for seed in (1, 2):
        latents(by_graphs, "a cat", seed=seed)
    before = len(recorder.tapes)
    for seed in (3, 4, 5):
        given = {"seed": seed, "reproducible": False} | changes
        assert torch.equal(latents(by_graphs, "a cat", **given), eagerly(by_graphs, "a cat", **given))
    assert len(recorder.tapes) > before
    assert torch.equal(latents(by_graphs, "a cat", seed=6), eagerly(by_graphs, "a cat", seed=6))


def test_pictures_drawn_one_by_one_share_the_graphs_of_one(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    prompts = ["a cat", "a red heart"]
    for seed in (1, 5):
        call: dict[str, Any] = {"seed": seed, "num_images_per_prompt": 2, "reproducible": True}
        assert torch.equal(latents(by_graphs, prompts, **call), eagerly(by_graphs, prompts, **call))
    assert len(recorder.tapes) == 1 + len(by_graphs.transformer.config.patch_nums)


def test_all_memory_is_where_it_was(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    """Callbacks see each scale; what they see lies at one address in every call."""
    seen: list[list[int]] = []
    for seed in range(4):
        seen.append([])
        graphs = by_graphs.engine.graphs
        assert graphs is not None
        latents(by_graphs, "a cat", seed=seed)
        for _, plan in graphs._plans.values():
            if plan is not None:
                state = plan._state  # type: ignore[union-attr]
                seen[-1] += [x.data_ptr() for x in (state.f_hat, state.hidden_states, *state.indices)]
    assert seen[0] == [] and seen[1] == seen[2] == seen[3]


def test_a_callback_runs_between_graphs(by_graphs: HartPipeline) -> None:
    def run(count: int) -> list[Tensor]:
        steps: list[Tensor] = []
        by_graphs("a cat", seed=count, callback_on_step_end=lambda step: steps.append(step.f_hat))
        return steps

    for seed in (1, 2, 3):
        graphs, by_graphs.engine.graphs = by_graphs.engine.graphs, None
        expected = run(seed)
        by_graphs.engine.graphs = graphs
        found = run(seed)
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected) > 1


def test_stopping_early_leaves_graphs_that_go_on(by_graphs: HartPipeline) -> None:
    def stop(step: Any) -> None:
        if step.index == 2:
            step.stop()

    for seed in (1, 2, 3):
        by_graphs("a cat", seed=seed, callback_on_step_end=stop)
    for seed in (4, 5):
        assert torch.equal(latents(by_graphs, "a cat", seed=seed), eagerly(by_graphs, "a cat", seed=seed))


def test_the_decoder_has_a_graph(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    for seed in (1, 2, 3):
        found = by_graphs("a cat", seed=seed, output_type="pt").images
        graphs, by_graphs.engine.graphs = by_graphs.engine.graphs, None
        assert torch.equal(found, by_graphs("a cat", seed=seed, output_type="pt").images)
        by_graphs.engine.graphs = graphs
    assert len(recorder.tapes) == 2 + len(by_graphs.transformer.config.patch_nums)


def test_logits_that_are_not_finite_are_told_with_the_picture(by_graphs: HartPipeline) -> None:
    bias = by_graphs.transformer.head.linear.bias
    for seed in (1, 2):
        latents(by_graphs, "a cat", seed=seed)
    kept = bias.data.clone()
    bias.data.fill_(torch.nan)  # which no stamp notices: the graphs read it
    with pytest.raises(WeightsError, match="not finite"):
        latents(by_graphs, "a cat", seed=3)
    bias.data.copy_(kept)
    assert torch.equal(latents(by_graphs, "a cat", seed=3), eagerly(by_graphs, "a cat", seed=3))


def test_other_weights_are_captured_anew(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    weight = by_graphs.transformer.head.linear.weight
    for seed in (1, 2):
        latents(by_graphs, "a cat", seed=seed)
    count, before = len(recorder.tapes), weight.clone()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        for seed in (3, 4):
            assert torch.equal(latents(by_graphs, "a cat", seed=seed), eagerly(by_graphs, "a cat", seed=seed))
        assert len(recorder.tapes) == 2 * count
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_while_one_call_runs_another_runs_eagerly(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    for seed in (1, 2):
        latents(by_graphs, "a cat", seed=seed)
    replays = recorder.tapes[0].replays
    found: list[Tensor] = []

    def another(step: Any) -> None:
        if step.index == 1:
            thread = threading.Thread(target=lambda: found.append(latents(by_graphs, "a dog", seed=8)))
            thread.start()
            thread.join()

    by_graphs("a cat", seed=7, callback_on_step_end=another)
    assert recorder.tapes[0].replays == replays + 1
    assert torch.equal(found[0], eagerly(by_graphs, "a dog", seed=8))


def test_an_error_in_a_capture_or_a_callback_leaves_the_next_call_whole(
    by_graphs: HartPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents(by_graphs, "a cat", seed=1)
    with monkeypatch.context() as broken:
        broken.setattr(by_graphs.transformer.head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents(by_graphs, "a cat", seed=2)
    with pytest.raises(KeyError):
        by_graphs("a cat", seed=3, callback_on_step_end=lambda step: {}["no such key"])
    for seed in (4, 5, 6):
        assert torch.equal(latents(by_graphs, "a cat", seed=seed), eagerly(by_graphs, "a cat", seed=seed))


def test_a_callback_may_clear_the_engine(by_graphs: HartPipeline) -> None:
    for seed in (1, 2, 3, 4):
        call: dict[str, Any] = {"seed": seed, "callback_on_step_end": lambda step: by_graphs.engine.clear()}
        assert torch.equal(latents(by_graphs, "a cat", **call), eagerly(by_graphs, "a cat", seed=seed))


def test_an_edit_runs_without(by_graphs: HartPipeline, recorder: TapeRecorder) -> None:
    picture = torch.rand(1, 3, *by_graphs.sizes * 2)
    for seed in (1, 2, 3):
        by_graphs.inpaint(picture, (0, 0, 0.5, 1), "a cat", seed=seed, output_type="latent")
    assert not recorder.tapes


def test_var_by_graphs(whole_var_tiny: Any, recorder: TapeRecorder) -> None:
    pipe = VarPipeline.from_pretrained(whole_var_tiny, device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.engine.graphs = Graphs(recorder)
    for seed, label in ((1, 3), (2, 4), (3, 5)):
        assert torch.equal(latents(pipe, label, seed=seed), eagerly(pipe, label, seed=seed))
    assert {tape.replays for tape in recorder.tapes} == {2}


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda x: x * x.abs().max().item(), "_local_scalar_dense"),
        (lambda x: x + x[x > 0].sum(), "in a graph"),
        (lambda x: x + torch.randn(1), "randn"),
        (lambda x: x + torch.ones(1, device="meta"), "between devices"),
    ],
    ids=["item", "boolean mask", "generator", "copy"],
)
def test_what_cuda_could_not_capture_is_found(
    by_graphs: HartPipeline, monkeypatch: pytest.MonkeyPatch, planted: Any, message: str
) -> None:
    latents(by_graphs, "a cat", seed=1)
    forward = by_graphs.transformer.head.forward
    monkeypatch.setattr(by_graphs.transformer.head, "forward", lambda *given: planted(forward(*given)))
    with pytest.raises(NotCapturable, match=message):
        latents(by_graphs, "a cat", seed=2)


def test_without_a_cuda_device_there_are_none(pipe: HartPipeline) -> None:
    with pytest.raises(InputError, match="enable_graphs needs a CUDA device; this pipeline is on cpu, which has no graphs."):
        pipe.enable_graphs()
    assert pipe.engine.graphs is None
