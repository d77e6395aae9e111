"""What a comparison must know of a family: its random checkpoint, and how both codes load and draw it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import official
import official_var
import torch
from architecture_var import VAR_PRESETS
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Picture:
    """What a side drew."""

    images: Tensor  # [B, 3, H, W] in 0..1
    indices: Sequence[Tensor] = ()  # per scale [B, L], where a family records them


@dataclass(frozen=True)
class Loaded:
    """A side that is ready to draw."""

    draw: Callable[..., Picture]  # from a seed, and ours with a call's further arguments
    weights: list[Tensor]
    packed: bool = False  # ours: by `enable_packed_weights`


@dataclass(frozen=True)
class Family:
    """One model family; a request is what the parent process sends to a side's worker."""

    option: str  # which argument of the command line chooses the model
    pixels: Callable[[int], int]
    guidance: float
    more_smooth: bool
    checkpoint: Callable[[int, str, Path], Path]  # model, stored dtype, cache
    load_ours: Callable[[dict[str, Any]], Loaded]
    load_theirs: Callable[[dict[str, Any]], Loaded]


def prepare(pipe: Any) -> bool:
    """Do what the command line and the server do, too: pack the weights where that helps; return whether it does."""
    from hart_infer.engine.packed import packing_refusal

    pipe.set_progress_bar_config(disable=True)
    helps = packing_refusal(pipe.device, pipe.dtype) is None
    if helps:
        pipe.enable_packed_weights()
    return helps


# ---- HART


def load_our_hart(request: dict[str, Any]) -> Loaded:
    """Our pipeline with a random context."""
    from hart_infer import HartPipeline
    from hart_infer.models.text import PromptEmbeds

    pipe = HartPipeline.from_pretrained(
        request["checkpoint"],
        text_encoder=False,
        torch_dtype=DTYPES[request["dtype"]],
        device=request["device"],
        quantize=request.get("quantize"),
    )
    packed = prepare(pipe)
    pipe.num_threads = request["threads"]
    config = pipe.transformer.config
    embeds = PromptEmbeds(*measure.random_context(config.context_token, config.context_dim))
    options = {"guidance_scale": request["guidance"], "more_smooth": request["more_smooth"]}

    def draw(seed: int, **further: Any) -> Picture:
        return Picture(pipe(prompt_embeds=embeds, seed=seed, output_type="pt", **options, **further).images)

    return Loaded(draw, measure.tensors_of(pipe.transformer, pipe.autoencoder), packed)


def load_their_hart(request: dict[str, Any]) -> Loaded:
    """The released code with the same context."""
    checkpoint = Path(request["checkpoint"])
    hart = official.OfficialHart(request["official"], checkpoint, setting=request["setting"], device=request["device"])
    config = measure.read_config(checkpoint)
    context, mask = measure.random_context(config["context_token"], config["context_dim"])
    position_ids = mask.long().cumsum(dim=1) - 1
    options = {"cfg": request["guidance"], "more_smooth": request["more_smooth"]}

    def draw(seed: int) -> Picture:
        return Picture(hart.generate(context, mask, position_ids, seed=seed, **options))

    return Loaded(draw, measure.tensors_of(hart.model, hart.model.vae_proxy[0]))


# ---- VAR


def load_our_var(request: dict[str, Any]) -> Loaded:
    """Our pipeline with one class."""
    from hart_infer import VarPipeline

    options = {"dtype": DTYPES[request["dtype"]], "device": request["device"], "quantize": request.get("quantize")}
    pipe = VarPipeline.from_pretrained(request["checkpoint"], **options)
    packed = prepare(pipe)
    pipe.num_threads = request["threads"]
    label = measure.var_label(pipe.transformer.config.num_classes)
    options = {"guidance_scale": request["guidance"], "more_smooth": request["more_smooth"], **official_var.FILTERS}

    def draw(seed: int, **further: Any) -> Picture:
        with recorded_indices(pipe.engine) as indices:
            images = pipe(label, seed=seed, output_type="pt", **options, **further).images
        return Picture(images, indices)

    return Loaded(draw, measure.tensors_of(pipe.transformer, pipe.autoencoder), packed)


@contextlib.contextmanager
def recorded_indices(engine: Any) -> Iterator[list[Tensor]]:
    """A list that has every scale's indices once the block has ended; the engine's states keep them anyway."""
    states: list[Any] = []
    indices: list[Tensor] = []
    start = engine.start

    def recorded(*args: Any, **kwargs: Any) -> Any:
        begun = list(start(*args, **kwargs))
        states.extend(begun)
        return begun

    engine.start = recorded
    try:
        yield indices
    finally:
        del engine.start  # the class's own is there again
    indices.extend(torch.cat(each) for each in zip(*(state.indices for state in states), strict=True))


def load_their_var(request: dict[str, Any]) -> Loaded:
    """The released code with the same class."""
    var = official_var.OfficialVar(
        request["official"], Path(request["checkpoint"]), setting=request["setting"], device=request["device"]
    )
    labels = torch.tensor([measure.var_label(var.model.num_classes)])
    options = {"cfg": request["guidance"], "more_smooth": request["more_smooth"], **official_var.FILTERS}

    def draw(seed: int) -> Picture:
        images = var.generate(labels, seed=seed, **options)
        return Picture(images, var.indices)

    return Loaded(draw, measure.tensors_of(var.model, var.autoencoder))


FAMILIES = {
    "hart": Family(
        option="size",
        pixels=lambda size: size,
        guidance=4.5,
        more_smooth=True,
        checkpoint=lambda size, dtype, cache: measure.random_checkpoint(size, dtype, "none", cache),
        load_ours=load_our_hart,
        load_theirs=load_their_hart,
    ),
    "var": Family(
        option="depth",
        pixels=lambda depth: VAR_PRESETS[depth].size,
        guidance=4.0,
        more_smooth=False,
        checkpoint=measure.random_var_checkpoint,
        load_ours=load_our_var,
        load_theirs=load_their_var,
    ),
}
