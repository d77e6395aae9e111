"""Add the options that subcommands share, parse their values, and collect them."""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.hub import HubOptions
from ..checkpoints.layouts import BUNDLED_MODEL, BUNDLED_VAR
from ..errors import InputError
from ..pipelines.checks import check_float, check_int, check_size, check_steps
from .console import UsageError
from .machine import DTYPES

VILA_U = "mit-han-lab/vila-u-7b-256"
Commands = Any  # argparse keeps the type of add_subparsers' result private


@dataclass(frozen=True)
class ModelOptions:
    """The checkpoint, and which of its weights to load."""

    model: str | None  # None is the bundled model
    revision: str | None
    local_files_only: bool
    variant: str | None
    use_ema: bool
    text_encoder: str | None
    quantize: str | None = None

    @staticmethod
    def of(args: argparse.Namespace) -> ModelOptions:
        """Read the options of `add_model`, or of `add_source` and a positional model."""
        return ModelOptions(
            args.model,
            args.revision,
            args.local_files_only,
            args.variant,
            args.use_ema,
            getattr(args, "text_encoder", None),
            getattr(args, "quantize", None),
        )

    @property
    def name(self) -> str:
        """The folder or id to load."""
        return self.model or BUNDLED_MODEL

    @property
    def hub(self) -> HubOptions:
        """The options of requests to the Hub."""
        return HubOptions(self.revision, local_files_only=self.local_files_only)

    def given(self) -> set[str]:
        """Return those arguments of `from_pretrained` which not every family has and the command line gives."""
        values = {"text_encoder": self.text_encoder, "use_ema": not self.use_ema, "quantize": self.quantize}
        return {name for name, value in values.items() if value}


@dataclass(frozen=True)
class MachineOptions:
    """Device, dtype and threads; None: chosen."""

    device: str | None
    dtype: str | None
    threads: int | None

    @staticmethod
    def of(args: argparse.Namespace) -> MachineOptions:
        """Read the options of `add_machine`."""
        return MachineOptions(args.device, args.dtype, args.threads)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and model ids in one piece."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **settings})

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def add_command(commands: Commands, name: str, *, usage: str, summary: str, details: str = "", epilog: str = "") -> Any:
    """Add a subcommand with the options that every subcommand has; return its parser."""
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n\n{details}".strip(),
        epilog=epilog,
        formatter_class=HelpFormatter,
        usage=f"%(prog)s {usage}",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what the library logs")
    return parser


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes on stderr, only errors")


def add_json(parser: Any, what: str) -> None:
    """Add --json, which prints `what`."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def add_model(parser: argparse.ArgumentParser) -> Any:
    """Add --model and the options of `add_source`; return their group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="PATH|ID",
        type=named,
        help=f"checkpoint folder or Hugging Face id (default: {BUNDLED_MODEL}; it and {BUNDLED_VAR} are in the package)",
    )
    add_source(group)
    return group


def add_vila_u_model(parser: argparse.ArgumentParser) -> None:
    """Add --model, which has to be given, and the options of `add_source` that such a model takes."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="PATH|ID",
        type=named,
        required=True,
        help=f"VILA-U's checkpoint folder or Hugging Face id, such as {VILA_U}",
    )
    _add_files(group)
    parser.set_defaults(use_ema=True)


def add_source(group: Any) -> None:
    """Add --variant, --revision, --local-files-only and --no-ema."""
    _add_files(group)
    group.add_argument(
        "--no-ema",
        dest="use_ema",
        action="store_false",
        help="HART: the plain weights instead of their running average",
    )


def _add_files(group: Any) -> None:
    group.add_argument(
        "--variant",
        metavar="NAME",
        help="which of several weights: d16 for VAR's var_d16.pth, fp16 for model.fp16.safetensors",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--local-files-only", action="store_true", help="download nothing, use what is on this machine")


def add_text_encoder(group: Any) -> None:
    """Add --text-encoder."""
    group.add_argument(
        "--text-encoder",
        metavar="PATH|ID",
        type=named,
        help="HART: text encoder's folder or id (default: the one beside the checkpoint, else the released one)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add --device, --dtype, --threads and --quantize."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, mps or cpu (default: the first there is)")
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format (default: bf16 on CUDA, else as stored; see doctor)",
    )
    group.add_argument(
        "--quantize",
        choices=["int8", "int8_weight_only"],
        help="approximate: int8 is faster on CPUs (HART, VAR), int8_weight_only keeps weights in half the memory",
    )
    group.add_argument(
        "--threads", metavar="N", type=whole(1, 4096), help="CPU threads (default: PyTorch's; 1 for a small model)"
    )


def public_name(path_or_id: str) -> str:
    """Return the id, or the folder's name without its path: metadata is public."""
    if os.path.exists(path_or_id):
        return os.path.basename(os.path.realpath(path_or_id))
    return path_or_id


def side(size: int | None, sizes: Sequence[int]) -> int:
    """Return --size, or the largest of a model's `sizes`. Raises UsageError for a size that the model lacks."""
    try:
        check_size(size, sizes, "--size")
    except InputError as error:
        raise UsageError(str(error)) from error
    return size or max(sizes)


# argparse's types; each makes a check that a pipeline's call makes too.


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`, which raises ArgumentTypeError."""

    def parse(text: str) -> int:
        return _checked(lambda: check_int(_number(int, text), "", low, high))

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of finite numbers from `low` to `high`, which raises ArgumentTypeError."""

    def parse(text: str) -> float:
        return _checked(lambda: check_float(_number(float, text), "", low, high))

    return parse


def steps(text: str) -> int:
    """Parse a number of residual diffusion steps. Raises ArgumentTypeError."""
    return _checked(lambda: check_steps(_number(int, text), ""))


def named(text: str) -> str:
    """Return a non-empty path or id of a model. Raises ArgumentTypeError."""
    return _filled(text, "a folder or an id (owner/name)")


def picture(text: str) -> str:
    """Return a non-empty path of a picture. Raises ArgumentTypeError."""
    return _filled(text, "a picture's file")


def _filled(text: str, wanted: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"it is empty; give {wanted}")
    return text


def _checked(check: Callable[[], Any]) -> Any:
    """Return the checked value; turn InputError into ArgumentTypeError with the same sentence."""
    try:
        return check()
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).strip(" .")) from error


def _number(kind: Callable[[str], Any], text: str) -> Any:
    """Parse a finite number; return the text on failure, which the check then refuses."""
    try:
        value = kind(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value
