"""VAR's recorded traces, the models they were recorded from, and how to run and feed the one by the other.

The subset in tests/data has the transformer and the quantizer of `var-tiny`, but neither an encoder nor a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hart_infer.checkpoints.var import RENAMES, autoencoder_from_tensors, config_from_tensors
from hart_infer.checkpoints.weights import load_module, tensor_shapes
from hart_infer.engine.next_scale import Engine
from hart_infer.generation.next_scale import Edit, as_drawn, finish, new_cache, prefill, run_scale
from hart_infer.generation.sampling import GeneratorSampler
from hart_infer.generation.schedule import Schedule, Settings, var_schedule
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.parts.quantizer import Quantizer
from hart_infer.models.var import VarTransformer
from hart_infer.pipelines.edit import PictureEdit

from .data import golden
from .recorded import FED, Trace, rounds_as_recorded

AUTOENCODER = "vae_ch32v1024z8.pth"  # of var-tiny; serves both checkpoints
RUNS = [(checkpoint, name) for checkpoint in ("var-tiny", "var-tiny-shared") for name in ("hard", "smooth")]
Tie = tuple[int, int, int, set[int]]  # image, scale, position, and the two codes that are as near to 1e-6
TIE: dict[tuple[str, str], Tie] = {("var-tiny-shared", "hard"): (1, 9, 711, {243, 286})}  # the README's only one


@dataclass(frozen=True)
class VarModel:
    transformer: VarTransformer
    quantizer: Quantizer

    def schedule(self, settings: Settings) -> Schedule:
        share = self.quantizer.share
        return var_schedule(self.transformer.config.patch_nums, share_quant_resi=share, settings=settings)


@dataclass(frozen=True)
class Run:
    indices: list[Tensor]
    f_hats: list[Tensor]
    fed_on: list[Tensor]  # per scale [B, C, p, p]


def load_model(checkpoint: str) -> VarModel:
    """A golden checkpoint's transformer and quantizer, fp32; skips where it is only in the full set."""
    return _load_model(golden(checkpoint), golden("var-tiny"))


@cache
def _load_model(folder: Path, autoencoder: Path) -> VarModel:
    file = folder / "var_d2.pth"
    shapes = tensor_shapes(file)
    config, (vocab_size, channels) = config_from_tensors(shapes, file), (shapes[n][0][i] for n, i in SIZES)
    transformer = load_module(
        lambda: VarTransformer(config, vocab_size=vocab_size, channels=channels), [file], RENAMES, dtype=None
    )
    whole, part = autoencoder / AUTOENCODER, autoencoder / "quantizer.safetensors"
    stored = torch.load(whole, weights_only=True) if whole.is_file() else load_file(part)
    quantizer = Quantizer(vocab_size=vocab_size, channels=channels, patch_nums=config.patch_nums, share_quant_resi=4)
    renamed = {RENAMES(name): tensor for name, tensor in stored.items()}
    live = {name.removeprefix("quantizer."): t for name, t in renamed.items() if name and name.startswith("quantizer.")}
    quantizer.load_state_dict(live)
    return VarModel(transformer, quantizer.requires_grad_(False))


SIZES = (("head.weight", 0), ("word_embed.weight", 1))  # where the vocabulary's and the latent's sizes are read off


def load_autoencoder(checkpoint: str) -> Autoencoder:
    """The autoencoder with a checkpoint's sides; skips where only the full set has it."""
    file = golden("var-tiny") / AUTOENCODER
    if not file.is_file():
        pytest.skip("var-tiny's autoencoder is only in the full golden set, which is not beside this checkout")
    return _load_autoencoder(file, load_model(checkpoint).transformer.config.patch_nums)


@cache
def _load_autoencoder(file: Path, sides: tuple[int, ...]) -> Autoencoder:
    config = autoencoder_from_tensors(tensor_shapes(file), file, sides)
    return load_module(lambda: Autoencoder(config), [file], RENAMES, dtype=None)


def released_folder(checkpoint: str, folder: Path) -> Path:
    """A checkpoint as released, the autoencoder beside the transformer: links in a new folder. Skips as above."""
    load_autoencoder(checkpoint)
    folder.mkdir()
    for file in (golden(checkpoint) / "var_d2.pth", golden("var-tiny") / AUTOENCODER):
        (folder / file.name).symlink_to(file)
    return folder


def load_trace(checkpoint: str, name: str) -> Trace:
    """`trace-<name>` of a golden checkpoint; skips where it is only in the full set."""
    return _load_trace(golden(checkpoint) / f"trace-{name}.safetensors")


@cache
def _load_trace(path: Path) -> Trace:
    said, tensors = metadata(path), load_file(path)
    settings = Settings(
        guidance_scale=float(said["cfg"]),
        num_inference_steps=0,
        top_k=int(said["top_k"]),
        top_p=float(said["top_p"]),
        more_smooth=said["more_smooth"] == "True",
    )
    return Trace(tensors, len(tensors["labels"]), int(said["g_seed"]), settings)


def tokenizer_trace() -> Trace:
    """A picture, its latent, its codes and their reconstruction."""
    return Trace(load_file(golden("var-tiny") / "trace-tokenizer.safetensors"), 1, 0, Settings())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def error(checkpoint: str, trace: Trace) -> float:
    """What f_hat may differ by after a run from the seed alone, relative: as the golden data's README says.

    Four times as much for mixtures where this machine rounds otherwise than the recording's.
    """
    if not trace.settings.more_smooth:
        return FED
    return (3e-2 if checkpoint == "var-tiny-shared" else 1e-3) * (1 if rounds_as_recorded() else 4)


class RecordedAtTie(GeneratorSampler):
    """Draws from the seed, but takes the recorded code at the one documented tie, if the other one is drawn there."""

    def __init__(self, trace: Trace, tie: Tie | None) -> None:
        super().__init__([trace.seed], images_per_seed=trace.images)
        self._trace, self._tie, self._scale = trace, tie, -1

    def multinomial(self, probabilities: Tensor) -> Tensor:
        indices = super().multinomial(probabilities)
        self._scale += 1
        if self._tie is not None and self._scale == self._tie[1]:
            image, scale, position, codes = self._tie
            recorded = self._trace.at(scale, "indices")[image, position]
            assert {indices[image, position].item(), recorded.item()} <= codes
            indices[image, position] = recorded
        return indices


@torch.inference_mode()
def generate_as_recorded(model: VarModel, trace: Trace, *, tie: Tie | None = None, edit: Edit = as_drawn) -> Run:
    """Generate as the trace was: one generator for all its images, drawn from the seed alone."""
    schedule, fed_on, f_hats = model.schedule(trace.settings), [], []

    def watched(embedding, stage):
        fed_on.append(edit(embedding, stage).clone())
        return fed_on[-1]

    condition = model.transformer.condition(trace["labels"])
    sampler = RecordedAtTie(trace, tie)
    (state,) = Engine(model.transformer, model.quantizer).start(schedule, [sampler], [condition], edit=watched)
    for stage in schedule:
        run_scale(state, stage)
        f_hats.append(state.f_hat.clone())
    assert torch.equal(finish(state), f_hats[-1])
    return Run(state.indices, f_hats, fed_on)


@torch.inference_mode()
def feed_transformer(
    transformer: VarTransformer, schedule: Schedule, classes: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Logits [R, L, V] of scale 0 and of one scale per input [R, C, p, p], for R classes."""
    rows = slice(0, len(classes))
    cache = new_cache(transformer, rows=len(classes), length=schedule.cached_length)
    prefix = prefill(transformer, transformer.condition(classes), cache, rows)
    hidden = [prefix.hidden_states]
    for stage, latent in zip(schedule.stages[1:], inputs, strict=False):
        (table,) = transformer.image_tables([stage.side], prefix.last_position)
        x = transformer.embed_tokens(latent, transformer.embed_scales()[stage.index])
        hidden.append(transformer(x, prefix.modulation, table, cache.at(stage.offset, stage.length)))
    return [transformer.head(each, prefix.modulation.head) for each in hidden]


def recorded_edit(model: VarModel, name: str) -> PictureEdit:
    """The edit of a trace, from the recorded latent of the picture and the recorded mask."""
    tokens = model.quantizer.encode(tokenizer_trace()["latent"])
    keep = load_trace("var-tiny", name)["keep_mask"][None, None]
    return PictureEdit(tokens, keep, torch.zeros(1, 3, 256, 256), None)
