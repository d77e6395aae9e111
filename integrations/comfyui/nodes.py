"""Nodes that load a pipeline, draw with previews, edit and reconstruct.

In ComfyUI an IMAGE is a tensor [B, H, W, 3] fp32 in 0..1 and a MASK [B, H, W], 1 where something is to be painted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from hart_infer import HartPipeline, InputError, VarPipeline, VilaUPipeline
from hart_infer.checkpoints.families import find_family
from hart_infer.checkpoints.layouts import BUNDLED_MODEL
from hart_infer.generation.speed import SPEEDS
from hart_infer.images.tensors import to_pil

CATEGORY = "hart_infer"
PIPELINE = "HART_PIPELINE"  # the type of the wire between the nodes
DTYPES = {"as stored": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = {"HART": HartPipeline, "VAR": VarPipeline, "VILA-U": VilaUPipeline}
MAX_SEED = 2**64 - 1
MAX_COUNT = 64
DEFAULT_GUIDANCE = -1.0  # stands for the checkpoint's
PREVIEW_PIXELS = 512


class HartLoad:
    """Loads a checkpoint; the family is told from its files."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PIPELINE,)
    DESCRIPTION = "A checkpoint's folder or Hugging Face id. hart-mini comes with the package."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the name is ComfyUI's
        """Say what the node takes."""
        return {
            "required": {
                "model": ("STRING", {"default": BUNDLED_MODEL}),
                "dtype": (list(DTYPES), {"default": "as stored"}),
            },
            "optional": {
                "variant": ("STRING", {"default": "", "tooltip": "which of several weights, such as d16 for VAR"}),
                "offload": ("BOOLEAN", {"default": False, "tooltip": "keep each part on the CPU while it does not run"}),
            },
        }

    def load(self, model: str, dtype: str, variant: str = "", offload: bool = False) -> tuple[Any]:
        """Return the pipeline on ComfyUI's device. Raises HartError."""
        device = comfy.model_management.get_torch_device()
        pipeline = CLASSES[find_family(model)]
        on_cpu = offload and device.type != "cpu"
        pipe = pipeline.from_pretrained(model, dtype=DTYPES[dtype], variant=variant or None, device="cpu" if on_cpu else device)
        if on_cpu:
            pipe.enable_model_cpu_offload(device)
        return (pipe,)


def _drawing(prompt: str) -> dict[str, Any]:
    """Return the inputs of nodes that draw."""
    guidance = {"default": DEFAULT_GUIDANCE, "min": DEFAULT_GUIDANCE, "max": 100.0, "step": 0.1}
    return {
        "required": {
            "pipeline": (PIPELINE,),
            "prompt": ("STRING", {"multiline": True, "default": prompt, "tooltip": "for VAR a class's name or number"}),
            "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            "count": ("INT", {"default": 1, "min": 1, "max": MAX_COUNT, "tooltip": "picture i has seed + i"}),
        },
        "optional": {
            "guidance_scale": ("FLOAT", {**guidance, "tooltip": "-1 is the checkpoint's own"}),
            "speed": (list(SPEEDS), {"default": "exact", "tooltip": "HART and VAR: faster ones change the picture"}),
            "previews": ("BOOLEAN", {"default": True, "tooltip": "decode after every scale"}),
        },
    }


class HartSample:
    """Draws pictures, and shows each scale."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Say what the node takes."""
        return _drawing("a cat")

    def sample(self, pipeline: Any, prompt: str, seed: int, count: int, **settings: Any) -> tuple[Tensor]:
        """Return `count` pictures [count, H, W, 3]. Raises HartError."""
        return (_draw(pipeline, prompt, seed, count, **settings),)


class HartEdit:
    """Paints what a mask marks anew."""

    CATEGORY = CATEGORY
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "The picture is cut to a centred square of the model's size. An empty prompt says nothing of what is drawn."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Say what the node takes."""
        inputs = _drawing("")
        inputs["required"] |= {"image": ("IMAGE",), "mask": ("MASK",)}
        inputs["optional"] |= {"blend": ("BOOLEAN", {"default": True, "tooltip": "put the kept pixels back"})}
        return inputs

    def edit(
        self,
        pipeline: Any,
        prompt: str,
        seed: int,
        count: int,
        image: Tensor,
        mask: Tensor,
        blend: bool = True,
        **settings: Any,
    ) -> tuple[Tensor]:
        """Return `count` pictures of each of `image`, [B * count, H, W, 3]. Raises HartError."""
        if not isinstance(pipeline, HartPipeline | VarPipeline):
            raise InputError("VILA-U does not edit pictures; load a model of HART or VAR.")
        masks = mask.expand(len(image), -1, -1) if len(mask) == 1 else mask
        if len(masks) != len(image):
            raise InputError(f"There are {len(mask)} masks for {len(image)} pictures; give one for all, or one each.")
        edited = []
        for i, (picture, anew) in enumerate(zip(image, masks, strict=True)):
            given = pipeline.edit(_to_pil(picture), _mask_to_pil(anew, picture), blend=blend)
            edited.append(_draw(pipeline, prompt or None, seed + i * count, count, edit=given, **settings))
        return (torch.cat(edited),)


class HartReconstruct:
    """Sends pictures through the tokenizer and back."""

    CATEGORY = CATEGORY
    FUNCTION = "reconstruct"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Say what the node takes."""
        modes = ["the model's", "hybrid", "discrete"]
        tooltip = "hybrid decodes the latent as it is encoded, discrete its codes alone; VILA-U has discrete only"
        mode = (modes, {"default": modes[0], "tooltip": tooltip})
        return {"required": {"pipeline": (PIPELINE,), "image": ("IMAGE",), "mode": mode}}

    def reconstruct(self, pipeline: Any, image: Tensor, mode: str) -> tuple[Tensor]:
        """Return the pictures [B, H, W, 3] in the model's size. Raises HartError."""
        pictures = [_to_pil(picture) for picture in image]
        if not isinstance(pipeline, VilaUPipeline):
            return (_to_image(pipeline.reconstruct(pictures, mode=None if mode == "the model's" else mode)),)
        if mode == "hybrid":
            raise InputError("VILA-U's tokenizer is discrete; choose another mode.")
        return (_to_image(pipeline.reconstruct(pictures)),)


def _draw(
    pipeline: Any,
    prompt: str | None,
    seed: int,
    count: int,
    *,
    guidance_scale: float = DEFAULT_GUIDANCE,
    speed: str = "exact",
    previews: bool = True,
    **arguments: Any,
) -> Tensor:
    """Call the pipeline; return [count, H, W, 3] fp32 in 0..1 on the CPU."""
    if not isinstance(pipeline, VilaUPipeline):
        arguments["speed"] = speed
    elif speed != "exact":
        raise InputError("VILA-U has no fast modes; set speed to exact.")
    output = pipeline(
        prompt,
        num_images_per_prompt=count,
        seed=[(seed + i) % (MAX_SEED + 1) for i in range(count)],
        guidance_scale=None if guidance_scale == DEFAULT_GUIDANCE else guidance_scale,
        callback_on_step_end=_progress(previews),
        output_type="pil",
        **arguments,
    )
    return _to_image(output.images)


def _progress(previews: bool) -> Callable[[Any], None]:
    """Return a callback that moves ComfyUI's bar, shows the first picture so far, and ends the run when the user cancels it."""
    bar = comfy.utils.ProgressBar(1)

    def show(step: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = ("JPEG", step.preview()[0], PREVIEW_PIXELS) if previews else None
        bar.update_absolute(step.index + 1, step.num_scales, preview)

    return show


def _to_pil(picture: Tensor) -> Image.Image:
    """Turn [H, W, 3 or 4] in 0..1 into a PIL image, without alpha."""
    return to_pil(picture[..., :3].movedim(-1, 0)[None].float())[0]


def _mask_to_pil(mask: Tensor, picture: Tensor) -> Image.Image:
    """Turn [H, W] in 0..1 into a black and white image of the picture's size; half and more is painted anew."""
    white = Image.fromarray((mask >= 0.5).to(torch.uint8).mul(255).cpu().numpy(), "L")
    return white.resize((picture.shape[1], picture.shape[0]), Image.Resampling.NEAREST)


def _to_image(pictures: list[Image.Image]) -> Tensor:
    """Turn PIL images of one size into [B, H, W, 3] fp32 in 0..1."""
    pixels = [torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8) for picture in pictures]
    width, height = pictures[0].size
    return torch.stack(pixels).view(-1, height, width, 3).float() / 255
