"""What the command loads and serves of each family is what its pipeline draws and answers in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hart_infer import VarPipeline, VilaUPipeline
from hart_infer.cli.options import MachineOptions, ModelOptions
from hart_infer.cli.serve import DrawingOptions, load_model
from hart_infer.errors import InputError
from hart_infer.server.drawing import answer, draw, reconstruct, sent
from hart_infer.server.model import Model
from hart_infer.server.protocol import (
    Answered,
    Ask,
    Draw,
    Drawn,
    Failed,
    FromWorker,
    Piece,
    Preview,
    Rebuilt,
    Reconstruct,
    Row,
    RowId,
    Settings,
)
from tests.released_vila_u import write_checkpoint

CPU = MachineOptions("cpu", None, None)
PLAIN = DrawingOptions(reproducible=True, safety=None, safety_threshold=0.5)
PLACE = RowId(1, 0)


def options(folder: Path, **given: Any) -> ModelOptions:
    return ModelOptions(
        **{"revision": None, "local_files_only": True, "variant": None, "use_ema": True, **given},
        model=str(folder),
        text_encoder=None,
    )


def drawn(model: Model, *rows: tuple[str, int], side: int, previews: int = 0, **settings: Any) -> list[FromWorker]:
    messages: list[FromWorker] = []
    listed = tuple(Row(RowId(place, 0), prompt, seed, previews) for place, (prompt, seed) in enumerate(rows))
    draw(model, Draw(listed, Settings(side, tuple(settings.items()))), messages.append, lambda row: False)
    return messages


def pixels(messages: list[FromWorker]) -> list[bytes]:
    return [each.picture.pixels for each in messages if isinstance(each, Drawn)]


def test_classes_by_name_or_number(whole_var_tiny: Path) -> None:
    model = load_model(options(whole_var_tiny), CPU, PLAIN, "var")
    facts = model.facts()
    assert (facts.name, facts.family, facts.edits, facts.answers) == ("var", "VAR", True, False)
    assert {"guidance_scale", "speed", "top_k", "top_p"} == facts.options
    (side,) = facts.sizes
    pipe = VarPipeline.from_pretrained(whole_var_tiny, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    found = pixels(drawn(model, ("3", 7), ("7", 8), side=side, top_k=5))
    assert found == [pipe(int(label), seed=seed, top_k=5).images[0].tobytes() for label, seed in (("3", 7), ("7", 8))]
    assert (facts.modes, facts.num_scales, "exact" in facts.speeds) == (("discrete", "hybrid"), pipe.num_scales, True)
    messages = drawn(model, ("3", 7), ("unicorn", 8), side=side)
    (failed,) = (each for each in messages if isinstance(each, Failed))
    assert (failed.row.job, failed.reason) == (1, "input")
    assert len(pixels(messages)) == 1


@pytest.fixture(scope="module")
def vila_u(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")
    folder = tmp_path_factory.mktemp("released")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def talker(vila_u: Path) -> Model:
    return load_model(options(vila_u), CPU, PLAIN, "vila-u")


@pytest.fixture(scope="module")
def pipe(vila_u: Path) -> VilaUPipeline:
    made = VilaUPipeline.from_pretrained(vila_u, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def test_vila_u_draws_with_previews(talker: Model, pipe: VilaUPipeline) -> None:
    facts = talker.facts()
    assert (facts.family, facts.edits, facts.answers) == ("VILA-U", False, True)
    assert {"guidance_scale", "negative_prompt", "top_k", "top_p"} == facts.options
    assert (facts.modes, facts.speeds, facts.num_scales) == (("discrete",), (), pipe.num_scales)
    messages = drawn(talker, ("a cat", 7), ("a tree", 8), side=facts.sizes[0], previews=2, negative_prompt="car")
    expected = [
        pipe(text, seed=seed, negative_prompt="car").images[0].tobytes() for text, seed in (("a cat", 7), ("a tree", 8))
    ]
    assert pixels(messages) == expected
    assert sum(isinstance(each, Preview) for each in messages) == 4


def test_vila_u_reconstructs_from_its_codes(talker: Model, pipe: VilaUPipeline) -> None:
    messages: list[FromWorker] = []
    picture = pipe("a cat", seed=7).images[0]
    reconstruct(talker, Reconstruct(PLACE, sent(picture)), messages.append)
    assert messages == [Rebuilt(PLACE, sent(picture), (("discrete", sent(pipe.reconstruct(picture))),))]


def test_vila_u_answers_piece_by_piece(talker: Model, pipe: VilaUPipeline) -> None:
    picture = pipe("a cat", seed=7).images[0]
    history = (((sent(picture), "What is it?"), "A cat."),)
    settings = (("do_sample", True), ("max_new_tokens", 12), ("seed", 3), ("temperature", 0.9))
    messages: list[FromWorker] = []
    answer(talker, Ask(PLACE, ("Is it red?",), history, settings), messages.append, lambda row: False)
    assert messages.pop() == Answered(PLACE)
    told = pipe.answer(None, "Is it red?", history=[([picture, "What is it?"], "A cat.")], **dict(settings))
    assert "".join(each.text for each in messages if isinstance(each, Piece)) == told


def test_an_answer_that_nobody_waits_for_ends(talker: Model) -> None:
    messages: list[FromWorker] = []
    ask = Ask(PLACE, ("a cat",), (), (("max_new_tokens", 50), ("do_sample", True), ("seed", 1)))
    answer(talker, ask, messages.append, lambda row: bool(messages))
    assert len(messages) == 1


def test_a_question_that_is_too_long_is_the_client_s_fault(talker: Model) -> None:
    messages: list[FromWorker] = []
    answer(talker, Ask(PLACE, ("a cat",), (), (("max_new_tokens", 10**6),)), messages.append, lambda row: False)
    (failed,) = messages
    assert isinstance(failed, Failed)
    assert failed.reason == "input"


def test_options_that_a_family_lacks_are_told_in_a_sentence(whole_var_tiny: Path) -> None:
    with pytest.raises(InputError, match="VAR model, which does not take --no-ema"):
        load_model(options(whole_var_tiny, use_ema=False), CPU, PLAIN, "var")
