"""Say what the command line must know of a family of models: the options that it lacks, its defaults, what a prompt is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union

from .console import UsageError
from .options import ModelOptions

if TYPE_CHECKING:
    from ..checkpoints.families import Family
    from ..pipelines.hart import HartPipeline
    from ..pipelines.var import VarPipeline
    from ..pipelines.vila_u import VilaUPipeline

AnyPipeline = Union["HartPipeline", "VarPipeline", "VilaUPipeline"]
Ability = Literal["draw pictures", "edit pictures", "draw videos", "answer questions"]

# The options that not every family has, by the arguments that they give.
FLAGS = {
    "num_inference_steps": "--steps",
    "residual_temperature": "--residual-temperature",
    "speed": "--speed",
    "guidance_stops_at": "--guidance-stops-at",
    "late_temperature": "--late-temperature",
    "prune": "--prune",
    "stop_after": "--stop-after",
    "more_smooth": "--smooth",
    "negative_prompt": "--negative-prompt",
    "use_system_prompt": "--no-system-prompt",
    "preset": "--preset",
    "text_encoder": "--text-encoder",
    "no_text_encoder": "--no-text-encoder",
    "use_ema": "--no-ema",
    "quantize": "--quantize",
}
SPEED_OPTIONS = ("speed", "guidance_stops_at", "late_temperature", "prune", "stop_after")


@dataclass(frozen=True)
class Subject:
    """What a prompt of the command line is: the argument of a call, and entries of a picture's metadata."""

    argument: str | int | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Traits:
    """What distinguishes a family; `lacks` names arguments among FLAGS."""

    can: frozenset[Ability]
    lacks: frozenset[str]
    defaults: Mapping[str, Any]  # of a call, beside those of the checkpoint
    subject: Callable[[Any, str], Subject]  # of a pipeline and a prompt
    num_codes: Callable[[Any], int]  # of a pipeline's codebook
    modes: tuple[str, ...] = ("hybrid", "discrete")  # what of a picture its tokenizer can decode
    step: str = "scale"  # what a callback's Step is the end of


def _prompt(pipe: AnyPipeline, text: str) -> Subject:
    return Subject(text, {"prompt": text})


def _label(pipe: VarPipeline, text: str) -> Subject:
    """Find the class that a label means. Raises InputError."""
    index = pipe.labels.index(text)
    return Subject(index, {"class_index": index, "class_name": pipe.labels.name(index)})


def _autoencoder_codes(pipe: HartPipeline | VarPipeline) -> int:
    return pipe.autoencoder.config.vocab_size


def _tower_codes(pipe: VilaUPipeline) -> int:
    return max(pipe.vision_tower.config.vocab_sizes)


DRAWS: frozenset[Ability] = frozenset({"draw pictures"})
TRAITS: dict[Family, Traits] = {
    "HART": Traits(
        can=DRAWS | {"edit pictures"},
        lacks=frozenset({"preset"}),
        defaults={"num_inference_steps": 8, "more_smooth": True},
        subject=_prompt,
        num_codes=_autoencoder_codes,
    ),
    "VAR": Traits(
        can=DRAWS | {"edit pictures"},
        lacks=frozenset(FLAGS) - {"preset", "more_smooth", "quantize", *SPEED_OPTIONS},
        defaults={"more_smooth": False},
        subject=_label,
        num_codes=_autoencoder_codes,
    ),
    "VILA-U": Traits(
        can=DRAWS | {"draw videos", "answer questions"},
        lacks=frozenset(FLAGS) - {"negative_prompt", "quantize"},
        defaults={},
        subject=_prompt,
        num_codes=_tower_codes,
        modes=("discrete",),
        step="row",
    ),
}


def family_of(model: ModelOptions, given: set[str] | None = None, *, ability: Ability | None = None) -> Family:
    """Find the family of a model from its files.

    Raises UsageError for a family without the `ability`, and for options that it lacks, among the model's and those that give
    the arguments `given`; HartError if there is no such model.
    """
    from ..checkpoints.families import RELEASED, find_family

    family = find_family(model.name, model.hub)
    if ability is not None and ability not in TRAITS[family].can:
        able = [f"{name}'s ({RELEASED[name]})" for name, traits in TRAITS.items() if ability in traits.can]
        raise UsageError(f"{model.name} is a {family} model, which does not {ability}; take one of {' or '.join(able)}.")
    refused = (model.given() | (given or set())) & TRAITS[family].lacks
    if refused:
        flags = " or ".join(flag for name, flag in FLAGS.items() if name in refused)
        raise UsageError(f"{model.name} is a {family} model, which does not take {flags}; leave {_them(refused)} out.")
    return family


def _them(things: Collection[Any]) -> str:
    return "it" if len(things) == 1 else "them"
