"""`HartPipeline`: check a call's arguments, run the model, return images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checkpoints import hart as checkpoints
from ..checkpoints.hart import Defaults, find_checkpoint
from ..checkpoints.hub import HubOptions
from ..checkpoints.layouts import BUNDLED_MODEL
from ..checkpoints.text_encoder import load_text_encoder
from ..engine.cpu import cpu_threads
from ..engine.quantize import Quantize
from ..errors import InputError
from ..generation.fast import apply
from ..generation.schedule import Schedule, Settings, hart_schedule
from ..generation.speed import Prune, SpeedName
from ..models.hart import HartTransformer
from ..models.next_scale import Condition
from ..models.parts.autoencoder import Autoencoder
from ..models.text import PromptEmbeds, TextEncoder
from .arguments import GeneratorArgument, check_device, check_dtype, check_settings, seeds_for
from .checks import check_bool, check_int, check_prompts
from .edit import PictureEdit
from .next_scale import NextScalePipeline
from .out_of_memory import out_of_memory_advice
from .outputs import ImageOutput
from .quantized import check_quantize, quantize_blocks, refuse_to_save


@dataclass(frozen=True)
class TextOptions:
    """A call's arguments that control how prompts are encoded."""

    use_system_prompt: bool
    max_sequence_length: int | None
    reproducible: bool | None


class HartPipeline(NextScalePipeline[HartTransformer]):
    """Text to image with HART (Hybrid Autoregressive Transformer, arXiv:2410.10812).

    >>> pipe = HartPipeline.from_pretrained("mit-han-lab/hart-0.7b-1024px", dtype=torch.bfloat16)
    >>> pipe("a cat", seed=7).images[0].save("cat.png")
    """

    def __init__(
        self,
        transformer: HartTransformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder | None = None,
        *,
        name: str = "",
        defaults: Defaults | None = None,
    ) -> None:
        """Assemble loaded parts; `from_pretrained` is the usual way. Without a text encoder calls need `prompt_embeds`."""
        super().__init__(transformer, autoencoder, name=name)
        self.text_encoder = text_encoder
        self.defaults: Defaults = defaults or Defaults()

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path = BUNDLED_MODEL,
        *,
        text_encoder: str | Path | Literal[False] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        use_ema: bool = True,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        strict_config: bool = False,
        quantize: Quantize | None = None,
    ) -> HartPipeline:
        """Load a checkpoint from the Hub (owner/name) or a folder (the checkpoint's, or its `llm/`).

        "hart-mini", the default, is the small model that comes with this package; the released one is
        "mit-han-lab/hart-0.7b-1024px", a download.

        `text_encoder`: id or folder; None takes the one beside the checkpoint, else the released one; False loads none.
        `use_ema`: the EMA weights, as the released scripts do, where the checkpoint has them. `dtype` (alias `torch_dtype`):
        None keeps the stored one; the quantizer stays fp32. `device` None: CUDA, else MPS, else the CPU. `variant` "fp16" reads
        `model.fp16.safetensors`. `strict_config`: raise ConfigError for unknown configuration keys, instead of one warning.
        `revision`, `cache_dir`, `token`, `local_files_only`: passed to huggingface_hub.
        `quantize`: "int8" runs the blocks' linear maps in int8, "int8_weight_only" stores their weights so; both are
        approximate (docs/cpu.md has what they save and cost), and such a pipeline can't be saved.

        Raises InputError, CheckpointNotFoundError, ConfigError, WeightsError, OutOfMemoryError.
        """
        check_quantize(quantize)
        target, dtype = check_device(device), dtype or torch_dtype
        check_dtype(dtype)
        for name, flag in {"use_ema": use_ema, "local_files_only": local_files_only, "strict_config": strict_config}.items():
            check_bool(flag, name)
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        checkpoint = find_checkpoint(
            repo_or_path,
            use_ema=use_ema,
            variant=variant,
            with_text_encoder=text_encoder is None,
            strict_config=strict_config,
            hub=hub,
        )
        folder = None if text_encoder is False else checkpoint.locate_text_encoder(text_encoder, replace(hub, revision=None))
        with out_of_memory_advice():
            transformer = checkpoint.load_transformer(dtype)
            quantize_blocks(transformer, quantize)
            autoencoder = checkpoint.load_autoencoder(transformer.dtype)
            width = checkpoint.transformer.context_dim
            options: dict[str, Any] = {"dtype": transformer.dtype, "device": target, "width": width, "strict": strict_config}
            encoder = load_text_encoder(folder, **options) if folder else None
            return cls(transformer, autoencoder, encoder, name=checkpoint.name, defaults=checkpoint.defaults).to(target)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; None for a text encoder that was not loaded."""
        return {"transformer": self.transformer, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}

    def _save(self, path: Path, max_shard_size: str) -> Path:
        refuse_to_save(self.transformer)
        parts = (self.transformer, self.autoencoder, self.text_encoder)
        return checkpoints.save(path, *parts, self.defaults, max_shard_size=max_shard_size)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super()._move(device, dtype)
        if self.text_encoder is not None:
            self.text_encoder.to(device, dtype)

    def _facts(self) -> Mapping[str, str]:
        sides = " ".join(map(str, self.transformer.config.patch_nums))
        return {"sizes": f"{', '.join(map(str, self.sizes))} px; scales: {sides}", **self._speeds()}

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        *,
        use_system_prompt: bool | None = None,
        max_sequence_length: int | None = None,
        reproducible: bool | None = None,
    ) -> PromptEmbeds:
        """Encode prompts for reuse as `prompt_embeds`; the arguments are those of a call."""
        prompts = check_prompts(prompt)
        with out_of_memory_advice(), cpu_threads(self.num_threads):
            return self._encode(prompts, self._text_options(use_system_prompt, max_sequence_length, reproducible))

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = ...,
        *,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        num_inference_steps: int | None = ...,
        residual_temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        more_smooth: bool = ...,
        speed: SpeedName = ...,
        guidance_stops_at: int | None = ...,
        late_temperature: float | None = ...,
        prune: Prune | Mapping[str, Any] | None = ...,
        stop_after: int | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        prompt_embeds: PromptEmbeds | Tensor | None = ...,
        negative_prompt_embeds: PromptEmbeds | Tensor | None = ...,
        output_type: Literal["pil", "np", "pt", "latent"] = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        edit: PictureEdit | None = ...,
        max_sequence_length: int | None = ...,
        use_system_prompt: bool | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[True] = ...,
    ) -> ImageOutput: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = ...,
        *,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        num_inference_steps: int | None = ...,
        residual_temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        more_smooth: bool = ...,
        speed: SpeedName = ...,
        guidance_stops_at: int | None = ...,
        late_temperature: float | None = ...,
        prune: Prune | Mapping[str, Any] | None = ...,
        stop_after: int | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        prompt_embeds: PromptEmbeds | Tensor | None = ...,
        negative_prompt_embeds: PromptEmbeds | Tensor | None = ...,
        output_type: Literal["pil", "np", "pt", "latent"] = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        edit: PictureEdit | None = ...,
        max_sequence_length: int | None = ...,
        use_system_prompt: bool | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[False],
    ) -> tuple[Any]: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        residual_temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        more_smooth: bool = True,
        speed: SpeedName = "exact",
        guidance_stops_at: int | None = None,
        late_temperature: float | None = None,
        prune: Prune | Mapping[str, Any] | None = None,
        stop_after: int | None = None,
        generator: GeneratorArgument = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: PromptEmbeds | Tensor | None = None,
        negative_prompt_embeds: PromptEmbeds | Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[..., object] | None = None,
        edit: PictureEdit | None = None,
        max_sequence_length: int | None = None,
        use_system_prompt: bool | None = None,
        reproducible: bool | None = None,
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one or many texts.
            size: side in pixels, one of `sizes`. `height` and `width` are aliases: images are square.
            num_images_per_prompt: images per prompt, each with its own seed.
            guidance_scale: strength of classifier-free guidance at the last scale; 0 turns it off and halves the work; None is
                the checkpoint's default (released: 4.5).
            num_inference_steps: steps of the residual diffusion; 0 leaves it out (discrete tokens only); None is the `speed`'s,
                8 in the paper.
            residual_temperature: scales the noise that these steps add, from 0, which gives the likeliest residual and smoother
                pictures, to 1; None is the checkpoint's default (released: 1).
            top_k: codes kept before drawing; None is the released 600, then 300 from scale 7 on; 0 keeps all.
            top_p: nucleus of probability kept after top-k; 0 turns it off; None is the checkpoint's default (released: 0).
            more_smooth: feed on Gumbel-softmax mixtures of codes (the released scripts' default) instead of the drawn codes.
            speed: "exact", the model as released; "fast", "turbo" or "draft", which compute less on the late scales and
                differ from it (docs/fast.md): `knobs(speed)` says what they mean here. The next four take the place of its own.
            guidance_stops_at: side of the first scale without guidance.
            late_temperature: what the logits of those scales are divided by; None is the checkpoint's default.
            prune: a `Prune`, or its fields by name: late scales compute some of their tokens.
            stop_after: side of the last scale that is run; without the last one there is no residual either.
            generator: a torch.Generator, or one per image: seeds are drawn from it, and noise on its device. Not with `seed`.
            seed: image i gets seed + i; or a list, one per image; None for fresh ones. The result's `seeds` has them.
            negative_prompt: replaces the empty unconditional context; one text, or one per prompt.
            prompt_embeds: from `encode_prompt`, or a context tensor [U, T, width] without padding, instead of `prompt`.
            negative_prompt_embeds: as `prompt_embeds`, instead of `negative_prompt`; one row for all, or one per prompt.
            output_type: "pil"; "np" [N, H, W, 3] or "pt" [N, 3, H, W], fp32 in 0..1; or "latent" [N, C, P, P] fp32.
            callback_on_step_end: called after each scale, as callback(step) with a `Step`, or in diffusers' form
                (pipe, step_index, timestep, callback_kwargs).
            edit: from `edit(image, mask)`: keep a given picture's unmasked part; `inpaint` and `outpaint` pass it.
            max_sequence_length: truncate prompts to so many tokens instead of the checkpoint's limit.
            use_system_prompt: put the released scripts' instruction before every prompt; None is the checkpoint's default
                (released: True).
            reproducible: True runs each image alone through the networks, so that its bits don't depend on the batch; False
                runs all together, which rounds differently. None is True on a CPU, where it costs little, else False.
            return_dict: False returns `(images,)`.

        Raises InputError for a bad argument, OutOfMemoryError where the device has too little memory, and WeightsError where
        the weights give logits that are not finite (in fp16 they may overflow).
        """
        settings = check_settings(
            guidance_scale=self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
            top_k=top_k,
            top_p=self.defaults.top_p if top_p is None else top_p,
            more_smooth=more_smooth,
            residual_temperature=self.defaults.residual_temperature if residual_temperature is None else residual_temperature,
            vocab_size=self.autoencoder.config.vocab_size,
        )
        knobs = self.knobs(
            speed,
            guidance_stops_at=guidance_stops_at,
            late_temperature=late_temperature,
            prune=prune,
            stop_after=stop_after,
            num_inference_steps=num_inference_steps,
        )
        call = self._check_call(
            sides={"size": size, "height": height, "width": width},
            output_type=output_type,
            return_dict=return_dict,
            callback=callback_on_step_end,
            reproducible=reproducible,
            edit=edit,
        )
        repeats = check_int(num_images_per_prompt, "num_images_per_prompt", 1)
        text = self._text_options(use_system_prompt, max_sequence_length, reproducible)
        given = self._given(prompt, prompt_embeds, edit)
        negative = self._negative(negative_prompt, negative_prompt_embeds, len(given))
        if prompt is None and prompt_embeds is None and negative is None:  # both guidance halves would be the same
            settings = replace(settings, guidance_scale=0.0)
        schedule = apply(knobs, self._schedule(settings))
        self._check_memory(schedule, len(given) * repeats, call)
        seeds, draw_device = seeds_for(len(given) * repeats, seed, generator, self.device)
        with out_of_memory_advice(), cpu_threads(self.num_threads):
            embeds = self._encode(given, text)
            negative_embeds = None if negative is None or not schedule.guided else self._encode(negative, text)

        def conditions() -> tuple[list[Condition], list[Condition] | None]:
            negatives = None if negative_embeds is None else self._conditions(negative_embeds, reproducible)
            return self._conditions(embeds, reproducible), negatives

        result = self._draw(schedule, seeds, draw_device, conditions, call)
        return ImageOutput(result, seeds) if return_dict else (result,)

    def _text_options(
        self, use_system_prompt: bool | None, max_sequence_length: int | None, reproducible: bool | None
    ) -> TextOptions:
        """Check the text arguments and fill in the checkpoint's defaults."""
        context_tokens = self.transformer.config.context_token
        system = self.defaults.use_system_prompt if use_system_prompt is None else use_system_prompt
        if max_sequence_length is not None:
            check_int(max_sequence_length, "max_sequence_length", 1, context_tokens)
        return TextOptions(check_bool(system, "use_system_prompt"), max_sequence_length, reproducible)

    def _given(
        self, prompt: str | Sequence[str] | None, prompt_embeds: PromptEmbeds | Tensor | None, edit: PictureEdit | None
    ) -> list[str] | PromptEmbeds:
        """Check that either prompt or prompt_embeds is given; return it; for an edit without, no context."""
        if prompt is None and prompt_embeds is None and edit is not None:
            config = self.transformer.config
            mask = torch.arange(config.context_token)[None] == 0
            return PromptEmbeds(torch.zeros(1, config.context_token, config.context_dim), mask)
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("Give either prompt or prompt_embeds, one of them.")
        return check_prompts(prompt) if prompt_embeds is None else self._check_embeds(prompt_embeds, "prompt_embeds")

    def _negative(
        self, prompt: str | Sequence[str] | None, embeds: PromptEmbeds | Tensor | None, count: int
    ) -> list[str] | PromptEmbeds | None:
        """Check the negative prompts, or embeds: one for all or one per prompt; None without any."""
        if prompt not in (None, "") and embeds is not None:
            raise InputError("Give either negative_prompt or negative_prompt_embeds, one of them.")
        if embeds is not None:
            given: list[str] | PromptEmbeds = self._check_embeds(embeds, "negative_prompt_embeds")
        elif prompt is None or prompt == "" or (isinstance(prompt, Sequence) and prompt and all(p == "" for p in prompt)):
            return None
        else:
            given = check_prompts(prompt, "negative_prompt")
        if len(given) not in (1, count):
            raise InputError(f"negative_prompt has {len(given)} entries for {count} prompts; give one for all, or one each.")
        return given

    def _check_embeds(self, embeds: PromptEmbeds | Tensor, name: str) -> PromptEmbeds:
        """Check shape and values; a plain tensor gets a mask of True."""
        if isinstance(embeds, Tensor):
            embeds = PromptEmbeds(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
        if not isinstance(embeds, PromptEmbeds):
            raise InputError(f"{name} must come from encode_prompt or be a tensor, not {type(embeds).__name__}.")
        if not isinstance(embeds.mask, Tensor) or not embeds.context.isfinite().all():
            raise InputError(f"{name} must be finite numbers with a mask tensor; encode the prompts again.")
        config = self.transformer.config
        expected = (config.context_token, config.context_dim)
        shape = tuple(embeds.context.shape)
        if len(shape) != 3 or not shape[0] or shape[1:] != expected or tuple(embeds.mask.shape) != shape[:2]:
            raise InputError(
                f"{name} must have shape [U, {expected[0]}, {expected[1]}] and a mask [U, {expected[0]}], not "
                f"{list(shape)} and {list(embeds.mask.shape)}."
            )
        return embeds

    def _encode(self, given: list[str] | PromptEmbeds, options: TextOptions) -> PromptEmbeds:
        """Encode prompts; return PromptEmbeds unchanged."""
        if isinstance(given, PromptEmbeds):
            return given
        if self.text_encoder is None:
            raise InputError(
                "This pipeline was loaded without a text encoder; pass prompt_embeds, or load with text_encoder=..."
            )
        with self._using(self.text_encoder.model):
            return self.text_encoder.encode(
                given,
                context_tokens=self.transformer.config.context_token,
                max_sequence_length=options.max_sequence_length,
                use_system_prompt=options.use_system_prompt,
                batch_size=self._batch_size(options.reproducible, len(given)),
            )

    def _schedule(self, settings: Settings) -> Schedule:
        config = self.transformer.config
        return hart_schedule(
            config.patch_nums,
            context_tokens=config.context_token,
            share_quant_resi=self.autoencoder.config.share_quant_resi,
            settings=settings,
        )

    def _conditions(self, embeds: PromptEmbeds, reproducible: bool | None) -> list[Condition]:
        """Compute conditions: of one prompt each if reproducible, else of all together."""
        parts = embeds.split(self._batch_size(reproducible, len(embeds.context)))
        return [self.transformer.condition(part.context, part.mask, part.position_ids) for part in parts]
