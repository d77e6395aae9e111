"""What one step of the residual diffusion does once the network has spoken."""

from __future__ import annotations

from torch import Tensor

from .logits import guide
from .registry import Backend, op


@op(triton=Backend("..kernels.diffusion_step:diffusion_step"))
def diffusion_step(
    x: Tensor,
    eps: Tensor,
    variance: Tensor,
    noise: Tensor,
    *,
    guidance: float,
    x0_from_x: float,
    x0_from_noise: float,
    mean_from_x0: float,
    mean_from_x: float,
    log_variance_min: float,
    log_variance_max: float,
    adds_noise: bool,
) -> Tensor:
    """x_t -> x_{t-1}, both [N, C] fp32: the posterior mean and, if the step `adds_noise`, `noise` [N, C] of the right size.

    `eps` and `variance` are the network's, [N, C], or [2N, C] with the unconditional half behind: guidance acts on eps, the
    variance is the conditional half's own. The constants are a `DiffusionStep`'s.
    """
    if len(eps) > len(x):
        eps, variance = guide(eps, guidance), variance[: len(x)]
    x0 = (x0_from_x * x - x0_from_noise * eps).clamp_(-1, 1)
    mean = mean_from_x0 * x0 + mean_from_x * x
    if not adds_noise:
        return mean
    share = (variance + 1) / 2
    log_variance = share * log_variance_max + (1 - share) * log_variance_min
    return mean + (0.5 * log_variance).exp() * noise
