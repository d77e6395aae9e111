"""Load the pipeline that the options ask for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoints.layouts import BUNDLED_MODEL, RELEASED_MODEL
from .console import note
from .families import TRAITS, AnyPipeline
from .machine import choose
from .options import MachineOptions, ModelOptions

if TYPE_CHECKING:
    from ..checkpoints.families import Family


def load_pipeline(
    family: Family,
    model: ModelOptions,
    machine: MachineOptions,
    *,
    text_encoder: str | Literal[False] | None,
    quiet: bool,
) -> AnyPipeline:
    """Load the pipeline on its device and in its dtype; without `quiet`, with notes on stderr. Raises HartError."""
    from ..engine.packed import packing_refusal
    from ..pipelines.next_scale import NextScalePipeline

    choice = choose(machine.device, machine.dtype)
    if quiet:
        silence_others()
    else:
        note(f"loading {model.name}{f' ({model.variant})' if model.variant else ''} on {choice.device} in {choice.dtype}")
    options = {
        "text_encoder": text_encoder,
        "use_ema": model.use_ema,
        "variant": model.variant,
        "quantize": model.quantize,
        "revision": model.revision,
        "local_files_only": model.local_files_only,
        "dtype": choice.torch_dtype,
        "device": choice.device,
    }
    taken = {name: value for name, value in options.items() if name not in TRAITS[family].lacks}
    pipe: AnyPipeline = _pipelines()[family].from_pretrained(model.name, **taken)
    if isinstance(pipe, NextScalePipeline) and packing_refusal(pipe.device, pipe.dtype) is None:
        pipe.enable_packed_weights()
    if machine.threads is not None:
        pipe.num_threads = machine.threads
    if quiet or sys.stderr is None:
        pipe.set_progress_bar_config(disable=True)
    if not quiet and model.model is None:
        drawn = f"{BUNDLED_MODEL} draws emoji at {max(pipe.sizes)} px"
        note(f"{drawn}; for other subjects, at 1024 px, use -m {RELEASED_MODEL} (a download)")
    return pipe


def _pipelines() -> dict[Family, Any]:
    """Return the class that loads each family; imports torch."""
    from ..pipelines.hart import HartPipeline
    from ..pipelines.var import VarPipeline
    from ..pipelines.vila_u import VilaUPipeline

    return {"HART": HartPipeline, "VAR": VarPipeline, "VILA-U": VilaUPipeline}


def silence_others() -> None:
    """Silence the progress bars of the library that downloads weights."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
