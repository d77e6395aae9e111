"""The paper's next-scale schedule as data: one `Stage` per scale, every quirk a field that can be seen and tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_TOP_K = (600, 300)  # before scale 7, and from it on (released `autoregressive_infer_cfg`)
TOP_K_CHANGES_AT = 7
MIN_TEMPERATURE = 0.005


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One scale of the autoregression.

    `progress` is s / (S - 1), except at the last scale, where the released code leaves the one before's in place.
    """

    index: int
    side: int
    offset: int  # position in the key/value cache of its first token
    length: int  # tokens it feeds the transformer: the context's at scale 0, side * side after
    progress: float
    top_k: int
    phi: int | None  # which of the shared residual convolutions; none at the last scale
    is_last: bool

    @property
    def tokens(self) -> int:
        """Codes that this scale predicts: side * side."""
        return self.side * self.side

    @property
    def logit_gain(self) -> float:
        """Factor on the logits inside the Gumbel mixture."""
        return 1.0 + self.progress

    @property
    def temperature(self) -> float:
        """Temperature tau of the Gumbel mixture."""
        return max(0.27 * (1.0 - self.progress * 0.95), MIN_TEMPERATURE)

    def guidance(self, guidance_scale: float) -> float:
        """Guidance t of this scale: logits = (1 + t) conditional - t unconditional."""
        return guidance_scale * self.progress


def phi_index(index: int, num_scales: int, share_quant_resi: int) -> int:
    """Which of the K shared residual convolutions serves scale s: the tick nearest to s / (S - 1).

    The K ticks run evenly from a to 1 - a, with a = 1/(3K) where K is 4, else 1/(2K). Which of two equally near ticks wins
    is a matter of rounding, so the released expression is kept to the operation.
    """
    count = share_quant_resi or num_scales
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return int(np.argmin(np.abs(ticks - index / (num_scales - 1))))


def build_schedule(
    patch_nums: Sequence[int], *, context_tokens: int, share_quant_resi: int, top_k: int | None = None
) -> tuple[Stage, ...]:
    """The stages of a checkpoint. `top_k` replaces the released 600 / 300 at every scale; 0 keeps all codes."""
    num_scales = len(patch_nums)
    stages = []
    offset = 0
    for index, side in enumerate(patch_nums):
        is_last = index == num_scales - 1
        length = context_tokens if index == 0 else side * side
        stages.append(
            Stage(
                index=index,
                side=side,
                offset=offset,
                length=length,
                progress=(index - 1 if is_last else index) / (num_scales - 1),
                top_k=DEFAULT_TOP_K[index >= TOP_K_CHANGES_AT] if top_k is None else top_k,
                phi=None if is_last else phi_index(index, num_scales, share_quant_resi),
                is_last=is_last,
            )
        )
        offset += length
    return tuple(stages)
