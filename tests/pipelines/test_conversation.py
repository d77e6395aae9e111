"""VilaUPipeline answers: media, turns, limits, settings, streams; on a small random checkpoint."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hart_infer import Frames, InputError, OutOfMemoryError, Step, VilaUPipeline
from hart_infer.generation.next_token import AnswerState
from hart_infer.models.vila_u.text import IMAGE, IMAGE_ID, Turn
from hart_infer.pipelines import conversation
from tests.pipelines.test_vila_u import FRAMES, load, noise, released_checkpoint, with_exif
from tests.released_vila_u import GRID, configs

pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")  # by `make newest` and `make oldest`

LIMIT = 600  # positions of the checkpoint
PIECE = GRID**2  # positions of a picture
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose videos have few frames. Read only."""
    return released_checkpoint(tmp_path_factory.mktemp("released"), {"num_video_frames": FRAMES})


@pytest.fixture(scope="module")
def pipe(released: Path) -> VilaUPipeline:
    """Loaded once; leave dtype, weights and settings alone."""
    return load(released)


@pytest.fixture
def own(released: Path) -> VilaUPipeline:
    """One of the test's own, to cast and to set."""
    return load(released)


def answered(pipe: VilaUPipeline, media: Any, question: Any = QUESTION, **options: Any) -> str:
    answer = pipe.answer(media, question, **{"max_new_tokens": 12, "seed": 0, **options})
    assert isinstance(answer, str)
    return answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Tensor | None, Any, Any]]:
    """What each answer is drawn from: ids, pixel values, settings, sampler."""
    seen: list[Any] = []
    draw = VilaUPipeline._answer

    def spy(self: VilaUPipeline, *args: Any) -> Iterator[str]:
        seen.append(args)
        return draw(self, *args)

    monkeypatch.setattr(VilaUPipeline, "_answer", spy)
    return seen


# Media.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture and videos of it as files."""
    folder = tmp_path_factory.mktemp("files")
    frames = [noise(seed=seed) for seed in range(FRAMES)]
    noise().save(folder / "still.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tiff", save_all=True, append_images=frames[1:])
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"frames/{number}.png")
    return folder


def test_the_same_picture_however_it_is_given(pipe: VilaUPipeline, files: Path) -> None:
    expected = answered(pipe, noise())
    path = files / "still.png"
    for media in ([noise()], (noise(),), path, str(path), [path], [[noise()]]):
        assert answered(pipe, media) == expected
    for question in ([noise(), QUESTION], [path, QUESTION], (noise(), QUESTION), [[noise()], QUESTION]):
        assert answered(pipe, None, question) == expected
    assert answered(pipe, noise(seed=1)) != expected
    assert answered(pipe, None) != expected


def test_the_same_video_however_it_is_given(pipe: VilaUPipeline, files: Path) -> None:
    frames = [noise(seed=seed) for seed in range(FRAMES)]
    expected = answered(pipe, Frames(frames))
    for media in (files / "frames", str(files / "frames"), Frames(tuple(frames)), Frames(files / "frames"), [Frames(frames)]):
        assert answered(pipe, media) == expected
    assert answered(pipe, frames) == expected  # pictures follow each other as frames do
    assert answered(pipe, frames[::-1]) != expected


def test_an_animation_is_a_video_and_pages_are_not(pipe: VilaUPipeline, files: Path, asked: list[Any]) -> None:
    answered(pipe, files / "moving.gif")
    answered(pipe, files / "pages.tiff")
    answered(pipe, Frames(files / "pages.tiff"))
    answered(pipe, Frames([noise()]))  # a short video repeats frames
    assert [ids.count(IMAGE_ID) for ids, *_ in asked] == [FRAMES, 1, FRAMES, FRAMES]
    assert [len(pixels) for _, pixels, *_ in asked] == [FRAMES, 1, FRAMES, FRAMES]


def test_pictures_are_read_as_elsewhere(pipe: VilaUPipeline, asked: list[Any]) -> None:
    answered(pipe, [with_exif(noise(), 6), noise(mode="P")])
    _, pixels, *_ = asked[0]
    meant = [noise().transpose(Image.Transpose.ROTATE_270), noise(mode="P").convert("RGB")]
    assert torch.equal(pixels, pipe._pixel_values(meant))


def test_media_stand_where_they_are_put(pipe: VilaUPipeline, asked: list[Any]) -> None:
    encode = pipe.tokenizer.encode
    video = Frames([noise()])
    for media, question, message in [
        (noise(), " What? ", [IMAGE, " What? "]),
        ([noise(), noise()], "What?", [IMAGE, IMAGE, "What?"]),
        (None, ["This:", noise(), "or", video, "?"], ["This:", IMAGE, "or", *[IMAGE] * FRAMES, "?"]),
        (None, ["What?", noise()], ["What?", IMAGE]),
        (noise(), ["What?", noise()], [IMAGE, "What?", IMAGE]),
        (None, ["a", "b"], ["a", "b"]),
        (noise(), "", [IMAGE]),
    ]:
        answered(pipe, media, question)
        assert asked[-1][0] == encode(message)


def test_pictures_keep_their_order(pipe: VilaUPipeline, asked: list[Any]) -> None:
    pictures = [noise(seed=seed) for seed in range(4)]
    history = [(["a", pictures[1]], "b"), ("c", "d")]
    answered(pipe, pictures[0], [pictures[2], "e", pictures[3]], history=history)
    assert torch.equal(asked[0][1], pipe._pixel_values(pictures))


def test_a_picture_s_positions_are_read_row_by_row(pipe: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    splice = conversation.splice_images
    monkeypatch.setattr(conversation, "splice_images", lambda *args: (seen.append(args[2]), splice(*args))[1])
    pictures = [noise(), noise(seed=1)]
    answered(pipe, pictures)
    features = pipe.encode(pictures).features
    expected = [[pipe.projector(each[i, j]) for i in range(GRID) for j in range(GRID)] for each in features]
    assert torch.allclose(seen[0], torch.stack([torch.stack(each) for each in expected]), atol=1e-5)


@pytest.mark.parametrize(
    ("media", "words"),
    [
        (3, "media must be PIL images, paths or Frames, not int"),
        (torch.zeros(3, 35, 35), "media must be PIL images, paths or Frames, not Tensor"),
        ([noise(), 3], "media must be PIL images, paths or Frames, not int"),
        ([], "The list of pictures is empty"),
        (Frames([]), "The video has no frames"),
        (Frames([3]), "A frame must be a PIL image, not int"),
        (Frames(3), "Frames must have a path or a list of PIL images, not int"),  # type: ignore[arg-type]
        (Frames("nothing.mp4"), "nothing.mp4 cannot be read: no such file"),
        (Path("nothing.png"), "nothing.png cannot be read: no such file"),
        (Image.new("F", (8, 8), 3.0), "floats from 3 to 3"),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
@pytest.mark.parametrize("stream", [False, True])
def test_media_that_are_none(pipe: VilaUPipeline, media: Any, words: str, stream: Any) -> None:
    with pytest.raises(InputError, match=words):
        pipe.answer(media, QUESTION, stream=stream)
    with pytest.raises(InputError, match=words):
        pipe.answer(None, [media, QUESTION], stream=stream)


def test_a_folder_and_a_file_that_are_no_media(pipe: VilaUPipeline, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"text\.mp4"):
        pipe.answer(tmp_path / "text.mp4", QUESTION)
    with pytest.raises(InputError, match="holds no frames"):
        pipe.answer(tmp_path / "empty", QUESTION)


# Turns.


def test_earlier_turns_come_before_and_media_in_the_first(pipe: VilaUPipeline, asked: list[Any]) -> None:
    history = [("What?", "A cat."), ("Where?", "Here.")]
    first = answered(pipe, noise(), "Why?", history=history)
    turns = [Turn([IMAGE, "What?"], "A cat."), Turn("Where?", "Here.")]
    assert asked[0][0] == pipe.tokenizer.encode("Why?", history=turns)
    assert answered(pipe, noise(), "Why?", history=tuple(map(list, history))) == first
    assert answered(pipe, None, "Why?", history=[([noise(), "What?"], "A cat."), *history[1:]]) == first
    assert answered(pipe, noise(), "Why?") != first


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (5, "history must be a list of questions and answers, not int"),
        ("ab", "history must be a list of questions and answers, not str"),
        (["ab"], r"history\[0\] must be a tuple of a question and its answer"),
        ([("a", "b"), ("a",)], r"history\[1\] must be a tuple"),
        ([("a", None)], r"history\[0\] must be a tuple"),
        ([(3, "b")], r"history\[0\]\[0\] must be a text, or a list of texts and media, not int"),
        ([([], "b")], r"history\[0\]\[0\] is an empty list"),
    ],
    ids=str,
)
def test_turns_that_are_none(pipe: VilaUPipeline, history: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pipe.answer(None, QUESTION, history=history)


@pytest.mark.parametrize("text", ["<image>", "</s>", "a <im_start> b", "<unk>", "<s>"])
def test_special_tokens_in_the_text_are_plain_text(pipe: VilaUPipeline, text: str, asked: list[Any]) -> None:
    answered(pipe, noise(), text, history=[(text, text)])
    (ids, *_) = asked[0]
    assert ids.count(IMAGE_ID) == 1
    assert ids.count(pipe.tokenizer.bos_id) == 1 and ids.count(pipe.tokenizer.eos_id) == 1  # of the first turn
    assert max(ids) < pipe.tokenizer.image_start


# Settings.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": 3}, "question must be a text, or a list of texts and media, not int"),
        ({"question": None}, "question must be a text"),
        ({"question": []}, "question is an empty list"),
        ({"media": None, "question": " "}, "question is empty; ask something."),
        ({"media": None, "question": ["", "\n"]}, "question is empty; ask something."),
        ({"question": "\ud800"}, "not valid Unicode"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"do_sample": "yes"}, "do_sample must be True or False"),
        ({"stream": 1}, "stream must be True or False"),
        ({"temperature": 0}, "temperature must be a number from 1e-06"),
        ({"temperature": 0, "do_sample": False}, "temperature must be a number from 1e-06"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 10**6}, "top_k must be a whole number"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
        ({"seed": 1, "generator": torch.Generator()}, "contradict"),
        ({"generator": 3}, "generator must be a torch.Generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
@pytest.mark.parametrize("stream", [False, True])
def test_arguments_that_are_refused_at_the_call(pipe: VilaUPipeline, options: dict[str, Any], words: str, stream: bool) -> None:
    with pytest.raises(InputError, match=words):
        pipe.answer(**{"media": noise(), "question": QUESTION, "stream": stream, **options})


def test_the_checkpoint_s_settings_are_the_defaults(pipe: VilaUPipeline, asked: list[Any]) -> None:
    said = configs()["llm/generation_config.json"]
    named = {"temperature": said["temperature"], "top_p": said["top_p"], "top_k": 50}
    assert answered(pipe, noise()) == answered(pipe, noise(), do_sample=True, **named)
    _, _, settings, _ = asked[0]
    assert (settings.temperature, settings.rule.top_p, settings.rule.top_k) == (said["temperature"], said["top_p"], 50)
    assert settings.eos_token_ids == (said["eos_token_id"],)
    answered(pipe, noise(), max_new_tokens=None)
    assert asked[-1][2].max_new_tokens == said["max_length"] - 1


@pytest.mark.parametrize(("values", "limit"), [({"max_new_tokens": 7}, 7), ({"max_length": 4096}, None), ({}, 4095)])
def test_the_limit_of_a_generation_config(tmp_path: Path, values: dict[str, Any], limit: int | None, asked: list[Any]) -> None:
    """Unless a call says it: `max_new_tokens`, or `max_length` less one; never more than fits behind the question."""
    folder = released_checkpoint(tmp_path, llm={"tokenizer_model_max_length": 5000 if limit else LIMIT})
    if values:
        (folder / "llm/generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False, **values}))
    else:
        (folder / "llm/generation_config.json").unlink()  # Llama-2's
    pipe = load(folder)
    assert pipe.answers.do_sample == (not values)
    stream = pipe.answer(noise(), QUESTION, stream=True)
    next(stream, None)
    ids, _, settings, _ = asked[0]
    assert settings.max_new_tokens == (limit or LIMIT - (len(ids) + PIECE - 1))


def test_greedy_needs_no_seed_and_sampling_does(pipe: VilaUPipeline) -> None:
    def greedy(**options: Any) -> str:
        return answered(pipe, noise(), do_sample=False, **options)

    assert greedy(seed=1) == greedy(seed=2) == greedy(temperature=3, top_k=2, top_p=0.1)
    assert greedy() == answered(pipe, noise(), do_sample=True, top_k=1)
    assert greedy() == answered(pipe, noise(), do_sample=True, top_p=1e-6)
    assert greedy() == answered(pipe, noise(), do_sample=True, temperature=1e-4)
    drawn = [answered(pipe, noise(), do_sample=True, temperature=3.0, top_k=0, top_p=1, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_seeds_and_generators(pipe: VilaUPipeline) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0}
    expected = answered(pipe, noise(), seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    assert answered(pipe, noise(), seed=None, generator=generator, **options) == expected
    assert answered(pipe, noise(), seed=None, generator=generator, **options) != expected
    assert answered(pipe, noise(), seed=None, **options) != answered(pipe, noise(), seed=None, **options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    answered(pipe, noise(), **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refused_question_leaves_the_generator_alone(pipe: VilaUPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    with pytest.raises(InputError):
        pipe.answer("nothing.png", QUESTION, generator=generator)
    with pytest.raises(InputError):
        pipe.answer(None, "a " * 900, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_an_end_token_ends_the_answer_and_is_not_in_it(own: VilaUPipeline) -> None:
    whole = answered(own, noise(), do_sample=False)
    tokens: list[int] = []
    answer_of = conversation.answer

    def spy(*args: Any) -> Iterator[int]:
        for token in answer_of(*args):
            tokens.append(token)
            yield token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation, "answer", spy)
        answered(own, noise(), do_sample=False)
    assert len(tokens) == 12
    assert own.tokenizer.decode(tokens) == whole
    own.answers = replace(own.answers, eos_token_id=(tokens[3], 2))
    assert answered(own, noise(), do_sample=False) == own.tokenizer.decode(tokens[: tokens.index(tokens[3]) + 1])
    head = own.llama.lm_head.weight.data
    head[own.tokenizer.eos_id] = 3 * head[tokens[0]]
    assert answered(own, noise(), do_sample=False) == ""


# Limits.


def test_an_over_long_question_is_counted(pipe: VilaUPipeline) -> None:
    length = len(pipe.tokenizer.encode([IMAGE, IMAGE, "a " * 900])) + 2 * (PIECE - 1)
    for stream in (False, True):
        with pytest.raises(InputError, match=f"has {length:,} tokens, {2 * PIECE} of them for 2 pictures.* takes {LIMIT}"):
            pipe.answer([noise(), noise()], "a " * 900, stream=stream)  # type: ignore[call-overload]


def test_an_answer_gets_what_room_there_is(pipe: VilaUPipeline) -> None:
    length = len(pipe.tokenizer.encode(QUESTION))
    for stream in (False, True):
        with pytest.raises(InputError, match=f"has {length} tokens.* can be {LIMIT - length} at most, not 9,000"):
            pipe.answer(None, QUESTION, max_new_tokens=9000, stream=stream)  # type: ignore[call-overload]
    state_lengths: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        new = AnswerState.__init__

        def spy(self: AnswerState, *args: Any) -> None:
            new(self, *args)
            state_lengths.append(self.cache.keys.shape[3])

        patch.setattr(AnswerState, "__init__", spy)
        next(pipe.answer(None, QUESTION, max_new_tokens=LIMIT - length, stream=True))
    assert state_lengths == [LIMIT - 1]


def test_a_question_that_leaves_no_room(pipe: VilaUPipeline) -> None:
    short = len(pipe.tokenizer.encode("a" * 10))
    fills = "a" * (10 + LIMIT - short)
    assert len(pipe.tokenizer.encode(fills)) == LIMIT
    with pytest.raises(InputError, match="has 600 tokens, all that the model takes, and leaves none for an answer"):
        pipe.answer(None, fills)
    assert isinstance(pipe.answer(None, fills[:-1]), str)


def test_an_answer_that_no_memory_holds(pipe: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "total_memory", lambda device: 2**17)
    with pytest.raises(OutOfMemoryError, match=r"an answer of 400 need at least .* GiB, and cpu has .*max_new_tokens"):
        pipe.answer(None, QUESTION, max_new_tokens=400)
    assert isinstance(answered(pipe, None), str)


# Streams.


def test_a_stream_s_pieces_join_to_the_answer(pipe: VilaUPipeline) -> None:
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 3.0, "seed": 4}):
        whole = answered(pipe, noise(), max_new_tokens=60, **options)
        stream = pipe.answer(noise(), QUESTION, max_new_tokens=60, stream=True, **{"seed": 0, **options})
        pieces = list(stream)
        assert "".join(pieces) == whole
        assert len(pieces) > 5 and all(pieces)


def test_a_stream_holds_nothing_of_the_caller_s_between_pieces(own: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[tuple[bool, int]] = []
    own.llama.register_forward_pre_hook(lambda *_: inside.append((torch.is_grad_enabled(), torch.get_num_threads())))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert own.num_threads == 1
        stream = own.answer(noise(), QUESTION, seed=0, stream=True)
        for _ in range(3):
            next(stream)
            assert torch.is_grad_enabled()
            assert torch.get_num_threads() == 2
        stream.close()  # type: ignore[attr-defined]
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        with torch.inference_mode():
            next(own.answer(noise(), QUESTION, seed=0, stream=True))
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {(False, 1)}


def test_streams_and_calls_may_alternate(pipe: VilaUPipeline) -> None:
    questions = ("What?", "Where is it?")
    expected = [answered(pipe, noise(), question, max_new_tokens=30) for question in questions]
    streams = [pipe.answer(noise(), question, max_new_tokens=30, seed=0, stream=True) for question in questions]
    texts = ["", ""]
    for _ in range(40):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
        pipe("a cat", callback_on_step_end=Step.stop)
    assert texts == expected


def test_threads_may_ask_one_pipeline(pipe: VilaUPipeline) -> None:
    questions = ["What?", "Where is it?", "Why?", "Who?"]
    expected = [answered(pipe, noise(), question) for question in questions]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda question: answered(pipe, noise(), question), questions)) == expected


def test_a_stream_is_of_the_pictures_at_the_call(pipe: VilaUPipeline) -> None:
    picture = noise()
    stream = pipe.answer(picture, QUESTION, max_new_tokens=12, seed=0, stream=True)
    picture.paste((0, 0, 0), (0, 0, *picture.size))
    assert "".join(stream) == answered(pipe, noise())


def test_an_interruption_ends_an_answer(pipe: VilaUPipeline) -> None:
    whole = answered(pipe, noise(), max_new_tokens=60)
    text = ""
    for number, piece in enumerate(pipe.answer(noise(), QUESTION, max_new_tokens=60, seed=0, stream=True)):
        text += piece
        if number == 2:
            pipe._interrupt = True
    assert whole.startswith(text) and 0 < len(text) < len(whole)
    assert answered(pipe, noise(), max_new_tokens=60) == whole


@pytest.fixture
def offloading(own: VilaUPipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[VilaUPipeline, list[str]]:
    """One that offloads its Llama to a device that the CPU plays, and where that is: one entry each time it moves."""
    moves: list[str] = []
    monkeypatch.setattr(own.llama, "to", lambda device: moves.append(str(device)))
    own._offloads_from = "the device"  # type: ignore[assignment]
    monkeypatch.setattr(conversation.ConversationPipeline, "device", torch.device("cpu"))
    for part in (own.depth_transformer, own.projector, *own.vision_tower.children()):
        monkeypatch.setattr(part, "to", lambda device: None)
    return own, moves


@pytest.mark.parametrize("how", ["closed", "dropped", "finished", "failed"])
def test_a_stream_that_ends_frees_what_it_held(
    offloading: tuple[VilaUPipeline, list[str]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pipe, moves = offloading
    states: list[weakref.ref[AnswerState]] = []
    make = AnswerState.__init__

    def spy(self: AnswerState, *args: Any) -> None:
        states.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(AnswerState, "__init__", spy)
    stream: Any = pipe.answer(noise(), QUESTION, max_new_tokens=30, seed=0, stream=True)
    assert moves == []
    next(stream)
    assert moves == ["the device"]  # once, not at each piece
    next(stream)
    assert moves == ["the device"]
    assert len(states) == 1 and states[0]() is not None
    if how == "closed":
        stream.close()
    elif how == "dropped":
        del stream
    elif how == "finished":
        list(stream)
    else:
        monkeypatch.setattr(pipe.llama, "forward", None)
        with pytest.raises(TypeError):
            list(stream)
    gc.collect()
    assert moves == ["the device", "cpu"]
    assert not pipe._users
    assert states[0]() is None


def test_a_call_beside_a_stream_does_not_take_its_weights_away(offloading: tuple[VilaUPipeline, list[str]]) -> None:
    pipe, moves = offloading
    stream: Any = pipe.answer(noise(), QUESTION, seed=0, stream=True)
    next(stream)
    pipe("a cat")
    other: Any = pipe.answer(noise(), QUESTION, seed=0, stream=True)
    next(other)
    stream.close()
    assert moves == ["the device"]
    next(other)
    other.close()
    assert moves == ["the device", "cpu"]


def test_a_stream_may_go_from_thread_to_thread(offloading: tuple[VilaUPipeline, list[str]]) -> None:
    """As servers do; a lock that one thread took could not be released by another."""
    pipe, moves = offloading
    stream: Any = pipe.answer(noise(), QUESTION, max_new_tokens=12, seed=0, stream=True)
    pieces: list[str] = []
    for turn in range(14):
        work: Any = (lambda: pipe("a cat")) if turn == 3 else (lambda: pieces.append(next(stream, "")))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert moves == ["the device", "cpu"]
    pipe._offloads_from = None
    assert "".join(pieces) == answered(pipe, noise())


# Pictures and codes.


def test_paths_are_encoded_as_the_pictures_they_name(pipe: VilaUPipeline, tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    expected = pipe.encode(image).codes
    assert torch.equal(pipe.encode(tmp_path / "a.png").codes, expected)
    assert torch.equal(pipe.encode([str(tmp_path / "a.png"), image]).codes, expected.repeat(2, 1, 1, 1))
    assert pipe.reconstruct(str(tmp_path / "a.png")).tobytes() == pipe.reconstruct(image).tobytes()


def test_codes_and_features_are_decoded_to_the_reconstruction(pipe: VilaUPipeline) -> None:
    encoded = pipe.encode(noise())
    expected = pipe.decode(encoded)
    assert torch.equal(pipe.decode(encoded.codes), expected)
    assert torch.equal(pipe.decode(encoded.features), expected)
    drawn = pipe("a cat", seed=0, output_type="latent").images
    assert torch.equal(pipe.decode(drawn), pipe("a cat", seed=0, output_type="pt").images)


@pytest.mark.parametrize("kind", ["a string", "another shape", "beyond", "negative", "empty", "features of another width"])
def test_what_is_neither_codes_nor_features_is_refused(pipe: VilaUPipeline, kind: str) -> None:
    encoded = pipe.encode(noise())
    given: Any = {
        "a string": "a.png",
        "another shape": encoded.codes[:, 1:],
        "beyond": encoded.codes + 10**6,
        "negative": encoded.codes - 10**6,
        "empty": encoded.codes[:0],
        "features of another width": encoded.features[..., 1:],
    }[kind]
    with pytest.raises(InputError, match="decode takes"):
        pipe.decode(given)
