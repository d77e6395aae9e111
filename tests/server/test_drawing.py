"""What the worker draws: each row as if alone, whatever becomes of the others; previews; those who left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from hart_infer import HartPipeline, Step
from hart_infer.server import drawing
from hart_infer.server.drawing import draw, preview_steps
from hart_infer.server.log import JsonFormatter
from hart_infer.server.model import Model
from hart_infer.server.protocol import (
    Ask,
    Draw,
    Drawn,
    Failed,
    FromWorker,
    Given,
    Picture,
    Preview,
    Rebuilt,
    Reconstruct,
    Row,
    RowId,
    Settings,
)
from tests.server import stand_in
from tests.server.stand_in import SIDE, StandIn, Talker, load

PLAIN = Settings(SIDE)


def rows(*prompts: str, previews: int = 0) -> tuple[Row, ...]:
    return tuple(Row(RowId(place, 0), prompt, 10 * place, previews) for place, prompt in enumerate(prompts))


def run(model: Model, job: Draw, dropped: Any = ()) -> list[FromWorker]:
    sent: list[FromWorker] = []
    draw(model, job, sent.append, lambda row: row in dropped)
    return sent


def image(picture: Picture) -> Image.Image:
    return drawing.received(picture)


def drawn(messages: list[FromWorker]) -> dict[RowId, Image.Image]:
    return {each.row: image(each.picture) for each in messages if isinstance(each, Drawn)}


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 6, []), (1, 6, [2]), (2, 6, [1, 3]), (3, 6, [0, 2, 3]), (3, 14, [2, 6, 9]), (3, 2, [0]), (3, 1, []), (1, 14, [6])],
)
def test_previews_are_spread_and_the_last_step_has_none(count: int, steps: int, expected: list[int]) -> None:
    assert preview_steps(count, steps) == expected


def test_rows_are_drawn_in_one_call_and_each_gets_its_seed_s_picture() -> None:
    model = load()
    found = drawn(run(model, Draw(rows("a", "b", "a"), PLAIN)))
    assert model.pipe.calls == [("a", "b", "a")]
    assert found == {RowId(i, 0): stand_in.picture(prompt, 10 * i) for i, prompt in enumerate("aba")}


def test_settings_reach_the_call() -> None:
    settings = Settings(2 * SIDE, (("guidance_scale", 2.0), ("top_k", 3)))
    model = load()
    seen: dict[str, Any] = {}

    class Watched(StandIn):
        def __call__(self, prompt: Any, **arguments: Any) -> Any:
            seen.update(arguments)
            return super().__call__(prompt, **arguments)

    found = drawn(run(replace(model, pipe=Watched(), reproducible=False), Draw(rows("a"), settings)))
    assert found[RowId(0, 0)].size == (2 * SIDE, 2 * SIDE)
    assert {name: seen[name] for name in ("guidance_scale", "top_k", "size", "reproducible")} == {
        "guidance_scale": 2.0,
        "top_k": 3,
        "size": 2 * SIDE,
        "reproducible": False,
    }


def test_a_broken_row_leaves_its_neighbours_alone(caplog: pytest.LogCaptureFixture) -> None:
    messages = run(load(), Draw(rows("a", "break this", "c"), PLAIN))
    assert set(drawn(messages)) == {RowId(0, 0), RowId(2, 0)}
    (failed,) = (each for each in messages if isinstance(each, Failed))
    assert failed.row == RowId(1, 0)
    assert failed.reason == "failed"
    assert "RuntimeError" in failed.message
    (record,) = caplog.records
    logged = JsonFormatter().format(record)
    assert '"error": "RuntimeError"' in logged
    assert "stand_in.py" in logged
    assert "break this" not in failed.message + logged


def test_what_an_error_says_of_other_texts_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Telling(Talker):
        def __call__(self, prompt: Any, *, negative_prompt: str = "", **arguments: Any) -> Any:
            raise RuntimeError(f"can't leave out {negative_prompt}")

        def answer(self, media: Any, question: Any, *, history: Any, **options: Any) -> Any:
            raise RuntimeError(f"can't go on after {history}")

    model = replace(load(), pipe=Telling())
    messages = run(model, Draw(rows("a"), Settings(SIDE, (("negative_prompt", "my secret"),))))
    drawing.answer(model, Ask(RowId(1, 0), ("why?",), ((("so?",), "a secret"),)), messages.append, lambda row: False)
    assert [type(each) for each in messages] == [Failed, Failed]
    assert len(caplog.records) == 2
    assert "secret" not in str(messages) + "".join(JsonFormatter().format(record) for record in caplog.records)


def test_a_prompt_that_cannot_be_prepared_leaves_its_neighbours_alone() -> None:
    def argument(prompt: str) -> str:
        if prompt == "b":
            raise RuntimeError("It can't be prepared.")
        return prompt

    messages = run(replace(load(), argument=argument), Draw(rows("a", "b", "c"), PLAIN))
    assert set(drawn(messages)) == {RowId(0, 0), RowId(2, 0)}
    (failed,) = (each for each in messages if isinstance(each, Failed))
    assert (failed.row, failed.reason) == (RowId(1, 0), "failed")


@pytest.mark.parametrize(("prompt", "reason"), [("unknown", "input"), ("too much", "memory")])
def test_reasons(prompt: str, reason: str) -> None:
    messages = run(load(), Draw(rows("a", prompt), PLAIN))
    assert set(drawn(messages)) == {RowId(0, 0)}
    (failed,) = (each for each in messages if isinstance(each, Failed))
    assert failed.reason == reason


def test_previews_go_to_the_rows_that_want_them_once_each() -> None:
    job = Draw((*rows("a", "b", previews=3), Row(RowId(5, 0), "break", 1)), PLAIN)  # drawn again, one by one
    messages = run(load(), job)
    previews = [(each.row, each.number) for each in messages if isinstance(each, Preview)]
    assert sorted(previews) == [(RowId(place, 0), number) for place in (0, 1) for number in range(3)]
    last = [each for each in messages if isinstance(each, Preview) and each.row == RowId(1, 0)][-1]
    assert image(last.picture) == stand_in.painted((*stand_in.colour("b", 10)[:2], preview_steps(3, stand_in.STEPS)[2]))


def test_a_batch_that_everyone_left_ends_at_the_next_step() -> None:
    model = load()
    left: set[RowId] = set()
    steps: list[int] = []

    class Leaving(StandIn):
        def __call__(self, prompt: Any, *, callback_on_step_end: Any, **arguments: Any) -> Any:
            def after(step: Any) -> None:
                steps.append(step.index)
                if step.index == 1:
                    left.update({RowId(0, 0), RowId(1, 0)})
                callback_on_step_end(step)

            return super().__call__(prompt, callback_on_step_end=after, **arguments)

    assert run(replace(model, pipe=Leaving()), Draw(rows("a", "b"), PLAIN), left) == []
    assert steps == [0, 1]


def test_a_row_that_was_left_before_is_not_drawn() -> None:
    model = load()
    assert set(drawn(run(model, Draw(rows("a", "b"), PLAIN), {RowId(0, 0)}))) == {RowId(1, 0)}
    assert model.pipe.calls == [("b",)]


def test_a_failed_device_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StandIn, "__call__", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(load(), Draw(rows("a", "b"), PLAIN))


# With hart-mini.


@pytest.fixture(scope="module")
def mini() -> Model:
    pipe = HartPipeline.from_pretrained("hart-mini", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe, "hart-mini", "HART", str)


def test_pictures_are_those_of_a_call_alone_to_the_byte(mini: Model) -> None:
    prompts = ("a cat", "a pizza, noto style", "a cat")
    found = drawn(run(mini, Draw(rows(*prompts), Settings(mini.pipe.sizes[0]))))
    for place, prompt in enumerate(prompts):
        assert found[RowId(place, 0)].tobytes() == mini.pipe(prompt, seed=10 * place).images[0].tobytes()


def test_previews_are_those_of_a_call_alone(mini: Model) -> None:
    alone: list[bytes] = []

    def keep(step: Step) -> None:
        if step.index in preview_steps(2, step.num_scales):
            alone.append(step.preview()[0].tobytes())

    mini.pipe("a cat", seed=10, callback_on_step_end=keep)
    job = Draw((rows("a dog")[0], replace(rows("", "a cat", previews=2)[1])), Settings(mini.pipe.sizes[0]))
    found = [each.picture.pixels for each in run(mini, job) if isinstance(each, Preview)]
    assert found == alone


def test_an_edit_is_that_of_a_call_alone(mini: Model) -> None:
    photo = mini.pipe("a pizza", seed=1).images[0]
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (photo.width // 2, 0, *photo.size))
    given = Given(drawing.sent(photo), Picture(*mask.size, mask.tobytes()), "digest")
    found = drawn(run(mini, Draw(rows("a dog", "a dog"), Settings(photo.width, (), "digest"), given)))
    expected = mini.pipe.inpaint(photo, mask, "a dog", seed=[0, 10], num_images_per_prompt=2).images
    assert [each.tobytes() for each in found.values()] == [each.tobytes() for each in expected]


def test_a_reconstruction_is_the_pipeline_s(mini: Model) -> None:
    photo = Image.effect_noise((150, 130), 60).convert("RGB")
    messages: list[FromWorker] = []
    drawing.reconstruct(mini, Reconstruct(RowId(1, 0), drawing.sent(photo)), messages.append)
    (rebuilt,) = messages
    assert isinstance(rebuilt, Rebuilt)
    assert image(rebuilt.original).size == (mini.pipe.sizes[0],) * 2
    expected = [(mode, mini.pipe.reconstruct(photo, mode=mode).tobytes()) for mode in ("discrete", "hybrid")]
    assert [(mode, made.pixels) for mode, made in rebuilt.modes] == expected


def test_facts(mini: Model) -> None:
    facts = mini.facts()
    assert (facts.sizes, facts.edits, facts.answers) == (mini.pipe.sizes, True, False)
    assert (facts.modes, facts.num_scales) == (("discrete", "hybrid"), mini.pipe.num_scales)
    assert facts.speeds[:2] == ("exact", "fast")
    assert facts.guidance_scale == mini.pipe.defaults.guidance_scale
    for_hart = {"num_inference_steps", "residual_temperature"}
    assert {"guidance_scale", "negative_prompt", "top_k", "top_p"} | for_hart <= facts.options
