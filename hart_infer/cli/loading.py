"""Load the pipeline that the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..checkpoints.layouts import BUNDLED_MODEL, RELEASED_MODEL
from .console import note
from .machine import choose
from .options import MachineOptions, ModelOptions

if TYPE_CHECKING:
    from ..pipelines.hart import HartPipeline


def load_pipeline(
    model: ModelOptions, machine: MachineOptions, *, text_encoder: str | Literal[False] | None, quiet: bool
) -> HartPipeline:
    """Load the pipeline on its device and in its dtype; without `quiet`, with notes on stderr. Raises HartError."""
    from ..pipelines.hart import HartPipeline

    choice = choose(machine.device, machine.dtype)
    name = model.model or BUNDLED_MODEL
    if quiet:
        silence_others()
    else:
        note(f"loading {name} on {choice.device} in {choice.dtype}")
    pipe = HartPipeline.from_pretrained(
        name,
        text_encoder=text_encoder,
        revision=model.revision,
        local_files_only=model.local_files_only,
        use_ema=model.use_ema,
        dtype=choice.torch_dtype,
        device=choice.device,
    )
    if machine.threads is not None:
        pipe.num_threads = machine.threads
    if quiet:
        pipe.set_progress_bar_config(disable=True)
    elif model.model is None:
        drawn = f"{BUNDLED_MODEL} draws emoji at {max(pipe.sizes)} px"
        note(f"{drawn}; for other subjects, at 1024 px, use -m {RELEASED_MODEL} (a download)")
    return pipe


def silence_others() -> None:
    """Silence the progress bars and warnings of the libraries that load weights."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
