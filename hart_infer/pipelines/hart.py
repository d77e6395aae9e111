"""`HartPipeline`: a checkpoint and a prompt in, pictures out. No maths here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoints import hart as checkpoints
from ..checkpoints.hart import Defaults, find_checkpoint
from ..checkpoints.layouts import EMBEDDED_MODEL
from ..checkpoints.text_encoder import load_text_encoder
from ..errors import InputError
from ..generation.schedule import Schedule, Settings, hart_schedule
from ..images import tensors
from ..models.hart import HartTransformer
from ..models.next_scale import Condition
from ..models.parts.autoencoder import Autoencoder
from ..models.text import PromptEmbeds, TextEncoder
from .arguments import GeneratorArgument, check_device, check_dtype, check_settings, seeds_for
from .checks import check_callable, check_int, check_output_type, check_prompts, check_size
from .next_scale import NextScalePipeline
from .out_of_memory import out_of_memory_advice
from .outputs import HartOutput, Step


class HartPipeline(NextScalePipeline[HartTransformer]):
    """Text to image with HART (Hybrid Autoregressive Transformer, arXiv:2410.10812).

    >>> pipe = HartPipeline.from_pretrained("mit-han-lab/hart-0.7b-1024px", torch_dtype=torch.bfloat16)
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
        self.defaults = defaults or Defaults()

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
        folder = None if text_encoder is False else checkpoint.locate_text_encoder(text_encoder, **hub)
        with out_of_memory_advice():
            transformer = checkpoint.load_transformer(torch_dtype)
            autoencoder = checkpoint.load_autoencoder(transformer.dtype)
            width = checkpoint.transformer.context_dim
            encoder = load_text_encoder(folder, dtype=transformer.dtype, device=target, width=width) if folder else None
            return cls(transformer, autoencoder, encoder, name=checkpoint.name, defaults=checkpoint.defaults).to(target)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; None for a text encoder that was not loaded."""
        return {"transformer": self.transformer, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}

    def save_pretrained(self, path: str | Path, *, max_shard_size: str = "5GB") -> Path:
        """Write one clean folder in the current dtype, from which `from_pretrained` gives an identical pipeline.

        The folder appears whole or not at all. Raises OutputError, or InputError for a bad `max_shard_size`.
        """
        parts = (self.transformer, self.autoencoder, self.text_encoder)
        return checkpoints.save(Path(path), *parts, self.defaults, max_shard_size=max_shard_size)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super()._move(device, dtype)
        if self.text_encoder is not None:
            self.text_encoder.to(device, dtype)

    def _facts(self) -> Mapping[str, str]:
        sides = " ".join(map(str, self.transformer.config.patch_nums))
        return {"sizes": f"{', '.join(map(str, self.sizes))} px; scales: {sides}"}

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        *,
        use_system_prompt: bool | None = None,
        max_sequence_length: int | None = None,
        reproducible: bool | None = None,
    ) -> PromptEmbeds:
        """Encode prompts once, for `prompt_embeds=` of later calls; the arguments are a call's."""
        if self.text_encoder is None:
            raise InputError(
                "This pipeline was loaded without a text encoder; pass prompt_embeds, or load with text_encoder=..."
            )
        prompts, context_tokens = check_prompts(prompt), self.transformer.config.context_token
        if max_sequence_length is not None:
            check_int(max_sequence_length, "max_sequence_length", 1, context_tokens)
        return self.text_encoder.encode(
            prompts,
            context_tokens=context_tokens,
            max_sequence_length=max_sequence_length,
            use_system_prompt=self.defaults.use_system_prompt if use_system_prompt is None else use_system_prompt,
            at_once=self._together(reproducible, len(prompts)),
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
        reproducible: bool | None = None,
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
            reproducible: take every image through the networks alone, so that it is the same, bit for bit, alone and in any
                batch; False takes them together, which rounds otherwise. None is True on a CPU, where it costs little, and
                False elsewhere.
            return_dict: False returns `(images,)`.

        Raises InputError for a bad argument, OutOfMemoryError where the device has too little memory, and WeightsError where
        the weights give logits that are not finite (in fp16 they may overflow).
        """
        settings = check_settings(
            guidance_scale=self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
            num_inference_steps=num_inference_steps,
            top_k=top_k,
            top_p=self.defaults.top_p if top_p is None else top_p,
            more_smooth=more_smooth,
            vocab_size=self.autoencoder.config.vocab_size,
        )
        check_size(size, self.sizes)
        check_output_type(output_type)
        check_callable(callback_on_step_end, "callback_on_step_end")
        repeats = check_int(num_images_per_prompt, "num_images_per_prompt", 1)
        text = {
            "use_system_prompt": use_system_prompt,
            "max_sequence_length": max_sequence_length,
            "reproducible": reproducible,
        }
        with out_of_memory_advice():
            embeds = self._embeds(prompt, prompt_embeds, text)
            count = len(embeds.context)
            seeds, draw_device = seeds_for(count * repeats, seed, generator, self.device)
            negative = self._negative(negative_prompt, count, text, encode=settings.guidance_scale > 0)
            f_hat = self._generate(
                self._schedule(settings),
                self._conditions(embeds, reproducible),
                None if negative is None else self._conditions(negative, reproducible),
                seeds,
                draw_device,
                callback_on_step_end,
                reproducible,
            )
            latent = output_type == "latent"
            result = f_hat if latent else tensors.FORMS[output_type](self._decode(f_hat, reproducible))
        return HartOutput(result, seeds) if return_dict else (result,)

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
        self, prompt: str | Sequence[str] | None, count: int, text: dict[str, Any], *, encode: bool
    ) -> PromptEmbeds | None:
        """The encoded negative prompts, one for all or one each; None where there are none, or none are to be encoded."""
        if prompt is None or prompt == "":
            return None
        listed = check_prompts(prompt, "negative_prompt")
        if len(listed) not in (1, count):
            raise InputError(f"negative_prompt has {len(listed)} entries for {count} prompts; give one for all, or one each.")
        return self.encode_prompt(listed, **text) if encode else None

    def _schedule(self, settings: Settings) -> Schedule:
        config = self.transformer.config
        return hart_schedule(
            config.patch_nums,
            context_tokens=config.context_token,
            share_quant_resi=self.autoencoder.config.share_quant_resi,
            settings=settings,
        )

    def _conditions(self, embeds: PromptEmbeds, reproducible: bool | None) -> list[Condition]:
        """The prompts' conditions: of each alone, or of all together."""
        parts = embeds.split(self._together(reproducible, len(embeds.context)))
        return [self.transformer.condition(part.context, part.mask, part.position_ids) for part in parts]
