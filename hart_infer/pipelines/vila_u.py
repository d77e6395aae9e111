"""`VilaUPipeline`: draw pictures and videos, and answer questions about them, with VILA-U."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..checkpoints import vila_u as checkpoints
from ..checkpoints.hub import HubOptions
from ..checkpoints.vila_u import Parts, VilaUCheckpoint, find_checkpoint
from ..engine.cpu import cpu_threads, threads_for
from ..errors import InputError
from ..generation.next_token import (
    AnswerSettings,
    GenerationState,
    KeptPrefix,
    Networks,
    Prefix,
    answer,
    finish,
    prefill_alone,
    run_position,
    splice_images,
    start,
    token_limit,
)
from ..generation.sampling import (
    CodeRule,
    GeneratorTokenSampler,
    GreedySampler,
    TextRule,
    TokenSampler,
    make_token_sampler,
)
from ..images import tensors
from ..images.preprocess import to_pixel_values
from ..images.reading import read_image
from ..images.video import is_video, read_video
from ..models.vila_u.text import IMAGE, Kind, Placeholder, Turn
from .arguments import GeneratorArgument, check_device, check_dtype, seeds_for
from .base import Pipeline
from .checks import MAX_GUIDANCE, check_bool, check_float, check_int, check_output_type, check_prompts, check_size
from .out_of_memory import check_memory, out_of_memory_advice
from .outputs import Callback, ImageOutput, Step, VideoOutput, check_callback

if TYPE_CHECKING:
    from PIL.Image import Image

Output = Literal["pil", "np", "pt", "latent"]
MAX_NEW_TOKENS = 2**20


@dataclass(frozen=True)
class Frames:
    """A video given as its frames: PIL images, or a path to a file or a folder of pictures."""

    source: str | Path | Sequence[Image]


Media = Any  # a PIL image, a path of a picture or a video, Frames, or a list of these


@dataclass(frozen=True)
class Encoded:
    """What the vision tower makes of pictures."""

    codes: Tensor  # [B, g, g, D] int64
    features: Tensor  # [B, g, g, C]: the sums of the codes' vectors


class VilaUPipeline(Pipeline):
    """Draw, and answer questions about pictures, with VILA-U (arXiv:2409.04429).

    >>> pipe = VilaUPipeline.from_pretrained("mit-han-lab/vila-u-7b-256")
    >>> pipe("a cat", seed=7).images[0].save("cat.png")
    >>> pipe.answer(Image.open("cat.png"), "What is it?")
    """

    def __init__(self, parts: Parts, *, name: str = "") -> None:
        """Assemble loaded parts; `from_pretrained` is the usual way."""
        super().__init__(name)
        self.llama, self.depth_transformer, self.projector = parts.llama, parts.depth_transformer, parts.projector
        self.vision_tower, self.tokenizer = parts.vision_tower, parts.tokenizer
        self.settings, self.answers, self.defaults = parts.settings, parts.answers, parts.defaults
        self._projector_type = parts.projector_type
        self._kept: dict[Kind, KeptPrefix] = {"image": KeptPrefix(), "video": KeptPrefix()}
        self._progress["unit"] = "row"
        self.num_threads = threads_for(self.llama)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        strict_config: bool = False,
    ) -> VilaUPipeline:
        """Load a checkpoint from the Hub (owner/name) or a folder, which may hold it in `model/`.

        The released one is "mit-han-lab/vila-u-7b-256". `dtype` (alias `torch_dtype`): None is bf16 on CUDA, else the stored
        one. `device` None: CUDA, else MPS, else the CPU. `strict_config`: raise ConfigError for unknown configuration keys,
        instead of one warning. `revision`, `cache_dir`, `token`, `local_files_only`: passed to huggingface_hub.

        Raises InputError, CheckpointNotFoundError, ConfigError, WeightsError, OutOfMemoryError, and BackendError where
        sentencepiece, the extra `[vila-u]`, is not installed.
        """
        target, dtype = check_device(device), dtype or torch_dtype
        check_dtype(dtype)
        for name, flag in {"local_files_only": local_files_only, "strict_config": strict_config}.items():
            check_bool(flag, name)
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        found = find_checkpoint(repo_or_path, variant=variant, strict_config=strict_config, hub=hub)
        if dtype is None and target.type == "cuda":
            dtype = torch.bfloat16
        with out_of_memory_advice():
            return cls(_load(found, dtype), name=found.name).to(target)

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
    def num_positions(self) -> int:
        """Positions of a picture, g * g."""
        return self.vision_tower.config.grid**2

    def save_pretrained(self, path: str | Path, *, max_shard_size: str = "5GB", safe_serialization: bool = True) -> Path:
        """Write one clean folder in the current dtype, from which `from_pretrained` gives an identical pipeline.

        The folder appears whole or not at all. Raises OutputError, or InputError for a bad `max_shard_size` and for
        `safe_serialization=False`: pickles are read, never written.
        """
        if not check_bool(safe_serialization, "safe_serialization"):
            raise InputError("safe_serialization must be True: weights are written as safetensors, never as pickles.")
        parts = Parts(
            self.llama,
            self.vision_tower,
            self.depth_transformer,
            self.projector,
            self._projector_type,
            self.tokenizer,
            self.settings,
            self.answers,
            self.defaults,
        )
        return checkpoints.save(Path(path), parts, max_shard_size=max_shard_size)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for kept in self._kept.values():
            kept.clear()
        for module in self.components.values():
            module.to(device=device, dtype=dtype)

    def _facts(self) -> Mapping[str, str]:
        config = self.vision_tower.config
        frames = self.settings.num_video_frames
        videos = f"videos of {frames} frames" if self.tokenizer.video_start is not None else "no videos"
        codes = f"{config.grid} x {config.grid} positions of {config.depth} codes"
        return {"pictures": f"{self.sizes[0]} px, {codes}; {videos}", "prompts": f"up to {self.tokenizer.max_length:,} tokens"}

    # Drawing.

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        negative_prompt: str | None = ...,
        output_type: Output = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[True] = ...,
    ) -> ImageOutput: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        negative_prompt: str | None = ...,
        output_type: Output = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[False],
    ) -> tuple[Any]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: GeneratorArgument = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        output_type: Output = "pil",
        callback_on_step_end: Callable[..., object] | None = None,
        reproducible: bool | None = None,
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: one or many texts. What spells a special token, such as `<image>`, is plain text.
            size: side in pixels, one of `sizes`. `height` and `width` are aliases: pictures are square.
            num_images_per_prompt: pictures per prompt, each with its own seed.
            guidance_scale: s in u + s (c - u), of the unconditional and conditional logits: 1 is no guidance and half the work,
                0 the unconditional half alone; None is the checkpoint's default (released: 3.0).
            top_k: codes kept before drawing, 0 keeps all; None is the default (released: 900).
            top_p: nucleus of probability kept after top-k, 0 turns it off; None is the default (released: 0.96).
            generator: a torch.Generator, or one per picture: seeds are drawn from it, and noise on its device. Not with `seed`.
            seed: picture i gets seed + i; or a list, one per picture; None for fresh ones. The result's `seeds` has them.
            negative_prompt: replaces the empty unconditional prompt of all pictures.
            output_type: "pil", whose levels are truncated as released; "np" [N, H, W, 3] or "pt" [N, 3, H, W], fp32 in 0..1; or
                "latent", the features [N, g, g, C].
            callback_on_step_end: called after each row of positions, as callback(step) with a `Step`, or in diffusers' form.
            reproducible: True runs each picture alone through the networks, so that its bits don't depend on the batch; False
                runs all together, which is faster and rounds differently. None is True on a CPU, else False.
            return_dict: False returns `(images,)`.

        Raises InputError for a bad argument, OutOfMemoryError where the device has too little memory, and WeightsError where
        the weights give logits that are not finite.
        """
        check_output_type(output_type)
        check_bool(return_dict, "return_dict")
        for name, side in {"size": size, "height": height, "width": width}.items():
            check_size(side, self.sizes, name)
        request = self._request(prompt, "image", num_images_per_prompt, seed, generator, callback_on_step_end, reproducible)
        rule = self._rule(guidance_scale, top_k, top_p)
        features = self._draw(request, rule, negative_prompt)  # [N, 1, g, g, C]
        images = features[:, 0] if output_type == "latent" else self._form(self._decode(features[:, 0]), output_type)
        return ImageOutput(images, request.seeds) if return_dict else (images,)

    def video(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: GeneratorArgument = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | None = None,
        callback_on_step_end: Callable[..., object] | None = None,
        reproducible: bool | None = None,
    ) -> VideoOutput:
        """Draw videos of `settings.num_video_frames` frames each; the arguments are those of a call.

        Raises what a call raises, and InputError where the checkpoint draws no videos.
        """
        request = self._request(prompt, "video", num_images_per_prompt, seed, generator, callback_on_step_end, reproducible)
        features = self._draw(request, self._rule(guidance_scale, top_k, top_p), negative_prompt)  # [N, F, g, g, C]
        frames = [tensors.to_pil(self._decode(each), truncated=True) for each in features]
        return VideoOutput(frames, request.seeds)

    def _rule(self, guidance_scale: float | None, top_k: int | None, top_p: float | None) -> CodeRule:
        """Return how codes are drawn: what is given, else the defaults. Raises InputError."""
        defaults = self.defaults
        return CodeRule(
            top_k=defaults.top_k if top_k is None else check_int(top_k, "top_k", 0, max(self.vision_tower.config.vocab_sizes)),
            top_p=defaults.top_p if top_p is None else check_float(top_p, "top_p", 0, 1),
            guidance_scale=defaults.guidance_scale
            if guidance_scale is None
            else check_float(guidance_scale, "guidance_scale", 0, MAX_GUIDANCE),
        )

    def _request(
        self,
        prompt: str | Sequence[str],
        kind: Kind,
        repeats: int,
        seed: int | Sequence[int] | None,
        generator: GeneratorArgument,
        callback: Any,
        reproducible: bool | None,
    ) -> _Request:
        """Check the arguments of drawing; encode the prompts. Raises InputError."""
        prompts = check_prompts(prompt)
        repeats = check_int(repeats, "num_images_per_prompt", 1)
        if reproducible is not None:
            check_bool(reproducible, "reproducible")
        frames = self.settings.num_video_frames if kind == "video" else 1
        ids = [self._ids(each, kind, frames) for each in prompts]
        seeds, draw_device = seeds_for(len(prompts) * repeats, seed, generator, self.device)
        return _Request(kind, ids, frames, seeds, draw_device, check_callback(callback, self), reproducible)

    def _ids(self, text: str, kind: Kind, frames: int) -> list[int]:
        """Encode a prompt for drawing. Raises InputError if it is too long."""
        ids = self.tokenizer.encode(text, kind=kind)
        new = frames * self.num_positions
        self.tokenizer.check_length(ids, image_positions=self.num_positions, new_positions=new)
        return ids

    @torch.no_grad()
    def _draw(self, request: _Request, rule: CodeRule, negative_prompt: str | None) -> Tensor:
        """Draw all positions; return the features [N, F, g, g, C] of N pictures or videos of F frames."""
        unconditional = [] if rule.guidance_scale == 1 else self._ids(negative_prompt or "", request.kind, request.frames)
        positions, count = request.frames * self.num_positions, len(request.seeds)
        length = max(map(len, [*request.ids, unconditional])) + positions
        check_memory(count, (2 if unconditional else 1) * self._cache_bytes(length) + 12 * self.sizes[0] ** 2, self.device)
        networks = (self.llama, self.depth_transformer, self.projector, self.vision_tower.quantizer)
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(*networks):
            batch_size = self._batch_size(request.reproducible, count)
            prefix = self._prefix(request.kind, unconditional) if unconditional else None
            states = [
                start(each, ids, prefix, sampler, rule, num_positions=positions)
                for each, ids, sampler in self._shares(request, batch_size)
            ]
            self._run(states, request)
            done = [finish(state)[1] for state in states]
        features = torch.cat(done)  # [N, P, C], fewer positions if it was stopped
        whole = features.new_zeros(len(features), positions, features.shape[-1])
        whole[:, : features.shape[1]] = features
        grid = self.vision_tower.config.grid
        return whole.unflatten(1, (request.frames, grid, grid))

    def _shares(self, request: _Request, batch_size: int) -> Iterator[tuple[Networks, list[list[int]], TokenSampler]]:
        """Yield prompts and a sampler for each share of `batch_size` pictures, in order."""
        networks = Networks(self.llama, self.depth_transformer, self.projector, self.vision_tower.quantizer.rows)
        repeats = len(request.seeds) // len(request.ids)
        for first in range(0, len(request.seeds), batch_size):
            seeds = request.seeds[first : first + batch_size]
            owners = range(first // repeats, (first + len(seeds) - 1) // repeats + 1)
            yield networks, [request.ids[i] for i in owners], make_token_sampler(seeds, request.draw_device)

    def _run(self, states: Sequence[GenerationState], request: _Request) -> None:
        """Run all positions, row by row, with progress bar and callback."""
        interrupts, grid = self._interrupts, self.vision_tower.config.grid
        rows = request.frames * grid
        with self.progress_bar(range(rows), total=rows) as bar:
            for row in bar:
                for _ in range(grid):
                    for state in states:
                        run_position(state)
                if request.callback is not None:
                    step = Step(row, grid, rows, self._so_far(states, row // grid), self._preview)
                    request.callback(step)
                    if step.stopped:
                        break
                if self._interrupts != interrupts:
                    break

    def _so_far(self, states: Sequence[GenerationState], frame: int) -> Tensor:
        """Return the features [N, g, g, C] of the frame that is being drawn, 0 where nothing is yet."""
        first, grid = frame * self.num_positions, self.vision_tower.config.grid
        drawn = torch.cat([torch.stack(state.features[first:], dim=1) for state in states])
        whole = drawn.new_zeros(len(drawn), self.num_positions, drawn.shape[-1])
        whole[:, : drawn.shape[1]] = drawn
        return whole.unflatten(1, (grid, grid))

    def _prefix(self, kind: Kind, ids: Sequence[int]) -> Prefix:
        """Return the unconditional prompt's prefix; that of the empty prompt is kept."""
        if list(ids) == self.tokenizer.encode("", kind=kind):
            return self._kept[kind].get(self.llama, ids)
        return prefill_alone(self.llama, ids)

    def _cache_bytes(self, length: int) -> int:
        """Return the bytes of one row's keys and values of `length` positions."""
        config = self.llama.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * self.dtype.itemsize

    @torch.no_grad()
    def _decode(self, features: Tensor) -> Tensor:
        """Features [N, g, g, C] -> pictures [N, 3, H, W] fp32 in 0..1, one by one."""
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(self.vision_tower):
            pixels = torch.cat([self.vision_tower.decode(one) for one in features.to(self.device).split(1)])
        return pixels.add_(1).mul_(0.5).clamp_(0, 1)

    def _preview(self, features: Tensor) -> Tensor:
        """Decode to pictures whose levels are those that a finished picture would have."""
        return self._decode(features).mul_(255).floor_().div_(255)

    @staticmethod
    def _form(pixels: Tensor, output_type: str) -> Any:
        """Return pictures [N, 3, H, W] in the form asked for; PIL images are truncated, as released."""
        return tensors.to_pil(pixels, truncated=True) if output_type == "pil" else tensors.FORMS[output_type](pixels)

    # Looking.

    @torch.no_grad()
    def encode(self, image: Image | Sequence[Image] | Tensor) -> Encoded:
        """Return the codes and features of pictures: PIL images, made square as the checkpoint says, or a tensor in 0..1.

        Raises InputError.
        """
        size = self.vision_tower.config.image_size
        pixels = to_pixel_values(image, size, self.settings.image_aspect_ratio)  # type: ignore[arg-type]
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(self.vision_tower):
            each = [self.vision_tower.encode(one.to(self.device, self.dtype)) for one in pixels.split(1)]
        codes, features = (torch.cat(part) for part in zip(*each, strict=True))
        return Encoded(codes, features)

    def reconstruct(self, image: Image | Sequence[Image] | Tensor) -> Any:
        """Picture to codes and back; PIL images give PIL images, a tensor [N, 3, s, s] in 0..1 a tensor. Raises InputError."""
        pixels = self._decode(self.encode(image).features)
        if isinstance(image, Tensor):
            return pixels
        rebuilt = tensors.to_pil(pixels, truncated=True)
        return rebuilt if isinstance(image, Sequence) else rebuilt[0]

    @overload
    def answer(
        self,
        media: Media,
        question: str | Sequence[Any],
        *,
        history: Sequence[tuple[str, str]] = ...,
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
        question: str | Sequence[Any],
        *,
        history: Sequence[tuple[str, str]] = ...,
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
        question: str | Sequence[Any],
        *,
        history: Sequence[tuple[str, str]] = (),
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
                images), or a list of these; None for a question about nothing that is seen. They stand before the question, or
                before the first one of `history`.
            question: a text; or a list of texts and media, with media None, where they shall stand in between.
            history: earlier turns as (question, answer).
            max_new_tokens: most tokens of the answer; None as the checkpoint says (Llama-2's: up to 4,095).
            do_sample: draw tokens, instead of taking the likeliest. This, `temperature`, `top_k` (0: all) and `top_p` (1: all)
                default to the checkpoint's generation_config.json.
            generator, seed: where the draws come from; neither: fresh.
            stream: return an iterator of pieces of text, which appear as they are drawn.

        Raises InputError, which counts the tokens where a question is too long, OutOfMemoryError and WeightsError.
        """
        check_bool(stream, "stream")
        defaults = self.answers
        draws = defaults.do_sample if do_sample is None else check_bool(do_sample, "do_sample")
        limit = token_limit(defaults.max_new_tokens or None, defaults.max_length)
        settings = AnswerSettings(
            max_new_tokens=limit if max_new_tokens is None else check_int(max_new_tokens, "max_new_tokens", 1, MAX_NEW_TOKENS),
            eos_token_ids=defaults.eos_token_id,
            temperature=(defaults.temperature if temperature is None else check_float(temperature, "temperature", 1e-6, 1e6))
            if draws
            else 1.0,
            rule=TextRule(
                top_k=defaults.top_k if top_k is None else check_int(top_k, "top_k", 0, self.llama.config.vocab_size),
                top_p=defaults.top_p if top_p is None else check_float(top_p, "top_p", 0, 1),
            ),
        )
        (chosen,), _ = seeds_for(1, seed, generator, torch.device("cpu"))
        ids, pictures = self._question(media, question, history)
        length = self.tokenizer.check_length(ids, image_positions=self.num_positions)
        if max_new_tokens is None:  # what fits behind the question
            room = max(1, self.tokenizer.max_length - length)
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        check_memory(1, self._cache_bytes(length + settings.max_new_tokens), self.device)
        sampler: TokenSampler = GeneratorTokenSampler([chosen]) if draws else GreedySampler()
        pieces = self._answer(ids, pictures, settings, sampler)
        return pieces if stream else "".join(pieces)

    def _question(
        self, media: Media, question: str | Sequence[Any], history: Sequence[tuple[str, str]]
    ) -> tuple[list[int], list[Image]]:
        """Return the ids of a conversation and its pictures in order. Raises InputError."""
        shown, pictures = self._placed(media)
        if isinstance(question, str):
            last: list[str | Placeholder] = [question]
        elif media is not None:
            raise InputError("Give media as an argument or within the question, not both.")
        elif isinstance(question, Sequence) and len(question):
            last = []
            for part in question:
                more, its = ([part], []) if isinstance(part, str) else self._placed(part)
                last, pictures = last + more, pictures + its
        else:
            raise InputError(f"question must be a text, or a list of texts and media, not {type(question).__name__}.")
        turns = []
        for number, turn in enumerate(history):
            if not (isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(each, str) for each in turn)):
                raise InputError(f"history[{number}] must be a pair of texts, a question and its answer.")
            turns.append(Turn([*shown, turn[0]] if number == 0 else turn[0], turn[1]))
        return self.tokenizer.encode(last if turns else [*shown, *last], history=turns), pictures

    def _placed(self, media: Media) -> tuple[list[str | Placeholder], list[Image]]:
        """Return a placeholder for each picture or frame, and these. Raises InputError."""
        if media is None:
            return [], []
        if isinstance(media, list | tuple):
            if not media:
                raise InputError("The list of pictures is empty; give at least one, or None.")
            parts = [self._placed(each) for each in media]
            return [mark for marks, _ in parts for mark in marks], [image for _, images in parts for image in images]
        images = self._pictures(media)
        return [IMAGE] * len(images), images

    def _pictures(self, media: Media) -> list[Image]:
        """Return one picture, or a video's frames. Raises InputError."""
        from PIL import Image as Pillow

        if isinstance(media, Frames):
            return read_video(media.source, self.settings.num_video_frames)
        if isinstance(media, str | Path):
            return read_video(media, self.settings.num_video_frames) if is_video(media) else [read_image(media)]
        if isinstance(media, Pillow.Image):
            return [media]
        raise InputError(f"media must be PIL images, paths or Frames, not {type(media).__name__}.")

    @torch.no_grad()  # which, on a generator, holds while it runs and not in between
    def _answer(
        self, ids: Sequence[int], pictures: Sequence[Image], settings: AnswerSettings, sampler: TokenSampler
    ) -> Iterator[str]:
        """Yield an answer's text, piece by piece."""
        features = self.encode(pictures).features.flatten(1, 2) if pictures else None  # [n, T, C]
        text = self.tokenizer.stream()
        with self._using(self.llama, self.projector):
            images = self.llama.embed_tokens.weight.new_empty(0, 0, 0)
            with out_of_memory_advice(), cpu_threads(self.num_threads):
                if features is not None:
                    images = self.projector(features.to(self.device, self.dtype))
                tokens = answer(self.llama, splice_images(self.llama, ids, images), settings, sampler)
            while (token := self._next(tokens)) is not None:
                if piece := text.push(token):  # of an end token nothing, unless a checkpoint ends on a plain one
                    yield piece
        if piece := text.finish():
            yield piece

    def _next(self, tokens: Iterator[int]) -> int | None:
        """Return an answer's next token; None after the last."""
        with out_of_memory_advice(), cpu_threads(self.num_threads):
            return next(tokens, None)


@dataclass(frozen=True)
class _Request:
    """Checked arguments of drawing."""

    kind: Kind
    ids: list[list[int]]  # of each prompt
    frames: int
    seeds: list[int]
    draw_device: torch.device
    callback: Callback | None
    reproducible: bool | None


def _load(found: VilaUCheckpoint, dtype: torch.dtype | None) -> Parts:
    """Load a checkpoint's parts on the CPU, the others in the Llama's dtype. Raises WeightsError."""
    tokenizer, llama = found.load_tokenizer(), found.load_llama(dtype)
    return Parts(
        llama,
        found.load_vision_tower(llama.dtype),
        found.load_depth_transformer(llama.dtype),
        found.load_projector(llama.dtype),
        found.projector,
        tokenizer,
        found.settings,
        found.answers,
        found.defaults,
    )
