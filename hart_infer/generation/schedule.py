"""The schedule of next-scale prediction: one `Stage` per scale; what differs between scales is a field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..models.parts.quantizer import phi_index
from .pruning import EveryToken, Pass

HART_TOP_K = (600, 300)  # of scales 0 to 6, and from 7 on (released `autoregressive_infer_cfg`)
HART_TOP_K_CHANGES_AT = 7
VAR_TOP_K = 900


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A caller's settings of the sampling."""

    guidance_scale: float = 4.5  # at the last scale; 0 is none
    num_inference_steps: int = 8  # of the residual diffusion; 0 leaves it out (the released `final_stage=1`)
    residual_temperature: float = 1.0  # scales the noise of its steps; 0 adds none after the start
    top_k: int | None = None  # None is the released schedule; 0 keeps all codes
    top_p: float = 0.0  # 0 is off
    more_smooth: bool = True  # feed on Gumbel-softmax mixtures of codes instead of drawn codes


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One scale: its input, its sampling, its update of f_hat."""

    index: int
    side: int  # of its grid of codes
    length: int  # tokens whose keys it adds: the context's at HART's scale 0, else side * side, or what pruning keeps of them
    offset: int = 0  # position in the key/value cache of its first token
    prefilled: bool = False  # its hidden states come from the prefill of the condition
    cached: bool = True  # later scales attend to it
    ends_cache: bool = False  # nothing attends to the cache after it
    guided: bool  # its logits need the unconditional half
    guidance: float  # t: logits = (1 + t) conditional - t unconditional
    progress: float  # r = index / last, from 0 to 1: raises logit_gain and lowers temperature
    top_k: int  # 0 keeps all codes
    top_p: float  # 0 is off
    more_smooth: bool
    logit_temperature: float = 1.0  # divides the logits; other than 1 where a fast mode took the guidance away
    phi: int | None  # which of the shared residual convolutions refines its codes; None for none
    num_inference_steps: int = 0  # of the residual diffusion behind it; 0 for none
    residual_temperature: float = 1.0  # scales the noise that these steps add
    run: Pass = EveryToken()  # how its tokens go through the blocks

    @property
    def tokens(self) -> int:
        """Codes that this scale predicts: side * side."""
        return self.side * self.side

    @property
    def logit_gain(self) -> float:
        """Factor 1 + r on the logits in the Gumbel mixture."""
        return 1.0 + self.progress

    @property
    def temperature(self) -> float:
        """Temperature tau of the Gumbel mixture. The released lower bound 0.005 never applies: at r = 1 tau is 0.0135."""
        return 0.27 * (1.0 - self.progress * 0.95)


@dataclass(frozen=True)
class Schedule:
    """The stages of one generation, in order, and the side P of the latent that they fill."""

    stages: tuple[Stage, ...]
    latent_side: int

    def __len__(self) -> int:
        """Number of scales."""
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        """The stages in order."""
        return iter(self.stages)

    @property
    def guided(self) -> bool:
        """Whether any scale needs the unconditional half."""
        return any(stage.guided for stage in self.stages)

    @property
    def cached_length(self) -> int:
        """Positions that the key/value cache keeps."""
        return sum(stage.length for stage in self.stages if stage.cached)

    @property
    def scratch_length(self) -> int:
        """Largest length that a scale which is not cached attends to; 0 if all are cached."""
        return max((stage.offset + stage.length for stage in self.stages if not stage.cached), default=0)

    def remembered_vectors(self, depth: int) -> int:
        """How many vectors [D] a row's memory for pruning has, in a model of `depth` blocks."""
        return max((stage.run.num_updates(depth) * stage.tokens for stage in self.stages), default=0)


def placed(stages: Sequence[Stage], latent_side: int) -> Schedule:
    """Set each stage's offset in the cache, mark the last one; return the Schedule."""
    result, offset = [], 0
    for index, stage in enumerate(stages):
        result.append(replace(stage, offset=offset, ends_cache=index == len(stages) - 1))
        offset += stage.length if stage.cached else 0
    return Schedule(tuple(result), latent_side)


def hart_schedule(
    patch_nums: Sequence[int], *, context_tokens: int, share_quant_resi: int, settings: Settings | None = None
) -> Schedule:
    """Return HART's schedule: scale 0 takes the context of `context_tokens` tokens, the last is not cached and not refined.

    As released, the last scale reuses the previous one's progress r, and so its guidance and temperature.
    """
    settings = settings or Settings()
    last = len(patch_nums) - 1
    stages = []
    for index, side in enumerate(patch_nums):
        progress = min(index, last - 1) / last
        guidance = settings.guidance_scale * progress
        stages.append(
            Stage(
                index=index,
                side=side,
                length=side * side if index else context_tokens,
                prefilled=index == 0,
                cached=index < last,
                guided=guidance > 0,
                guidance=guidance,
                progress=progress,
                top_k=HART_TOP_K[index >= HART_TOP_K_CHANGES_AT] if settings.top_k is None else settings.top_k,
                top_p=settings.top_p,
                more_smooth=settings.more_smooth,
                phi=phi_index(index, len(patch_nums), share_quant_resi) if index < last else None,
                num_inference_steps=0 if index < last else settings.num_inference_steps,
                residual_temperature=settings.residual_temperature,
            )
        )
    return placed(stages, patch_nums[-1])


def var_schedule(patch_nums: Sequence[int], *, share_quant_resi: int, settings: Settings) -> Schedule:
    """Return VAR's schedule: scale 0 takes one token, guidance reaches its full strength at the last scale, all are refined."""
    last = len(patch_nums) - 1
    stages = [
        Stage(
            index=index,
            side=side,
            length=side * side,
            prefilled=index == 0,
            guided=settings.guidance_scale * index > 0,
            guidance=settings.guidance_scale * (index / last),
            progress=index / last,
            top_k=VAR_TOP_K if settings.top_k is None else settings.top_k,
            top_p=settings.top_p,
            more_smooth=settings.more_smooth,
            phi=phi_index(index, len(patch_nums), share_quant_resi),
        )
        for index, side in enumerate(patch_nums)
    ]
    return placed(stages, patch_nums[-1])
