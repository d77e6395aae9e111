"""Add the sampling options, and complete them by the family's and the checkpoint's defaults."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..generation.speed import SPEEDS, Knobs, Prune, SpeedName
from ..pipelines.checks import LATE_TEMPERATURES, MAX_GUIDANCE, MAX_SEED
from . import options
from .console import UsageError
from .families import SPEED_OPTIONS, TRAITS, AnyPipeline

if TYPE_CHECKING:
    from ..checkpoints.families import Family

PRESETS = ("fid",)  # of pipelines/var.py
KNOBS = frozenset(field.name for field in fields(Knobs))
GUIDANCE_SCALE: dict[str, Any] = {"metavar": "X", "type": options.number(0, MAX_GUIDANCE)}
TOP_K: dict[str, Any] = {"metavar": "K", "type": options.whole(0)}
TOP_P: dict[str, Any] = {"metavar": "P", "type": options.number(0, 1)}


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling arguments of the pipeline's call, and the preset that some of them come from; None: not given."""

    size: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    residual_temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    more_smooth: bool | None = None
    negative_prompt: str | None = None
    use_system_prompt: bool | None = None
    preset: str | None = None
    speed: SpeedName | None = None
    guidance_stops_at: int | None = None
    late_temperature: float | None = None
    prune: Prune | None = None
    stop_after: int | None = None

    @staticmethod
    def of(args: argparse.Namespace) -> SamplingOptions:
        """Read the options of `add_sampling` or `add_video_sampling`."""
        return SamplingOptions(
            size=args.size,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.steps,
            residual_temperature=args.residual_temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            more_smooth=args.more_smooth,
            negative_prompt=args.negative_prompt,
            use_system_prompt=args.use_system_prompt,
            preset=args.preset,
            speed=args.speed,
            guidance_stops_at=args.guidance_stops_at,
            late_temperature=args.late_temperature,
            prune=args.prune,
            stop_after=args.stop_after,
        )

    def given(self) -> dict[str, Any]:
        """Return what the command line gives, by argument."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def completed(self, family: Family, pipe: AnyPipeline) -> dict[str, Any]:
        """Return all sampling arguments of a call: what is given, else the preset's, else the defaults.

        The knobs of a speed are among them instead of its name.
        """
        names = [name for name in asdict(self) if name not in {"preset", "speed"} | TRAITS[family].lacks]
        chosen = {**TRAITS[family].defaults, **asdict(pipe.defaults), **self._preset()}
        if chosen.get("top_k") is not None:  # a small codebook has fewer codes
            chosen["top_k"] = min(chosen["top_k"], TRAITS[family].num_codes(pipe))
        chosen |= self.given()
        if "speed" not in TRAITS[family].lacks:
            chosen |= dict.fromkeys(SPEED_OPTIONS) | self._knobs(pipe)
        return {name: chosen.get(name) for name in names}

    def speed_name(self, family: Family, pipe: AnyPipeline) -> str | None:
        """Return the name of the speed, for metadata; None where an option changes what it means, or there are no speeds."""
        if "speed" in TRAITS[family].lacks:
            return None
        speed = self.speed or "exact"
        chosen, own = (options.completed(family, pipe) for options in (self, SamplingOptions(speed=speed)))
        return speed if all(chosen.get(name) == own.get(name) for name in KNOBS) else None

    def _knobs(self, pipe: Any) -> dict[str, Any]:
        """Return the set knobs of the speed and the options, as JSON has them. Raises UsageError."""
        given = {name: value for name, value in self.given().items() if name in KNOBS}
        try:
            knobs: dict[str, Any] = pipe.knobs(self.speed or "exact", **given).given()
        except InputError as error:
            raise UsageError(str(error)) from error
        return knobs | ({"prune": knobs["prune"].to_dict()} if "prune" in knobs else {})

    def _preset(self) -> dict[str, Any]:
        if self.preset is None:
            return {}
        from ..pipelines.var import PRESETS

        return PRESETS[self.preset]


def add_sampling(parser: argparse.ArgumentParser, seed: str = "seed of the first picture (default: random)") -> None:
    """Add the options of pictures: sampling, the batch size and the seed, whose help is `seed`."""
    add = _group(parser).add_argument
    add("-s", "--seed", type=options.whole(0, MAX_SEED), help=seed)
    add("--size", metavar="PIXELS", type=options.whole(1), help="side of the picture (default: largest)")
    add("--guidance-scale", **GUIDANCE_SCALE, help="guidance strength (HART 4.5, VAR 4, VILA-U 3, whose 1 is none)")
    add("--top-k", **TOP_K, help="codes kept, 0 for all (HART 600, then 300 from scale 7; VAR and VILA-U 900)")
    add("--top-p", **TOP_P, help="probability kept, 0 for all (HART 0, VAR 0.95, VILA-U 0.96)")
    add(
        "--smooth",
        dest="more_smooth",
        action=argparse.BooleanOptionalAction,
        help="next input: mixtures of codes (HART), or the drawn codes (VAR)",
    )
    add("--steps", metavar="N", type=options.steps, help="HART: residual diffusion steps, 0 for none (8)")
    add(
        "--residual-temperature",
        metavar="X",
        type=options.number(0, 1),
        help="HART: scales the noise of the residual steps, 0 for none (1)",
    )
    add("--negative-prompt", metavar="TEXT", help="HART, VILA-U: what to steer away from")
    add(
        "--no-system-prompt",
        dest="use_system_prompt",
        action="store_false",
        default=None,
        help="HART: leave the system prompt out",
    )
    add("--preset", choices=PRESETS, help="VAR: the paper's settings for FID: guidance 1.5, top-k 900, top-p 0.96, no smooth")
    add("--batch-size", metavar="N", type=options.whole(1), default=1, help="pictures at a time (1)")
    _add_speed(parser)


def _add_speed(parser: argparse.ArgumentParser) -> None:
    """Add --speed and its knobs."""
    group = parser.add_argument_group(
        "speed",
        "HART and VAR: compute less on the late scales, which changes the picture. SIDE\n"
        "names a scale (`hart-infer info MODEL` lists them); a knob replaces --speed's own.",
    )
    add = group.add_argument
    add("--speed", choices=tuple(SPEEDS), help="a named mode: exact (the default), fast, turbo or draft")
    add("--guidance-stops-at", metavar="SIDE", type=options.whole(1), help="the first scale without guidance")
    add("--late-temperature", metavar="X", type=options.number(*LATE_TEMPERATURES), help="divides the logits of those scales")
    prune = group.add_mutually_exclusive_group()
    shares = "SIDE:SHARE,..."
    prune.add_argument("--prune", metavar=shares, type=_prune, help="leave out shares of a late scale's tokens: 48:0.5,64:0.75")
    prune.add_argument(
        "--prune-once",
        metavar=shares,
        dest="prune",
        type=_prune_once,
        help="the same, by one choice a scale instead of one a sublayer",
    )
    add("--stop-after", metavar="SIDE", type=options.whole(1), help="the last scale that is run")


def _prune(text: str, *, once: bool = False) -> Prune:
    """Parse the value of --prune. Raises ArgumentTypeError."""
    pairs = [part.strip().partition(":") for part in text.split(",")]
    if not all(colon for _, colon, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sides and shares; 48:0.5,64:0.75 is one")
    at = tuple(options.whole(1)(side) for side, _, _ in pairs)
    try:
        return Prune(at=at, drop=tuple(options.number(0, 1)(share) for _, _, share in pairs), once=once)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).strip(" .")) from error


def _prune_once(text: str) -> Prune:
    """Parse the value of --prune-once. Raises ArgumentTypeError."""
    return _prune(text, once=True)


def add_video_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of videos; those that only pictures have are set as if not given."""
    add = _group(parser).add_argument
    add("-s", "--seed", type=options.whole(0, MAX_SEED), help="seed of the first video (default: random)")
    add("--guidance-scale", **GUIDANCE_SCALE, help="guidance strength, 1 for none (3)")
    add("--top-k", **TOP_K, help="codes kept, 0 for all (900)")
    add("--top-p", **TOP_P, help="probability kept, 0 for all (0.96)")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--batch-size", metavar="N", type=options.whole(1), default=1, help="videos at a time (1)")
    parser.set_defaults(size=None, more_smooth=None, steps=None, residual_temperature=None, use_system_prompt=None, preset=None)
    parser.set_defaults(**dict.fromkeys(SPEED_OPTIONS))


def _group(parser: argparse.ArgumentParser) -> Any:
    return parser.add_argument_group("sampling", "Defaults are the checkpoint's; in brackets those of the released ones.")
