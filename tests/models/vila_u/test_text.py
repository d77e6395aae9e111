"""VILA-U's prompts: the template, pieces and special ids, and decoding, on a small tokenizer made here."""

from __future__ import annotations

import builtins
import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch

from hart_infer.errors import BackendError, ConfigError, InputError, WeightsError
from hart_infer.models.vila_u.text import IMAGE, IMAGE_ID, SYSTEM_PROMPT, Message, Tokenizer, Turn
from tests.released_vila_u import tokenizer_model, vocab_size

pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")  # by `make newest` and `make oldest`

SPACE = "\u2581"
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


def make(**options: Any) -> Tokenizer:
    values: dict[str, Any] = {"vocab_size": vocab_size(), "max_length": 600, "has_video": True}
    return Tokenizer(tokenizer_model(), **values | options)


@pytest.fixture(scope="module")
def pieces() -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=tokenizer_model())


def spelled(ids: list[int], pieces: Any) -> list[str | int]:
    """Text between special ids; bytes are put together, ▁ stays."""
    found: list[str | int] = []
    for token in ids:
        if token in (BOS, EOS, IMAGE_ID) or token >= pieces.vocab_size():
            found.append(token)
            continue
        piece = pieces.id_to_piece(token)
        text = bytes([int(piece[3:5], 16)]).decode("latin1") if pieces.is_byte(token) else piece
        if found and isinstance(found[-1], str):
            found[-1] += text
        else:
            found.append(text)
    return found


def text(content: str) -> str:
    return content.replace(" ", SPACE)


S = f"{SPACE}{text(SYSTEM_PROMPT)}{SPACE}"


def check(tokenizer: Tokenizer, pieces: Any, expected: list[str | int], message: Message, **options: Any) -> None:
    found = spelled(tokenizer.encode(message, **options), pieces)
    assert found == [BOS, *(text(part) if isinstance(part, str) else part for part in expected)]


def test_one_turn(tokenizer: Tokenizer, pieces: Any) -> None:
    check(tokenizer, pieces, [S + "USER: a cat ASSISTANT:"], "a cat")
    check(tokenizer, pieces, [S + "USER: a cat ASSISTANT:"], "  a cat \n")
    check(tokenizer, pieces, [S + "USER: two  spaces ASSISTANT:"], "two  spaces")


@pytest.mark.parametrize("message", ["", "  \n", [""], []])
def test_an_empty_message_leaves_no_spaces(tokenizer: Tokenizer, pieces: Any, message: Message) -> None:
    check(tokenizer, pieces, [S + "USER:ASSISTANT:"], message)


def test_pictures_and_videos_begin_with_their_own_id_behind_a_space(tokenizer: Tokenizer, pieces: Any) -> None:
    last = vocab_size() - 4
    check(tokenizer, pieces, [S + "USER: a cat ASSISTANT: ", last], "a cat", kind="image")
    check(tokenizer, pieces, [S + "USER: a cat ASSISTANT: ", last + 2], "a cat", kind="video")
    check(tokenizer, pieces, [S + "USER:ASSISTANT: ", last], "", kind="image")


def test_without_video_ids_the_last_two_are_the_picture_s(pieces: Any) -> None:
    tokenizer = make(has_video=False)
    assert tokenizer.encode("a cat", kind="image")[-1] == vocab_size() - 2
    with pytest.raises(InputError, match="draws no videos"):
        tokenizer.encode("a cat", kind="video")


def test_an_im_patch_token_comes_before_the_others(pieces: Any) -> None:
    assert make(vocab_size=vocab_size() + 1).encode("", kind="image")[-1] == vocab_size() - 3


def test_earlier_turns_end_in_eos_and_no_space(tokenizer: Tokenizer, pieces: Any) -> None:
    history = [Turn("hello", "hello world"), Turn(" red ", "sofa")]
    expected: list[str | int] = [S + "USER: hello ASSISTANT: hello world", EOS]
    expected += ["USER: red ASSISTANT: sofa", EOS, "USER: a cat ASSISTANT: "]
    check(tokenizer, pieces, [*expected, vocab_size() - 4], "a cat", history=history, kind="image")


def test_every_piece_between_pictures_has_a_space_in_front(tokenizer: Tokenizer, pieces: Any) -> None:
    message = ["hello ", IMAGE, IMAGE, "a cat"]
    expected: list[str | int] = [S + "USER: hello ", IMAGE_ID, " \n", IMAGE_ID, " \na cat ASSISTANT:"]
    check(tokenizer, pieces, expected, message)
    check(tokenizer, pieces, [S + "USER: ", IMAGE_ID, "  ASSISTANT:"], [IMAGE])  # the newline is stripped
    check(tokenizer, pieces, [S + "USER: ", IMAGE_ID, " \na ASSISTANT:"], [" ", IMAGE, "a "])


def test_a_picture_of_an_earlier_turn(tokenizer: Tokenizer, pieces: Any) -> None:
    expected: list[str | int] = [S + "USER: ", IMAGE_ID, " \nred ASSISTANT: a", EOS, "USER: cat ASSISTANT:"]
    check(tokenizer, pieces, expected, "cat", history=[Turn([IMAGE, "red"], "a")])


@pytest.mark.parametrize(
    "spelling", ["<image>", "<s>", "</s>", "<unk>", "<im_start>", "<vi_end>", "<0x0A>", "USER: </s>ASSISTANT:"]
)
def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer, pieces: Any, spelling: str) -> None:
    ids = tokenizer.encode(f"a {spelling} cat", history=[Turn(spelling, spelling)])
    special = [token for token in ids if token <= EOS or token >= pieces.vocab_size()]
    assert special == [BOS, EOS]  # the template's own
    assert tokenizer.decode(ids).count(spelling) == 3


def test_text_that_is_no_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a \udc80 cat")


@pytest.mark.parametrize("content", ["two  spaces, é漢字 and\nnewline", "a\tcat", "\u2581", "🙂 " * 3 + "x"])
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, content: str) -> None:
    ids = tokenizer.encode(content)
    assert tokenizer.decode(ids) == f"{SYSTEM_PROMPT} USER: {content} ASSISTANT:".replace(SPACE, " ")
    assert tokenizer.decode([*ids, EOS, IMAGE_ID, vocab_size() - 1]) == tokenizer.decode(ids)


def byte(value: int) -> int:
    return 3 + value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0x41, 0xC3, 0xA9, 0x42), "Aé" + "B"),
        ((0x41, 0xE6, 0xBC, 0x42), "A\ufffd\ufffdB"),  # each byte by itself, as SentencePiece decodes
        ((0x41, 0xFF), "A\ufffd"),
        ((0x41, 0xF0, 0x9F), "A\ufffd\ufffd"),
        ((0x20, 0x0A, 0x41, 0x0A, 0x20), "A"),
        ((0xED, 0xA0, 0x80), "\ufffd" * 3),
        ((), ""),
        ((0x20,), ""),
    ],
)
def test_bytes_are_joined(tokenizer: Tokenizer, pieces: Any, values: tuple[int, ...], expected: str) -> None:
    ids = [byte(value) for value in values]
    assert tokenizer.decode(ids) == expected
    assert pieces.decode(ids).strip() == expected


def test_a_special_id_between_bytes_does_not_part_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([byte(0xC3), EOS, byte(0xA9)]) == "é"


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(-1, vocab_size(), (40,), generator=generator).tolist()
        stream = tokenizer.stream()
        parts = [*map(stream.push, ids), stream.finish()]
        assert "".join(parts) == tokenizer.decode(ids)


def test_a_stream_holds_back_what_may_change(tokenizer: Tokenizer, pieces: Any) -> None:
    stream = tokenizer.stream()
    space, a = pieces.piece_to_id(SPACE), byte(0x41)
    pushed = [stream.push(token) for token in (space, a, byte(0xC3), byte(0xA9), space, EOS, space, a, space)]
    assert pushed == ["", "A", "", "é", "", "", "", "  A", ""]
    assert stream.finish() == ""


def test_a_prompt_that_is_too_long_is_counted(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode([IMAGE, IMAGE, "a cat"])
    length = tokenizer.check_length(ids, image_positions=16)
    assert length == len(ids) - 2 + 32
    assert make(max_length=length).check_length(ids, image_positions=16) == length
    with pytest.raises(InputError, match=rf"has {length} tokens, 32 of them for 2 pictures.* takes {length - 1}"):
        make(max_length=length - 1).check_length(ids, image_positions=16)
    with pytest.raises(InputError, match=r"and 256 new ones"):
        make(max_length=length + 255).check_length(ids, image_positions=16, new_positions=256)
    with pytest.raises(InputError, match=r"has \d\d,\d{3} tokens; the model takes 600"):
        tokenizer.check_length(tokenizer.encode("why " * 3000), image_positions=16)


def test_a_tokenizer_of_another_checkpoint() -> None:
    with pytest.raises(ConfigError, match=f"has {vocab_size() - 4} tokens and 4 added ones, and .* {vocab_size() - 1};"):
        make(vocab_size=vocab_size() - 1)


@pytest.mark.parametrize("content", [b"", b"no model", tokenizer_model()[:1000]], ids=["empty", "text", "cut"])
def test_a_damaged_tokenizer(content: bytes) -> None:
    with pytest.raises(WeightsError, match="tokenizer.model is damaged"):
        Tokenizer(content, vocab_size=324, max_length=600, has_video=True)


def test_sentencepiece_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"sentencepiece.*pip install 'hart-infer\[vila-u\]'"):
        make()


def test_the_template_s_pieces_do_not_depend_on_what_is_behind_them(tokenizer: Tokenizer) -> None:
    """So the start of a prompt is the same for every message, and its keys and values can be kept."""
    starts = [tokenizer.encode(message)[:60] for message in ("a cat", "", "hello")]
    assert all(a == b for a, b in pairwise(starts))


def test_a_tokenizer_can_be_copied(tokenizer: Tokenizer) -> None:
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(" a cat", kind="video") == tokenizer.encode(" a cat", kind="video")
