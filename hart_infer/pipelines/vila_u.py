"""`VilaUPipeline`: draw pictures and videos, and answer questions about them, with VILA-U."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checkpoints import vila_u as checkpoints
from ..checkpoints.hub import HubOptions
from ..checkpoints.vila_u import Parts, VilaUCheckpoint, find_checkpoint
from ..engine.cpu import cpu_threads
from ..engine.quantize import quantize_weights
from ..errors import InputError
from ..generation.next_token import GenerationState, KeptPrefix, Networks, Prefix, finish, prefill_alone, run_position, start
from ..generation.sampling import CodeRule, TokenSampler, make_token_sampler
from ..images import tensors
from ..models.vila_u.text import Kind
from .arguments import GeneratorArgument, check_device, check_dtype, seeds_for
from .base import INSTEAD
from .checks import MAX_GUIDANCE, check_bool, check_float, check_int, check_output_type, check_prompts, check_size
from .conversation import ConversationPipeline
from .out_of_memory import check_memory, out_of_memory_advice
from .outputs import Callback, ImageOutput, Step, VideoOutput, check_callback
from .quantized import WEIGHT_ONLY, check_quantize, refuse_to_save

Output = Literal["pil", "np", "pt", "latent"]
_DECODES = "pictures are decoded one by one, and are small; to save memory use enable_model_cpu_offload()"
_LORA = "there are no adapters; put changed weights into pipe.llama by load_state_dict"


@dataclass(frozen=True)
class _Request:
    """Checked arguments of drawing."""

    kind: Kind
    prompts: list[list[int]]  # the ids of each
    unconditional: list[int]  # ids
    frames: int  # of a video, 1 of a picture
    rule: CodeRule
    seeds: list[int]
    draw_device: torch.device
    callback: Callback | None
    reproducible: bool | None
    interrupts: int  # that the pipeline had counted when the call began

    @property
    def repeats(self) -> int:
        """Pictures or videos of a prompt."""
        return len(self.seeds) // len(self.prompts)


class VilaUPipeline(ConversationPipeline):
    """Draw, and answer questions about pictures, with VILA-U (arXiv:2409.04429).

    >>> pipe = VilaUPipeline.from_pretrained("mit-han-lab/vila-u-7b-256")
    >>> pipe("a cat", seed=7).images[0].save("cat.png")
    >>> pipe.answer(Image.open("cat.png"), "What is it?")
    """

    _instead = INSTEAD | {
        "vae": "it is pipe.vision_tower",
        "unet": "it is pipe.llama, and pipe.depth_transformer draws the codes",
        "transformer": "it is pipe.llama, and pipe.depth_transformer draws the codes",
        "text_encoder": "there is none; pipe.llama reads the prompt",
        "scheduler": "there is none; a call's arguments say how codes are drawn (guidance_scale, top_k, top_p)",
        "negative_prompt_embeds": "there is none; a call takes negative_prompt",
        "enable_decoder_tiling": _DECODES,
        "enable_vae_tiling": _DECODES,
        "enable_vae_slicing": _DECODES,
        "load_lora_weights": _LORA,
        "fuse_lora": _LORA,
        "set_adapters": _LORA,
    }

    def __init__(self, parts: Parts, *, name: str = "") -> None:
        """Assemble loaded parts; `from_pretrained` is the usual way."""
        super().__init__(parts, name=name)
        self._kept: dict[Kind, KeptPrefix] = {"image": KeptPrefix(), "video": KeptPrefix()}
        self._progress |= {"desc": "rows", "unit": "row"}

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
        quantize: Literal["int8_weight_only"] | None = None,
        strict_config: bool = False,
    ) -> VilaUPipeline:
        """Load a checkpoint from the Hub (owner/name) or a folder, which may hold it in `model/`.

        The released one is "mit-han-lab/vila-u-7b-256". `dtype` (alias `torch_dtype`): None is bf16 on CUDA, else the stored
        one. `device` None: CUDA, else MPS, else the CPU. `quantize`: "int8_weight_only" keeps the Llama's weights in int8,
        which halves their memory and changes what is drawn a little (docs/vila-u.md has the error). `strict_config`: raise
        ConfigError for unknown configuration keys, instead of one warning. `revision`, `cache_dir`, `token`,
        `local_files_only`: passed to huggingface_hub.

        Raises InputError, CheckpointNotFoundError, ConfigError, WeightsError, OutOfMemoryError, and BackendError where
        sentencepiece, the extra `[vila-u]`, is not installed.
        """
        target, dtype = check_device(device), dtype or torch_dtype
        check_dtype(dtype)
        for name, flag in {"local_files_only": local_files_only, "strict_config": strict_config}.items():
            check_bool(flag, name)
        check_quantize(quantize, WEIGHT_ONLY)
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        found = find_checkpoint(repo_or_path, variant=variant, strict_config=strict_config, hub=hub)
        if dtype is None and target.type == "cuda":
            dtype = torch.bfloat16
        with out_of_memory_advice():
            return cls(_load(found, dtype, quantize is not None), name=found.name).to(target)

    def _save(self, path: Path, max_shard_size: str) -> Path:
        refuse_to_save(self.llama)
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
        return checkpoints.save(path, parts, max_shard_size=max_shard_size)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for kept in self._kept.values():
            kept.clear()
        super()._move(device, dtype)

    def _facts(self) -> Mapping[str, str]:
        config = self.vision_tower.config
        frames = self.settings.num_video_frames
        videos = f"videos of {frames} frames" if self.tokenizer.video_start is not None else "no videos"
        codes = f"{config.grid} x {config.grid} positions of {config.depth} codes"
        seen = "" if self.sizes[0] == config.image_size else f", seen at {config.image_size} px"
        return {
            "pictures": f"{self.sizes[0]} px{seen}, {codes}; {videos}",
            "prompts": f"up to {self.tokenizer.max_length:,} tokens",
        }

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
        request = self._request(
            prompt,
            "image",
            rule=self._rule(guidance_scale, top_k, top_p),
            repeats=num_images_per_prompt,
            generator=generator,
            seed=seed,
            negative_prompt=negative_prompt,
            callback=callback_on_step_end,
            reproducible=reproducible,
        )
        features = self._draw(request)  # [N, 1, g, g, C]
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
        output_type: Output = "pil",
        callback_on_step_end: Callable[..., object] | None = None,
        reproducible: bool | None = None,
    ) -> VideoOutput:
        """Draw videos of F = `settings.num_video_frames` frames each; the arguments are those of a call.

        `output_type` is "pil", a list of frames for each video; "np" [N, F, H, W, 3] or "pt" [N, F, 3, H, W], fp32 in 0..1; or
        "latent", the features [N, F, g, g, C]. A video that is stopped ends with the frame that was being drawn.
        Raises what a call raises, and InputError where the checkpoint draws no videos.
        """
        check_output_type(output_type)
        request = self._request(
            prompt,
            "video",
            rule=self._rule(guidance_scale, top_k, top_p),
            repeats=num_images_per_prompt,
            generator=generator,
            seed=seed,
            negative_prompt=negative_prompt,
            callback=callback_on_step_end,
            reproducible=reproducible,
        )
        features = self._draw(request)  # [N, F, g, g, C]
        if output_type == "latent":
            return VideoOutput(features, request.seeds)
        videos = [self._decode(each) for each in features]
        if output_type == "pil":
            return VideoOutput([self._form(video, output_type) for video in videos], request.seeds)
        frames = self._form(torch.cat(videos), output_type)
        return VideoOutput(frames.reshape(len(videos), -1, *frames.shape[1:]), request.seeds)

    def _rule(self, guidance_scale: float | None, top_k: int | None, top_p: float | None) -> CodeRule:
        """Return how codes are drawn: what is given, else the defaults. Raises InputError."""
        defaults = self.defaults
        if guidance_scale is None:
            guidance_scale = defaults.guidance_scale
        return CodeRule(
            top_k=defaults.top_k if top_k is None else check_int(top_k, "top_k", 0, max(self.vision_tower.config.vocab_sizes)),
            top_p=defaults.top_p if top_p is None else check_float(top_p, "top_p", 0, 1),
            guidance_scale=check_float(guidance_scale, "guidance_scale", 0, MAX_GUIDANCE),
        )

    def _request(
        self,
        prompt: str | Sequence[str],
        kind: Kind,
        *,
        rule: CodeRule,
        repeats: int,
        generator: GeneratorArgument,
        seed: int | Sequence[int] | None,
        negative_prompt: str | None,
        callback: Any,
        reproducible: bool | None,
    ) -> _Request:
        """Check the arguments of drawing; encode the prompts. Raises InputError, and OutOfMemoryError."""
        interrupts, prompts = self._interrupts, check_prompts(prompt)
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise InputError(f"negative_prompt must be a string, for all pictures, not {type(negative_prompt).__name__}.")
        count = len(prompts) * check_int(repeats, "num_images_per_prompt", 1)
        if reproducible is not None:
            check_bool(reproducible, "reproducible")
        checked = check_callback(callback, self)
        frames = self.settings.num_video_frames if kind == "video" else 1
        ids = [self._ids(each, kind, frames) for each in prompts]
        unconditional = self._ids(negative_prompt or "", kind, frames)
        rows = 1 if rule.guidance_scale == 1 else 2
        length = max(map(len, [*ids, unconditional])) + frames * self.num_positions
        bytes_each = rows * self._cache_bytes(length) + 12 * frames * self.sizes[0] ** 2
        check_memory(count, bytes_each, self.device, what="videos" if kind == "video" else "pictures")
        seeds, draw_device = seeds_for(count, seed, generator, self.device)
        return _Request(kind, ids, unconditional, frames, rule, seeds, draw_device, checked, reproducible, interrupts)

    def _ids(self, text: str, kind: Kind, frames: int) -> list[int]:
        """Encode a prompt for drawing. Raises InputError if it is too long."""
        ids = self.tokenizer.encode(text, kind=kind)
        new = frames * self.num_positions
        self.tokenizer.check_length(ids, image_positions=self.num_positions, new_positions=new)
        return ids

    @torch.no_grad()
    def _draw(self, request: _Request) -> Tensor:
        """Draw all positions; return the features [N, F, g, g, C] fp32 of N pictures or videos.

        Where it is stopped, they are 0 where nothing is drawn, and frames that were not begun are left out.
        """
        networks = Networks(self.llama, self.depth_transformer, self.projector, self.vision_tower.quantizer.rows)
        states: list[GenerationState] = []
        with (
            out_of_memory_advice(),
            cpu_threads(self.num_threads),
            self._using(self.llama, self.depth_transformer, self.projector, self.vision_tower.quantizer),
        ):
            try:
                prefix = self._prefix(request)
                for ids, sampler in self._shares(request):
                    positions = request.frames * self.num_positions
                    states.append(start(networks, ids, prefix, sampler, request.rule, num_positions=positions))
                self._run(states, request)
                features = torch.cat([finish(state)[1] for state in states])  # [N, P, C]
            finally:  # an error that someone keeps would keep the states alive, by its traceback
                for state in states:
                    state.cache = None
        return self._laid_out(features)

    def _shares(self, request: _Request) -> Iterator[tuple[list[list[int]], TokenSampler]]:
        """Yield the prompts and a sampler of the pictures that are drawn together, in order."""
        size = self._batch_size(request.reproducible, len(request.seeds))
        for first in range(0, len(request.seeds), size):
            seeds = request.seeds[first : first + size]
            owners = Counter(i // request.repeats for i in range(first, first + len(seeds)))  # of each prompt, its pictures
            even = len(set(owners.values())) == 1
            prompts = [request.prompts[i] for i in (owners if even else owners.elements())]
            yield prompts, make_token_sampler(seeds, request.draw_device)

    def _run(self, states: Sequence[GenerationState], request: _Request) -> None:
        """Run all positions, row by row, with progress bar and callback."""
        grid = self.vision_tower.config.grid
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
                if self._interrupts != request.interrupts:
                    break

    def _so_far(self, states: Sequence[GenerationState], frame: int) -> Tensor:
        """Return the features [N, g, g, C] of the frame that is being drawn, 0 where nothing is yet."""
        first = frame * self.num_positions
        return self._laid_out(torch.cat([torch.stack(state.features[first:], dim=1) for state in states]))[:, 0]

    def _laid_out(self, features: Tensor) -> Tensor:
        """Lay out the features of P positions [N, P, C] in frames [N, F, g, g, C], the last filled up with 0."""
        grid, missing = self.vision_tower.config.grid, -features.shape[1] % self.num_positions
        return torch.nn.functional.pad(features, (0, 0, 0, missing)).unflatten(1, (-1, grid, grid))

    def _prefix(self, request: _Request) -> Prefix | None:
        """Return the unconditional prompt's prefix, None without guidance; that of the empty prompt is kept."""
        if request.rule.guidance_scale == 1:
            return None
        ids, kind = request.unconditional, request.kind
        is_empty = ids == self.tokenizer.encode("", kind=kind)
        return self._kept[kind].get(self.llama, ids) if is_empty else prefill_alone(self.llama, ids)

    def _preview(self, features: Tensor) -> Tensor:
        """Decode to pictures whose levels are those that a finished picture would have."""
        return self._decode(features).mul_(255).floor_().div_(255)

    @staticmethod
    def _form(pixels: Tensor, output_type: str) -> Any:
        """Return pictures [N, 3, H, W] in the form asked for; PIL images are truncated, as released."""
        return tensors.to_pil(pixels, truncated=True) if output_type == "pil" else tensors.FORMS[output_type](pixels)


def _load(found: VilaUCheckpoint, dtype: torch.dtype | None, quantized: bool) -> Parts:
    """Load a checkpoint's parts on the CPU, the others in the Llama's dtype. Raises WeightsError."""
    tokenizer, llama = found.load_tokenizer(), found.load_llama(dtype)
    return Parts(
        quantize_weights(llama, keep=("lm_head",)) if quantized else llama,
        found.load_vision_tower(llama.dtype),
        found.load_depth_transformer(llama.dtype),
        found.load_projector(llama.dtype),
        found.projector,
        tokenizer,
        found.settings,
        found.answers,
        found.defaults,
    )
