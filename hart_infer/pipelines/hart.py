"""`HartPipeline`: a checkpoint and a prompt in, pictures out. No maths here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoints.layouts import EMBEDDED_MODEL, find_checkpoint
from ..checkpoints.loading import (
    check_device,
    check_dtype,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    locate_text_encoder,
)
from ..errors import InputError
from ..generation.next_scale import Prefill, ScaleOutput, generate_images, images_at_once, unconditional_prefill
from ..generation.sampling import Settings
from ..generation.schedule import Stage, build_schedule
from ..images import tensors
from ..models.config import Defaults
from ..models.next_scale import Transformer
from ..models.parts.autoencoder import Autoencoder
from ..models.text import PromptEmbeds, TextEncoder
from .arguments import (
    GeneratorArgument,
    check_callable,
    check_int,
    check_output_type,
    check_prompts,
    check_size,
    seeds_for,
)
from .out_of_memory import memory_care
from .outputs import HartOutput, Step

if TYPE_CHECKING:
    from PIL.Image import Image

DECODED_PIXELS = 1024 * 1024  # decoded at once, which bounds the memory of a batch


class HartPipeline:
    """Text to image with HART (Hybrid Autoregressive Transformer, arXiv:2410.10812).

    >>> pipe = HartPipeline.from_pretrained("mit-han-lab/hart-0.7b-1024px", torch_dtype=torch.bfloat16)
    >>> pipe("a cat", seed=7).images[0].save("cat.png")
    """

    def __init__(
        self,
        transformer: Transformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder | None = None,
        *,
        name: str = "",
        defaults: Defaults | None = None,
    ) -> None:
        """Assemble loaded parts; `from_pretrained` is the usual way. Without a text encoder calls need `prompt_embeds`."""
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.name = name
        self.defaults = defaults or Defaults()
        self._progress: dict[str, Any] = {"disable": None, "desc": "scales", "unit": "scale"}
        self._tile: int | None = None
        self._unconditional: Prefill | None = None

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path = EMBEDDED_MODEL,
        *,
        text_encoder: str | Path | Literal[False] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        use_ema: bool = True,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        strict_config: bool = False,
    ) -> HartPipeline:
        """Load a checkpoint from the Hub (owner/name) or a folder (the checkpoint's, or its `llm/`).

        "hart-mini", the default, is the small model that comes with this package; the released one is
        "mit-han-lab/hart-0.7b-1024px", a download.

        `text_encoder`: id or folder; None takes the one beside the checkpoint, else the released one; False loads none.
        `use_ema`: the EMA weights, as the released scripts do, where the checkpoint has them. `torch_dtype` None keeps the
        stored dtype; the quantizer is fp32 always. `device` None: CUDA, else MPS, else the CPU. `variant` "fp16" reads
        `model.fp16.safetensors`. `strict_config` refuses configuration keys that nobody knows, which otherwise one warning
        names. The rest goes to huggingface_hub.

        Raises InputError, CheckpointNotFoundError, ConfigError, WeightsError, OutOfMemoryError.
        """
        target = check_device(device)
        check_dtype(torch_dtype)
        hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        checkpoint = find_checkpoint(
            repo_or_path,
            use_ema=use_ema,
            variant=variant,
            revision=revision,
            with_text_encoder=text_encoder is None,
            strict_config=strict_config,
            **hub,
        )
        folder = None if text_encoder is False else locate_text_encoder(checkpoint, text_encoder, **hub)
        with memory_care():
            transformer = load_transformer(checkpoint, torch_dtype)
            autoencoder = load_autoencoder(checkpoint, transformer.dtype)
            encoder = load_text_encoder(checkpoint, folder, transformer.dtype, target) if folder else None
            return cls(transformer, autoencoder, encoder, name=checkpoint.name, defaults=checkpoint.defaults).to(target)

    def save_pretrained(self, path: str | Path, *, max_shard_size: str = "5GB") -> Path:
        """Write one clean folder in the current dtype, from which `from_pretrained` gives an identical pipeline.

        The folder appears whole or not at all. Raises OutputError.
        """
        from ..checkpoints.saving import save_pipeline

        return save_pipeline(self, Path(path), max_shard_size=max_shard_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        return self.transformer.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the square pictures that the checkpoint was trained for."""
        return (self.transformer.config.patch_nums[-1] * self.autoencoder.config.downsample,)

    def to(
        self,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HartPipeline:
        """Move and cast in place: `to("cuda")`, `to(torch.bfloat16)`, `to(device=..., dtype=...)`; returns self."""
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        check_dtype(dtype)
        device = None if device is None else check_device(device)
        self._unconditional = None
        self.transformer.to(device=device, dtype=dtype)
        self.autoencoder.to_device(device, dtype)
        if self.text_encoder is not None:
            self.text_encoder.to(device, dtype)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm's bar over the scales, e.g. `disable=True`; by default it shows on terminals only."""
        self._progress |= kwargs

    def enable_decoder_tiling(self, tile: int | None = 32) -> None:
        """Decode in tiles of `tile` latent cells, to save memory; None turns it off.

        Approximate: group norms see a tile instead of the picture. docs/memory.md has what it saves and costs.
        """
        self._tile = None if tile is None else check_int(tile, "tile", 8)

    def describe(self) -> str:
        """Which model, where, in what precision, and which implementation runs each operation."""
        from .describe import describe_pipeline

        return describe_pipeline(self)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        *,
        use_system_prompt: bool | None = None,
        max_sequence_length: int | None = None,
    ) -> PromptEmbeds:
        """Encode prompts once, for `prompt_embeds=` of later calls; `use_system_prompt` None is the checkpoint's default."""
        if self.text_encoder is None:
            raise InputError(
                "This pipeline was loaded without a text encoder; pass prompt_embeds, or load with text_encoder=..."
            )
        return self.text_encoder.encode(
            check_prompts(prompt),
            context_tokens=self.transformer.config.context_token,
            max_sequence_length=max_sequence_length,
            use_system_prompt=self.defaults.use_system_prompt if use_system_prompt is None else use_system_prompt,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        size: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int = 8,
        top_k: int | None = None,
        top_p: float | None = None,
        more_smooth: bool = True,
        generator: GeneratorArgument = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: PromptEmbeds | Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Step], object] | None = None,
        max_sequence_length: int | None = None,
        use_system_prompt: bool | None = None,
        return_dict: bool = True,
    ) -> HartOutput | tuple[Any]:
        """Generate pictures.

        Args:
            prompt: one or many texts.
            size: side in pixels; one of `sizes`.
            num_images_per_prompt: pictures per prompt, each with its own seed.
            guidance_scale: strength of classifier-free guidance at the last scale; 0 turns it off, at half the work; None is
                the checkpoint's default, 4.5 of the released one.
            num_inference_steps: steps of the residual diffusion, 8 in the paper; 0 leaves it out (discrete tokens only).
            top_k: codes kept before drawing; None is the released 600, then 300 from scale 7 on; 0 keeps all.
            top_p: nucleus of probability kept after top-k; 0 turns it off; None is the checkpoint's default, 0 of the released
                one.
            more_smooth: feed on Gumbel-softmax mixtures of codes (the released scripts' default) instead of the drawn codes.
            generator: draws the seeds, and its device draws the noise; one, or one per image. Excludes `seed`.
            seed: picture i gets seed + i; or a list, one per picture; None for fresh ones, which are reported back.
            negative_prompt: takes the place of the empty unconditional context; one text, or one per prompt.
            prompt_embeds: from `encode_prompt`, or a context tensor [U, T, width] without padding, instead of `prompt`.
            output_type: "pil"; "np" [N, H, W, 3] or "pt" [N, 3, H, W], fp32 in 0..1; or "latent" [N, C, P, P] fp32.
            callback_on_step_end: called with a `Step` after each scale.
            max_sequence_length: truncate prompts to so many tokens instead of the checkpoint's limit.
            use_system_prompt: put the released scripts' instruction before every prompt; None is the checkpoint's default,
                True of the released one.
            return_dict: False returns `(images,)`.

        Raises InputError for a bad argument, OutOfMemoryError where the device has too little memory, and WeightsError where
        the weights give logits that are not finite (in fp16 they may overflow).
        """
        settings = Settings.checked(
            guidance_scale=self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
            num_inference_steps=num_inference_steps,
            top_k=top_k,
            top_p=self.defaults.top_p if top_p is None else top_p,
            more_smooth=more_smooth,
            vocabulary=self.autoencoder.config.vocab_size,
        )
        check_size(size, self.sizes)
        check_output_type(output_type)
        check_callable(callback_on_step_end, "callback_on_step_end")
        repeats = check_int(num_images_per_prompt, "num_images_per_prompt", 1)
        if max_sequence_length is not None:
            check_int(max_sequence_length, "max_sequence_length", 1, self.transformer.config.context_token)
        text = {"use_system_prompt": use_system_prompt, "max_sequence_length": max_sequence_length}
        with memory_care():
            embeds = self._embeds(prompt, prompt_embeds, text)
            count = len(embeds.context)
            seeds, draw_device = seeds_for(count * repeats, seed, generator, self.device)
            halves = [embeds, *self._negative(negative_prompt, count, text, settings)]
            f_hat = self._generate(halves, seeds, draw_device, settings, callback_on_step_end)
            result = f_hat if output_type == "latent" else tensors.FORMS[output_type](self._decode(f_hat))
        return HartOutput(result, seeds) if return_dict else (result,)

    @torch.no_grad()
    def reconstruct(self, image: Image | Sequence[Image] | Tensor, mode: Literal["hybrid", "discrete"] = "hybrid") -> Any:
        """Image to tokens and back: "hybrid" decodes the continuous latent, "discrete" the codes alone (paper figure 4).

        A PIL image, or a list of them, is resized and cropped to the checkpoint's size and comes back so; a tensor
        [N, 3, size, size] in 0..1 comes back as one, fp32.
        """
        if mode not in ("hybrid", "discrete"):
            raise InputError(f"mode must be hybrid or discrete, not {mode!r}.")
        pixels = tensors.to_tensor(image, self.sizes[0])
        with memory_care():
            latents = [self.autoencoder.latent(one.to(self.device) * 2 - 1, mode) for one in pixels.split(1)]
            rebuilt = self._decode(torch.cat(latents))
        if isinstance(image, Tensor):
            return rebuilt
        pictures = tensors.to_pil(rebuilt)
        return pictures if isinstance(image, Sequence) else pictures[0]

    def _embeds(
        self, prompt: str | Sequence[str] | None, prompt_embeds: PromptEmbeds | Tensor | None, text: dict[str, Any]
    ) -> PromptEmbeds:
        """The encoded prompts, from either of the two arguments."""
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("Give either prompt or prompt_embeds, one of them.")
        if prompt_embeds is None:
            return self.encode_prompt(prompt, **text)  # type: ignore[arg-type]
        if isinstance(prompt_embeds, Tensor):
            prompt_embeds = PromptEmbeds(prompt_embeds, torch.ones(prompt_embeds.shape[:2], dtype=torch.bool))
        if not isinstance(prompt_embeds, PromptEmbeds):
            raise InputError(f"prompt_embeds must come from encode_prompt or be a tensor, not {type(prompt_embeds).__name__}.")
        if not isinstance(prompt_embeds.mask, Tensor) or not prompt_embeds.context.isfinite().all():
            raise InputError("prompt_embeds must be finite numbers with a mask tensor; encode the prompts again.")
        config = self.transformer.config
        expected = (config.context_token, config.context_dim)
        shape = tuple(prompt_embeds.context.shape)
        if len(shape) != 3 or not shape[0] or shape[1:] != expected or tuple(prompt_embeds.mask.shape) != shape[:2]:
            raise InputError(
                f"prompt_embeds must have shape [U, {expected[0]}, {expected[1]}] and a mask [U, {expected[0]}], not "
                f"{list(shape)} and {list(prompt_embeds.mask.shape)}."
            )
        return prompt_embeds

    def _negative(
        self, prompt: str | Sequence[str] | None, count: int, text: dict[str, Any], settings: Settings
    ) -> list[PromptEmbeds]:
        """The encoded negative prompts, one for all or one each; nothing where there are none or nothing is guided."""
        if prompt is None or prompt == "":
            return []
        listed = check_prompts(prompt, "negative_prompt")
        if len(listed) not in (1, count):
            raise InputError(f"negative_prompt has {len(listed)} entries for {count} prompts; give one for all, or one each.")
        return [self.encode_prompt(listed, **text)] if settings.guidance_scale else []

    def _generate(
        self,
        contexts: list[PromptEmbeds],
        seeds: list[int],
        draw_device: torch.device,
        settings: Settings,
        callback: Callable[[Step], object] | None,
    ) -> Tensor:
        """Run the scales with bar and callback; returns the latent [N, C, P, P] fp32.

        `contexts`: the prompts' and, where they are not the plain unconditional one, the negative prompts'.
        """
        config = self.transformer.config
        stages = build_schedule(
            config.patch_nums,
            context_tokens=config.context_token,
            share_quant_resi=self.autoencoder.config.share_quant_resi,
            top_k=settings.top_k,
        )
        unconditional = self._empty(stages[0]) if settings.guidance_scale and len(contexts) == 1 else None
        scales = generate_images(
            self.transformer, self.autoencoder.quantizer, stages, contexts, unconditional, seeds, draw_device, settings
        )
        f_hat = torch.empty(0)
        with closing(scales), tqdm(scales, total=len(stages), **self._progress) as bar:
            for scale in bar:
                f_hat = scale.f_hat
                if callback is not None and self._call_back(callback, scale, len(stages)):
                    break
        return f_hat

    def _call_back(self, callback: Callable[[Step], object], scale: ScaleOutput, num_scales: int) -> bool:
        """Show a scale to the callback; True if it asked to stop."""
        step = Step(scale.stage.index, scale.stage.side, num_scales, scale.f_hat, self._decode)
        callback(step)
        return step.stopped

    def _empty(self, stage: Stage) -> Prefill:
        """Scale 0 of the unconditional context: the same for every prompt, so encoded once."""
        cached = self._unconditional
        if cached is None or (cached.hidden.device, cached.hidden.dtype) != (self.device, self.dtype):
            self._unconditional = unconditional_prefill(self.transformer, stage)
        assert self._unconditional is not None
        return self._unconditional

    def _decode(self, f_hat: Tensor) -> Tensor:
        """Latents [N, C, P, P] -> pictures [N, 3, H, W] fp32 in 0..1, few at a time: a picture doesn't depend on the batch."""
        at_once = images_at_once(self.device, DECODED_PIXELS // self.sizes[0] ** 2)
        parts = [self.autoencoder.decode(part, tile=self._tile) for part in f_hat.split(at_once)]
        return torch.cat(parts).add_(1).mul_(0.5)
