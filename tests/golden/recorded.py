"""Recorded traces, the models they were recorded from, and how to feed the one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hart_infer.checkpoints.hart import find_checkpoint
from hart_infer.generation.next_scale import new_cache
from hart_infer.generation.noise import ResidualNoise
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings, hart_schedule
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.parts.modulation import Modulation
from hart_infer.models.parts.quantizer import Quantizer

from . import naive
from .data import SUBSET, golden, golden_root

FED = 1e-5  # relative error where every input is a recorded one: twice what an independent implementation had
SMOOTH, HARD = 5e-3, 2e-4  # of a whole run, its last scale included: 1 / tau amplifies rounding in a smooth one


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest error over the reference's largest value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float((ours - reference).abs().max() / reference.abs().max())


def rms(ours: Tensor, reference: Tensor) -> float:
    """Root mean square error: steadier than the largest, which is one draw of rounding."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float((ours.to(reference.dtype) - reference).square().mean().sqrt())


@dataclass(frozen=True)
class Model:
    transformer: HartTransformer
    autoencoder: Autoencoder

    @property
    def quantizer(self) -> Quantizer:
        return self.autoencoder.quantizer

    def schedule(self, settings: Settings | None = None) -> Schedule:
        config = self.transformer.config
        return hart_schedule(
            config.patch_nums,
            context_tokens=config.context_token,
            share_quant_resi=self.autoencoder.config.share_quant_resi,
            settings=settings,
        )

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Within it, the modules, which tests share, are on another device than the CPU."""
        modules = (self.transformer, self.autoencoder)
        try:
            for module in modules:
                module.to(device)
            yield
        finally:
            for module in modules:
                module.to("cpu")


def load_model(checkpoint: str, dtype: torch.dtype = torch.float32, *, use_ema: bool = False) -> Model:
    """A golden checkpoint's modules; skips where it is only in the full set."""
    return _load_model(golden(checkpoint), dtype, use_ema)


@cache
def _load_model(folder, dtype, use_ema) -> Model:
    found = find_checkpoint(folder, use_ema=use_ema, with_text_encoder=False)
    transformer = found.load_transformer(dtype)
    return Model(transformer, found.load_autoencoder(transformer.dtype))


@dataclass(frozen=True)
class Trace:
    """One recorded run: its tensors by key, and what it was called with."""

    tensors: dict[str, Tensor]
    images: int
    seed: int
    settings: Settings

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.tensors and golden_root() == SUBSET:
            pytest.skip(f"{key} is left out of the golden data's subset")
        return self.tensors[key]

    def at(self, scale: int, key: str) -> Tensor:
        return self[f"scale{scale}.{key}"]

    def has(self, key: str) -> bool:
        return key in self.tensors

    def to(self, device: torch.device | str) -> Trace:
        """The same with its tensors on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def error(self) -> float:
        """What a run from the seed alone may differ by, relative.

        Four times as much where this machine rounds otherwise than the recording's: a code at the threshold of top-k can
        then be in here and out there, which is a step, not rounding. With PyTorch and MKL held to AVX2 or SSE: 2 times.
        """
        return (SMOOTH if self.settings.more_smooth else HARD) * (1 if rounds_as_recorded() else 4)


def load_trace(checkpoint: str, name: str) -> Trace:
    """`trace-<name>` of a golden checkpoint; skips where it is only in the full set."""
    return _load_trace(golden(checkpoint) / f"trace-{name}.safetensors")


@cache
def _load_trace(path) -> Trace:
    with safe_open(path, "pt") as file:
        said = file.metadata()
    settings = Settings(
        guidance_scale=float(said["cfg_scale"]),
        top_p=float(said.get("top_p", 0)),
        more_smooth=said["more_smooth"] == "True",
    )
    return Trace(load_file(path), int(said["B"]), int(said["seed"]), settings)


class Recorded(GeneratorSampler):
    """Hands out a trace's indices and noises in the order in which they are asked for."""

    def __init__(self, trace: Trace, *, scale: int = 0) -> None:
        super().__init__([trace.seed], images_per_seed=trace.images)
        self.noise = RecordedNoise(trace)
        self._trace = trace
        self._scale = scale

    def multinomial(self, probabilities: Tensor) -> Tensor:
        indices = self._trace.at(self._scale, "indices")
        self._scale += 1
        drawn = probabilities.gather(-1, indices[..., None])
        assert (drawn > 0).all(), "a recorded code is filtered out"
        return indices

    def gumbel(self, like: Tensor) -> Tensor:
        return self._trace.at(self._scale - 1, "gumbel")


class RecordedNoise(ResidualNoise):
    """A trace's noises of the residual diffusion, at all token positions or a few of them."""

    def __init__(self, trace: Trace, positions: Tensor | slice = slice(None)) -> None:
        self._trace = trace
        self._positions = positions
        self._step = 0

    def start(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        return self._noise("_init", channels)

    def step(self, tokens: int, channels: int, device: torch.device) -> Tensor:
        self._step += 1
        return self._noise(self._step - 1, channels)

    def _noise(self, name: str | int, channels: int) -> Tensor:
        return self._trace[f"diffusion.noise{name}"].view(self._trace.images, -1, channels)[:, self._positions]


def both_halves(trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Context, mask and position ids of 2B rows: the recorded ones, then the unconditional ones."""
    context, mask, position_ids = (trace[key] for key in ("context", "context_mask", "context_position_ids"))
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return (
        torch.cat([context, torch.zeros_like(context)]),
        torch.cat([mask, first]),
        torch.cat([position_ids, torch.zeros_like(position_ids)]),
    )


def recorded_inputs(model: Model, trace: Trace) -> list[Tensor]:
    """The inputs of scales 1, 2, ...: as recorded, or, in a thin hard trace, what the recorded indices make of them."""
    stages = model.schedule().stages
    if trace.has("scale0.next_input"):
        return [trace.at(stage.index - 1, "next_input") for stage in stages[1:]]
    assert not trace.settings.more_smooth
    codes = [model.quantizer.embed(trace.at(stage.index, "indices")) for stage in stages]
    return model.quantizer.inputs(codes)


@torch.inference_mode()
def feed_transformer(model: Model, trace: Trace, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Modulation]:
    """Hidden states [2B, L, D] of scale 0 and of one scale per input, both guidance halves, and the modulation."""
    transformer, schedule = model.transformer, model.schedule()
    condition = transformer.condition(*both_halves(trace))
    assert condition.copies == 1
    rows = len(condition.inputs)
    cache = new_cache(transformer, rows=rows, length=schedule.cached_length, scratch_length=schedule.scratch_length)
    context = cache.at(0, schedule.stages[0].length)
    result = [transformer(condition.inputs, condition.modulation, condition.table, context)]
    for stage, latent in zip(schedule.stages[1:], inputs, strict=False):
        (table,) = transformer.image_tables([stage.side], condition.last_position)
        scale = transformer.embed_scales()[stage.index]
        x = transformer.embed_tokens(latent.to(transformer.device), scale).repeat(2, 1, 1)
        place = cache.at(stage.offset, stage.length, cached=stage.cached)
        result.append(transformer(x, condition.modulation, table, place))
    return result, condition.modulation


@cache
@torch.inference_mode()
def rounds_as_recorded() -> bool:
    """Whether plain PyTorch, without hart_infer, rounds here as where the data was recorded: a CPU with AVX-512, MKL."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    config, trace = load_model("hart-tiny").transformer.config, load_trace("hart-tiny", "smooth")
    weights = released_weights("hart-tiny", "llm", torch.float32)
    computed = naive.logits(weights, config, trace.at(3, "hidden"), both_halves(trace)[0])
    return torch.equal(computed, trace.at(3, "logits"))


@cache
def released_weights(checkpoint: str, folder: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint's plain tensors under their released names."""
    return {name: tensor.to(dtype) for name, tensor in load_file(golden(checkpoint) / folder / "model.safetensors").items()}
