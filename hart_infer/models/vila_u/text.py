"""Messages to token ids and back: VILA-U's chat template around Llama's SentencePiece model."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, cast

from ...errors import BackendError, ConfigError, InputError, WeightsError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_ID = -200  # stands for a picture's positions
PAD_ID = 0
_SPACE = "\u2581"  # SentencePiece's
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false; appended protobufs are merged
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

Kind = Literal["text", "image", "video"]  # what the model is to go on with


class Placeholder(Enum):
    """What stands in a message for something that isn't text."""

    IMAGE = IMAGE_ID


IMAGE = Placeholder.IMAGE  # a picture, or one frame of a video
Message = str | Sequence[str | Placeholder]
Prompt = list[str | int]  # pieces of text between special ids


@dataclass(frozen=True)
class Turn:
    """A question of an earlier turn and its answer."""

    message: Message
    answer: str


class Tokenizer:
    """A checkpoint's `tokenizer.model` and the special tokens that were added to it.

    Text is never searched for special tokens, so `</s>` or `<image>` in a message is encoded as the characters it consists of.
    """

    def __init__(self, model: bytes, *, vocab_size: int, max_length: int, has_video: bool) -> None:
        """Take the bytes of `tokenizer.model`, the rows of the Llama's embedding, and the most positions of a prompt.

        `has_video`: `<vi_start>` and `<vi_end>` are the last two ids. Raises BackendError if sentencepiece is not installed,
        ConfigError, or WeightsError.
        """
        self.model, self.vocab_size, self.max_length = model, vocab_size, max_length
        self._pieces = _load(model)
        added = 4 if has_video else 2
        if self._pieces.vocab_size() + added > vocab_size:
            raise ConfigError(
                f"The tokenizer has {self._pieces.vocab_size()} tokens and {added} added ones, and the Llama's vocab_size is "
                f"{vocab_size}; both must come from the same checkpoint."
            )
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ConfigError("tokenizer.model has no <s> or no </s>; a Llama's has both.")
        self.image_start = vocab_size - added
        self.video_start = vocab_size - 2 if has_video else None

    def encode(self, message: Message, *, history: Sequence[Turn] = (), kind: Kind = "text") -> list[int]:
        """Return the ids of a prompt that asks for an answer, a picture or a video; IMAGE_ID where a picture belongs.

        Raises InputError for text that is not valid Unicode, and for a video where the checkpoint draws none.
        """
        return [self.bos_id, *self._encode(self._prompt(message, history, kind))]

    def _prompt(self, message: Message, history: Sequence[Turn], kind: Kind) -> Prompt:
        """Fill the template: `S USER: m ASSISTANT: a</s>USER: m ASSISTANT:`."""
        prompt: Prompt = [f"{SYSTEM_PROMPT} "]
        for turn in history:
            _extend(prompt, [*_user(turn.message), "ASSISTANT:"])
            _extend(prompt, [f" {turn.answer}", self.eos_id] if turn.answer else [])
        _extend(prompt, [*_user(message), "ASSISTANT:"])
        if kind != "text":
            start = self.image_start if kind == "image" else self.video_start
            if start is None:
                raise InputError("This checkpoint has no <vi_start> token, so it draws no videos; draw a picture.")
            _extend(prompt, [" ", start])
        return prompt

    def _encode(self, prompt: Prompt) -> Iterator[int]:
        """Yield ids. Text at the start and behind a picture has a space put in front, text behind other special ids has not."""
        prefix = _SPACE
        for piece in prompt:
            if isinstance(piece, str):
                yield from self._encode_text(prefix + piece) if piece else ()
            else:
                yield piece
            prefix = _SPACE if piece == IMAGE_ID else ""

    def _encode_text(self, text: str) -> list[int]:
        try:
            text.encode()  # which SentencePiece asks for in its own way
        except UnicodeEncodeError as error:
            raise InputError(f"The text is not valid Unicode ({error.reason}: {text[error.start]!r}).") from error
        return cast("list[int]", self._pieces.encode(text))

    def check_length(self, ids: Sequence[int], *, image_positions: int, new_positions: int = 0) -> int:
        """Return how many positions a prompt takes, each picture `image_positions` of them.

        Raises InputError where they and `new_positions` are more than the model was trained for.
        """
        images = sum(token == IMAGE_ID for token in ids)
        length = len(ids) + images * (image_positions - 1)
        if length + new_positions > self.max_length:
            pictures = f", {images * image_positions:,} of them for {images} pictures or frames" if images else ""
            more = f" and {new_positions:,} new ones are asked for" if new_positions else ""
            raise InputError(
                f"The prompt has {length:,} tokens{pictures}{more}; the model takes {self.max_length:,}. Shorten it."
            )
        return length

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, stripped; special ids are left out, and bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self) -> TextStream:
        """Return a decoder that takes one id at a time."""
        return TextStream(self._pieces)


class TextStream:
    """Decodes ids one by one; what `push` and `finish` return, joined, is what `Tokenizer.decode` returns."""

    def __init__(self, pieces: SentencePieceProcessor) -> None:
        self._pieces = pieces
        self._bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # each byte that is not UTF-8 by itself
        self._begun = False
        self._spaces = ""  # held back, as the last ones are stripped

    def push(self, token: int) -> str:
        """Take an id; return the text that is certain now."""
        pieces = self._pieces
        if not 0 <= token < pieces.vocab_size() or pieces.is_control(token) or pieces.is_unknown(token):
            return ""
        piece = pieces.id_to_piece(token)
        if pieces.is_byte(token):
            return self._strip(self._bytes.decode(bytes([int(piece[3:5], 16)])))
        return self._strip(self._bytes.decode(b"", final=True) + piece.replace(_SPACE, " "))

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._strip(self._bytes.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        text = self._spaces + _ESCAPED_BYTE.sub("\ufffd", text)
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._begun = self._begun or bool(kept)
        self._spaces = text[len(kept) :]
        return kept


def _user(message: Message) -> Prompt:
    """Return a user's turn, `USER: m ` with m stripped, or `USER:` if nothing is left of m."""
    text: Prompt = [""]
    for part in [message] if isinstance(message, str) else message:
        _extend(text, [IMAGE_ID, "\n"] if isinstance(part, Placeholder) else [part])
    text[0] = cast(str, text[0]).lstrip()
    text[-1] = cast(str, text[-1]).rstrip()
    return ["USER: ", *text, " "] if text != [""] else ["USER:"]


def _extend(prompt: Prompt, pieces: Iterable[str | int]) -> None:
    """Append pieces; text behind text becomes one piece."""
    for piece in pieces:
        if isinstance(piece, str) and isinstance(prompt[-1], str):
            prompt[-1] += piece
        else:
            prompt.append(piece)


def _load(model: bytes) -> SentencePieceProcessor:
    """Load a SentencePiece model, so that it puts no space in front by itself. Raises BackendError or WeightsError."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise BackendError(
            "VILA-U's tokenizer needs the package sentencepiece, which is not installed: pip install 'hart-infer[vila-u]'."
        ) from error
    try:
        return SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
    except (RuntimeError, ValueError, TypeError) as error:
        raise WeightsError(f"tokenizer.model is damaged or not a SentencePiece model ({error}); copy it again.") from error
