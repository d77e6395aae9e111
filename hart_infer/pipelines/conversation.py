"""What VILA-U does with given pictures: encode and rebuild them, and answer questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..checkpoints.vila_u import Parts
from ..engine.cpu import cpu_threads, threads_for
from ..errors import InputError, OutOfMemoryError
from ..generation.next_token import AnswerSettings, answer, splice_images, token_limit
from ..generation.sampling import GeneratorTokenSampler, GreedySampler, TextRule, TokenSampler
from ..images import tensors
from ..images.preprocess import to_pixel_values
from ..images.reading import read_image
from ..images.video import is_video, read_video
from ..models.vila_u.text import IMAGE, Turn
from .arguments import seeds_for
from .base import Pipeline
from .checks import check_bool, check_float, check_int
from .out_of_memory import out_of_memory_advice, total_memory

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_NEW_TOKENS = 2**20
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclass(frozen=True)
class Frames:
    """A video given as its frames: PIL images, or a path to a file or a folder of pictures."""

    source: str | Path | Sequence[Image]


Media = Any  # a PIL image, a path of a picture or a video, Frames, or a list of these
Question = str | Sequence[Any]  # a text, or texts and media


@dataclass(frozen=True)
class Encoded:
    """What the vision tower makes of pictures."""

    codes: Tensor  # [B, g, g, D] int64
    features: Tensor  # [B, g, g, C]: the sums of the codes' vectors


class ConversationPipeline(Pipeline):
    """A Llama that reads texts and the codes of a vision tower."""

    def __init__(self, parts: Parts, *, name: str = "") -> None:
        super().__init__(name)
        self.llama, self.depth_transformer, self.projector = parts.llama, parts.depth_transformer, parts.projector
        self.vision_tower, self.tokenizer = parts.vision_tower, parts.tokenizer
        self.settings, self.answers, self.defaults = parts.settings, parts.answers, parts.defaults
        self._projector_type = parts.projector_type
        self.num_threads = threads_for(self.llama)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name."""
        return {
            "llama": self.llama,
            "depth_transformer": self.depth_transformer,
            "vision_tower": self.vision_tower,
            "projector": self.projector,
        }

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self._offloads_from or self.llama.device

    @property
    def dtype(self) -> torch.dtype:
        """The Llama's dtype."""
        return self.llama.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the square pictures that the checkpoint was trained for."""
        return (max(self.vision_tower.config.picture_shape),)

    @property
    def num_scales(self) -> int:
        """Rows of a picture, after each of which a callback is called."""
        return self.vision_tower.config.grid

    @property
    def num_positions(self) -> int:
        """Positions of a picture, g * g."""
        return self.vision_tower.config.grid**2

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for module in self.components.values():
            module.to(device=device, dtype=dtype)

    def _cache_bytes(self, length: int) -> int:
        """Return the bytes of one row's keys and values of `length` positions."""
        config = self.llama.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * self.dtype.itemsize

    # Looking.

    def decode(self, encoded: Encoded | Tensor) -> Tensor:
        """Return pictures [N, 3, S, S] fp32 in 0..1 of what `encode` returns, codes [N, g, g, D] or features [N, g, g, C].

        Raises InputError, and OutOfMemoryError.
        """
        given = encoded.features if isinstance(encoded, Encoded) else encoded
        config = self.vision_tower.config
        if not isinstance(given, Tensor) or not given.is_floating_point():
            given = self._embed(given)
        if given.shape[1:] != (config.grid, config.grid, config.hidden_size) or not len(given):
            grid = f"N, {config.grid}, {config.grid}"
            raise InputError(f"decode takes features [{grid}, {config.hidden_size}], not {list(given.shape)}.")
        return self._decode(given)

    @torch.no_grad()
    def _embed(self, codes: Any) -> Tensor:
        """Codes [N, g, g, D] -> features [N, g, g, C]. Raises InputError."""
        config = self.vision_tower.config
        fits = isinstance(codes, Tensor) and codes.ndim == 4 and codes.shape[1:] == config.code_shape and len(codes) > 0
        sizes = enumerate(config.vocab_sizes)
        if not fits or any(int(codes[..., i].min()) < 0 or int(codes[..., i].max()) >= size for i, size in sizes):
            shape = ", ".join(map(str, config.code_shape))
            raise InputError(f"decode takes codes [N, {shape}] below {max(config.vocab_sizes)}, or what encode returns.")
        with self._using(self.vision_tower.quantizer):
            return self.vision_tower.embed(codes.long().to(self.device))

    def encode(self, image: Image | str | Path | Sequence[Image | str | Path] | Tensor) -> Encoded:
        """Return the codes and features of pictures, each by itself.

        `image`: PIL images or paths of pictures, made square as the checkpoint says (`settings.image_aspect_ratio`), or a
        tensor [N, 3, s, s] in 0..1, where s is `vision_tower.config.image_size`. Raises InputError, and OutOfMemoryError.
        """
        return self._encode(self._pixel_values(image))

    def reconstruct(self, image: Image | str | Path | Sequence[Image | str | Path] | Tensor) -> Any:
        """Picture to codes and back.

        One PIL image gives one, several give a list, and a tensor as `encode` takes it gives a tensor [N, 3, S, S] fp32 in
        0..1, where S is the side in `sizes`. Raises InputError, and OutOfMemoryError.
        """
        pixels = self._decode(self.encode(image).features)
        if isinstance(image, Tensor):
            return pixels
        rebuilt = tensors.to_pil(pixels, truncated=True)
        return rebuilt if isinstance(image, Sequence) and not isinstance(image, str) else rebuilt[0]

    def _pixel_values(self, image: Any) -> Tensor:
        """Convert pictures to what the tower takes, [N, 3, s, s] in -1..1. Raises InputError."""
        aspect_ratio: Any = self.settings.image_aspect_ratio
        if isinstance(image, str | Path):
            image = read_image(image)
        elif isinstance(image, Sequence):
            image = [read_image(each) if isinstance(each, str | Path) else each for each in image]
        return to_pixel_values(image, self.vision_tower.config.image_size, aspect_ratio)

    @torch.no_grad()
    def _encode(self, pixel_values: Tensor) -> Encoded:
        """Encode what `_pixel_values` returns, one by one."""
        tower = self.vision_tower
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(tower.encoder, tower.quantizer):
            each = [tower.encode(one.to(self.device, self.dtype)) for one in pixel_values.split(1)]
            codes, features = (torch.cat(part) for part in zip(*each, strict=True))
        return Encoded(codes, features)

    @torch.no_grad()
    def _decode(self, features: Tensor) -> Tensor:
        """Features [N, g, g, C] -> pictures [N, 3, S, S] fp32 in 0..1, one by one."""
        tower = self.vision_tower
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(tower.post_quant_conv, tower.decoder):
            pixels = torch.cat([tower.decode(one) for one in features.to(self.device).split(1)])
        return pixels.add_(1).mul_(0.5).clamp_(0, 1)

    # Answering.

    @overload
    def answer(
        self,
        media: Media,
        question: Question,
        *,
        history: Sequence[tuple[Question, str]] = ...,
        max_new_tokens: int | None = ...,
        do_sample: bool | None = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        generator: torch.Generator | None = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
    ) -> str: ...

    @overload
    def answer(
        self,
        media: Media,
        question: Question,
        *,
        history: Sequence[tuple[Question, str]] = ...,
        max_new_tokens: int | None = ...,
        do_sample: bool | None = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        generator: torch.Generator | None = ...,
        seed: int | None = ...,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def answer(
        self,
        media: Media,
        question: Question,
        *,
        history: Sequence[tuple[Question, str]] = (),
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answer a question about pictures or a video.

        Args:
            media: a PIL image, the path of a picture, of a video or of a folder of frames, `Frames` (a video as a list of PIL
                images), or a list of these; None for nothing. They stand before the question, or the first one of `history`.
            question: a text; or a list of texts and media as they follow each other, where a str is a text and a Path a path.
            history: earlier turns as (question, answer).
            max_new_tokens: most tokens of the answer; None is the checkpoint's limit, and what fits behind the question.
            do_sample: draw tokens, instead of taking the likeliest. This, `temperature`, `top_k` (0: all) and `top_p` (1: all)
                default to the checkpoint's generation_config.json.
            generator, seed: where the draws come from, on the CPU whatever device computes; neither: fresh.
            stream: return an iterator of pieces of text, which appear as they are drawn and joined are the answer. What is
                wrong with the arguments is raised at once. Close it, or let go of it, to end the answer early.

        Raises InputError, which counts the tokens where a question is too long, OutOfMemoryError and WeightsError.
        """
        check_bool(stream, "stream")
        draws = self.answers.do_sample if do_sample is None else check_bool(do_sample, "do_sample")
        rule = TextRule(
            top_k=self.answers.top_k if top_k is None else check_int(top_k, "top_k", 0, self.llama.config.vocab_size),
            top_p=self.answers.top_p if top_p is None else check_float(top_p, "top_p", 0, 1),
        )
        if temperature is None:
            temperature = self.answers.temperature
        temperature = check_float(temperature, "temperature", MIN_TEMPERATURE, MAX_TEMPERATURE)
        if max_new_tokens is not None:
            max_new_tokens = check_int(max_new_tokens, "max_new_tokens", 1, MAX_NEW_TOKENS)
        ids, pictures = self._conversation(media, question, history)
        settings = AnswerSettings(
            max_new_tokens=self._limit(ids, max_new_tokens),
            eos_token_ids=self.answers.eos_token_id,
            temperature=temperature if draws else 1.0,
            rule=rule,
        )
        pixel_values = self._pixel_values(pictures) if pictures else None
        (chosen,), _ = seeds_for(1, seed, generator, self.device)
        sampler: TokenSampler = GeneratorTokenSampler([chosen]) if draws else GreedySampler()
        pieces = self._answer(ids, pixel_values, settings, sampler)
        return pieces if stream else "".join(pieces)

    def _limit(self, ids: Sequence[int], max_new_tokens: int | None) -> int:
        """Return the most tokens of an answer to a conversation.

        Raises InputError where the conversation is too long or leaves too little room, and OutOfMemoryError.
        """
        longest = self.tokenizer.max_length
        length = self.tokenizer.check_length(ids, image_positions=self.num_positions)
        room, wanted = longest - length, max_new_tokens or 1
        if wanted > room:
            raise InputError(
                f"The question has {length:,} tokens, pictures and earlier turns included, and the model takes {longest:,}, "
                f"answer included: max_new_tokens can be {room:,} at most, not {wanted:,}."
                if room
                else f"The question has {length:,} tokens, all that the model takes, and leaves none for an answer. Shorten it."
            )
        new = max_new_tokens or min(token_limit(self.answers.max_new_tokens or None, self.answers.max_length), room)
        needed, total = self._cache_bytes(length + new), total_memory(self.device)
        if needed > total:
            raise OutOfMemoryError(
                f"{length:,} tokens and an answer of {new:,} need at least {needed / 2**30:,.1f} GiB, and {self.device} has "
                f"{total / 2**30:,.1f}. Ask for fewer by max_new_tokens."
            )
        return new

    def _conversation(
        self, media: Media, question: Question, history: Sequence[tuple[Question, str]]
    ) -> tuple[list[int], list[Image]]:
        """Return the ids of a conversation and its pictures in order. Raises InputError."""
        if not isinstance(history, list | tuple):
            raise InputError(f"history must be a list of questions and answers, not {type(history).__name__}.")
        messages, answers = [], []
        for number, turn in enumerate(history):
            if not (isinstance(turn, list | tuple) and len(turn) == 2 and isinstance(turn[1], str)):
                raise InputError(f"history[{number}] must be a tuple of a question and its answer, a text.")
            messages.append(self._message(turn[0], f"history[{number}][0]"))
            answers.append(turn[1])
        messages.append(self._message(question, "question"))
        messages[0][:0] = self._pictures(media)
        if all(isinstance(part, str) and not part.strip() for part in messages[-1]):
            raise InputError("question is empty; ask something.")
        *asked, last = [[part if isinstance(part, str) else IMAGE for part in message] for message in messages]
        turns = [Turn(each, replied) for each, replied in zip(asked, answers, strict=True)]
        pictures = [part for message in messages for part in message if not isinstance(part, str)]
        return self.tokenizer.encode(last, history=turns), pictures

    def _message(self, question: Any, name: str) -> list[str | Image]:
        """Return a question's texts and pictures as they follow each other. Raises InputError."""
        if isinstance(question, str):
            return [question]
        if not isinstance(question, list | tuple):
            raise InputError(f"{name} must be a text, or a list of texts and media, not {type(question).__name__}.")
        if not question:
            raise InputError(f"{name} is an empty list; give a text, or texts and media.")
        parts: list[str | Image] = []
        for part in question:
            parts += [part] if isinstance(part, str) else self._pictures(part)
        return parts

    def _pictures(self, media: Media) -> list[Image]:
        """Return the pictures, and the frames of the videos, of media. Raises InputError."""
        from PIL import Image as Pillow

        frames = self.settings.num_video_frames
        if media is None:
            return []
        if isinstance(media, list | tuple):
            if not media:
                raise InputError("The list of pictures is empty; give at least one, or None.")
            return [image for each in media for image in self._pictures(each)]
        if isinstance(media, Frames):
            if not isinstance(media.source, str | Path | list | tuple):
                raise InputError(f"Frames must have a path or a list of PIL images, not {type(media.source).__name__}.")
            return read_video(media.source, frames)
        if isinstance(media, str | Path):
            return read_video(media, frames) if is_video(media) else [read_image(media)]
        if isinstance(media, Pillow.Image):
            return [media]
        raise InputError(f"media must be PIL images, paths or Frames, not {type(media).__name__}.")

    @torch.no_grad()  # which, on a generator, holds while it runs and not in between
    def _answer(
        self, ids: Sequence[int], pixel_values: Tensor | None, settings: AnswerSettings, sampler: TokenSampler
    ) -> Iterator[str]:
        """Yield an answer's text, piece by piece; `_interrupt` ends it."""
        interrupts, text = self._interrupts, self.tokenizer.stream()
        features = None if pixel_values is None else self._encode(pixel_values).features.flatten(1, 2)  # [n, T, C]
        with self._holding(self.llama, self.projector):
            tokens = self._tokens(ids, features, settings, sampler)
            while self._interrupts == interrupts and (token := self._next(tokens)) is not None:
                if piece := text.push(token):  # of an end token nothing, unless a checkpoint ends on a plain one
                    yield piece
        if piece := text.finish():
            yield piece

    @torch.no_grad()
    def _tokens(
        self, ids: Sequence[int], features: Tensor | None, settings: AnswerSettings, sampler: TokenSampler
    ) -> Iterator[int]:
        """Yield an answer's tokens."""
        images = self.llama.embed_tokens.weight.new_empty(0, 0, 0)
        if features is not None:
            images = self.projector(features.to(self.device, self.dtype))
        yield from answer(self.llama, splice_images(self.llama, ids, images), settings, sampler)

    def _next(self, tokens: Iterator[int]) -> int | None:
        """Return an answer's next token; None after the last."""
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(self.llama, self.projector):
            return next(tokens, None)
