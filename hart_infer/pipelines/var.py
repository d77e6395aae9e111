"""`VarPipeline`: pictures of classes with VAR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from ..checkpoints import var as checkpoints
from ..checkpoints.hub import HubOptions
from ..checkpoints.layouts import BUNDLED_VAR
from ..checkpoints.var import VarDefaults, find_checkpoint
from ..engine.quantize import Quantize
from ..errors import InputError
from ..generation.fast import apply
from ..generation.schedule import Settings, var_schedule
from ..generation.speed import Prune, SpeedName
from ..models.next_scale import Condition
from ..models.parts.autoencoder import Autoencoder
from ..models.var import VarTransformer
from .arguments import GeneratorArgument, check_device, check_dtype, check_settings, seeds_for
from .checks import check_bool, check_int
from .edit import PictureEdit
from .labels import Labels
from .next_scale import NextScalePipeline
from .out_of_memory import out_of_memory_advice
from .outputs import ImageOutput
from .quantized import check_quantize, quantize_blocks, refuse_to_save

Label = int | str
PRESETS: dict[str, dict[str, Any]] = {
    "fid": {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96, "more_smooth": False},  # of the paper's FID
}


class VarPipeline(NextScalePipeline[VarTransformer]):
    """Class to image with VAR (Visual Autoregressive Modeling, arXiv:2404.02905).

    >>> VarPipeline.from_pretrained()("sauropod", seed=7).images[0].save("sauropod.png")  # var-mini, in the package
    >>> pipe = VarPipeline.from_pretrained("FoundationVision/var", variant="d16")
    >>> pipe("golden retriever", seed=7).images[0].save("dog.png")
    """

    tokenization = "discrete"

    def __init__(
        self,
        transformer: VarTransformer,
        autoencoder: Autoencoder,
        *,
        name: str = "",
        labels: Labels | None = None,
        defaults: VarDefaults | None = None,
    ) -> None:
        """Assemble loaded parts; `from_pretrained` is the usual way. Without `labels` classes are numbers."""
        super().__init__(transformer, autoencoder, name=name)
        self.labels = labels or Labels(transformer.config.num_classes)
        self.defaults: VarDefaults = defaults or VarDefaults()

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path = BUNDLED_VAR,
        *,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantize: Quantize | None = None,
    ) -> VarPipeline:
        """Load a checkpoint from the Hub (owner/name) or a folder.

        "var-mini", the default, is the small model of emoji that comes with this package. The released one is
        "FoundationVision/var", with the variants d16, d20, d24, d30 (256 px) and d36 (512 px). A folder holds `var_*.pth` and
        one `vae_*.pth`, or is one that `save_pretrained` wrote.

        `variant`: needed where there are several `var_*.pth`. `dtype` (alias `torch_dtype`): None keeps the stored one; the
        quantizer stays fp32. `device` None: CUDA, else MPS, else the CPU. `revision`, `cache_dir`, `token`,
        `local_files_only`: passed to huggingface_hub. A `classes.json` beside the weights names the classes; without it 1000
        classes have ImageNet's names.
        `quantize`: "int8" runs the blocks' linear maps in int8, "int8_weight_only" stores their weights so; both are
        approximate (docs/cpu.md has what they save and cost), and such a pipeline can't be saved.

        Raises InputError, CheckpointNotFoundError, ConfigError, WeightsError, OutOfMemoryError.
        """
        check_quantize(quantize)
        target, dtype = check_device(device), dtype or torch_dtype
        check_dtype(dtype)
        check_bool(local_files_only, "local_files_only")
        if variant is not None and repo_or_path == BUNDLED_VAR:
            released = f'from_pretrained("FoundationVision/var", variant={variant!r})'
            raise InputError(f"{BUNDLED_VAR} has no variants; name a repository that has: {released}.")
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        checkpoint = find_checkpoint(repo_or_path, variant=variant, hub=hub)
        labels = Labels.for_checkpoint(checkpoint.transformer.num_classes, checkpoint.classes)
        with out_of_memory_advice():
            transformer = checkpoint.load_transformer(dtype)
            quantize_blocks(transformer, quantize)
            autoencoder = checkpoint.load_autoencoder(transformer.dtype)
            pipe = cls(transformer, autoencoder, name=checkpoint.name, labels=labels, defaults=checkpoint.defaults)
            return pipe.to(target)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name."""
        return {"transformer": self.transformer, "autoencoder": self.autoencoder}

    def _save(self, path: Path, max_shard_size: str) -> Path:
        refuse_to_save(self.transformer)
        parts = (self.transformer, self.autoencoder)
        return checkpoints.save(path, *parts, self.defaults, class_names=self.labels.names, max_shard_size=max_shard_size)

    def _facts(self) -> Mapping[str, str]:
        config = self.transformer.config
        named = "with names" if self.labels.names else "numbers only"
        return {
            "sizes": f"{', '.join(map(str, self.sizes))} px; scales: {' '.join(map(str, config.patch_nums))}",
            "classes": f"{config.num_classes}, {named}",
            **self._speeds(),
        }

    @overload
    def __call__(
        self,
        label: Label | Sequence[Label] | None = ...,
        *,
        preset: Literal["fid"] | None = ...,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        more_smooth: bool | None = ...,
        speed: SpeedName = ...,
        guidance_stops_at: int | None = ...,
        late_temperature: float | None = ...,
        prune: Prune | Mapping[str, Any] | None = ...,
        stop_after: int | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        output_type: Literal["pil", "np", "pt", "latent"] = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        edit: PictureEdit | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[True] = ...,
    ) -> ImageOutput: ...

    @overload
    def __call__(
        self,
        label: Label | Sequence[Label] | None = ...,
        *,
        preset: Literal["fid"] | None = ...,
        size: int | None = ...,
        height: int | None = ...,
        width: int | None = ...,
        num_images_per_prompt: int = ...,
        guidance_scale: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        more_smooth: bool | None = ...,
        speed: SpeedName = ...,
        guidance_stops_at: int | None = ...,
        late_temperature: float | None = ...,
        prune: Prune | Mapping[str, Any] | None = ...,
        stop_after: int | None = ...,
        generator: GeneratorArgument = ...,
        seed: int | Sequence[int] | None = ...,
        output_type: Literal["pil", "np", "pt", "latent"] = ...,
        callback_on_step_end: Callable[..., object] | None = ...,
        edit: PictureEdit | None = ...,
        reproducible: bool | None = ...,
        return_dict: Literal[False],
    ) -> tuple[Any]: ...

    @torch.no_grad()
    def __call__(
        self,
        label: Label | Sequence[Label] | None = None,
        *,
        preset: Literal["fid"] | None = None,
        size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        more_smooth: bool | None = None,
        speed: SpeedName = "exact",
        guidance_stops_at: int | None = None,
        late_temperature: float | None = None,
        prune: Prune | Mapping[str, Any] | None = None,
        stop_after: int | None = None,
        generator: GeneratorArgument = None,
        seed: int | Sequence[int] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[..., object] | None = None,
        edit: PictureEdit | None = None,
        reproducible: bool | None = None,
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Generate images of classes.

        Args:
            label: a class or several, each by number or name. None, only with `edit`: no class, and so no guidance.
            preset: "fid" takes the paper's FID settings (guidance_scale 1.5, top_k 900, top_p 0.96, no more_smooth) for what is
                None. Otherwise None is the checkpoint's default (released: 4.0, 900, 0.95, False).
            size: side in pixels, one of `sizes`. `height` and `width` are aliases: images are square.
            num_images_per_prompt: images per label, each with its own seed.
            guidance_scale: strength of classifier-free guidance at the last scale; 0 turns it off and halves the work.
            top_k: codes kept before drawing; 0 keeps all.
            top_p: nucleus of probability kept after top-k; 0 turns it off.
            more_smooth: feed on Gumbel-softmax mixtures of codes instead of the drawn codes.
            speed: "exact", the model as released; "fast", "turbo" or "draft", which compute less on the late scales and
                differ from it (docs/fast.md): `knobs(speed)` says what they mean here. The next four take the place of its own.
            guidance_stops_at: side of the first scale without guidance.
            late_temperature: what the logits of those scales are divided by; None is the checkpoint's default.
            prune: a `Prune`, or its fields by name: late scales compute some of their tokens.
            stop_after: side of the last scale that is run.
            generator: a torch.Generator, or one per image: seeds are drawn from it, and noise on its device. Not with `seed`.
            seed: image i gets seed + i; or a list, one per image; None for fresh ones. The result's `seeds` has them. On a CPU
                it is the released code's `g_seed` for a batch of one.
            output_type: "pil"; "np" [N, H, W, 3] or "pt" [N, 3, H, W], fp32 in 0..1; or "latent" [N, C, P, P] fp32.
            callback_on_step_end: called after each scale, as callback(step) with a `Step`, or in diffusers' form
                (pipe, step_index, timestep, callback_kwargs).
            edit: from `edit(image, mask)`: keep a given picture's unmasked part; `inpaint` and `outpaint` pass it.
            reproducible: True runs each image alone through the networks, so that its bits don't depend on the batch; False
                runs all together, which rounds differently. None is True on a CPU, where it costs little, else False.
            return_dict: False returns `(images,)`.

        Raises InputError for a bad argument, OutOfMemoryError where the device has too little memory, and WeightsError where
        the weights give logits that are not finite (in fp16 they may overflow).
        """
        classes = self._classes(label, edit)
        settings = self._settings(
            preset, guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, more_smooth=more_smooth, guided=label is not None
        )
        knobs = self.knobs(
            speed,
            guidance_stops_at=guidance_stops_at,
            late_temperature=late_temperature,
            prune=prune,
            stop_after=stop_after,
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
        config = self.transformer.config
        exact = var_schedule(config.patch_nums, share_quant_resi=self.autoencoder.config.share_quant_resi, settings=settings)
        schedule = apply(knobs, exact)
        self._check_memory(schedule, len(classes) * repeats, call)
        seeds, draw_device = seeds_for(len(classes) * repeats, seed, generator, self.device)

        def conditions() -> tuple[list[Condition], None]:
            parts = torch.tensor(classes).split(self._batch_size(reproducible, len(classes)))
            return [self.transformer.condition(part) for part in parts], None

        result = self._draw(schedule, seeds, draw_device, conditions, call)
        return ImageOutput(result, seeds) if return_dict else (result,)

    def _classes(self, label: Label | Sequence[Label] | None, edit: PictureEdit | None) -> list[int]:
        """Return class indices; that of "no class" for None. Raises InputError."""
        if label is not None:
            return self.labels.check(label)
        if edit is None:
            raise InputError("Give a class: its number, or its name where the checkpoint has names.")
        return [self.transformer.config.num_classes]

    def _settings(self, preset: str | None, *, guided: bool, **given: Any) -> Settings:
        """Return the checked settings: what is given, else the preset's, else the defaults. Raises InputError."""
        if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}.")
        defaults = self.defaults
        chosen: dict[str, Any] = {
            "guidance_scale": defaults.guidance_scale,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "more_smooth": False,
        }
        chosen |= PRESETS[preset] if preset else {}
        chosen["top_k"] = min(chosen["top_k"], self.autoencoder.config.vocab_size)
        chosen |= {name: value for name, value in given.items() if value is not None}
        settings = check_settings(vocab_size=self.autoencoder.config.vocab_size, **chosen)
        return settings if guided else replace(settings, guidance_scale=0.0)
