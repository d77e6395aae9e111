"""Do one denoising step of the residual diffusion, given the network's output."""

from __future__ import annotations

from torch import Tensor

from .registry import Backend, op
from .settings import guide_by


@op(triton=Backend("..kernels.diffusion_step:diffusion_step"))
def diffusion_step(
    x: Tensor,
    eps: Tensor,
    variance: Tensor,
    noise: Tensor,
    settings: Tensor,
    *,
    x0_from_x: float,
    x0_from_noise: float,
    mean_from_x0: float,
    mean_from_x: float,
    log_variance_min: float,
    log_variance_max: float,
    adds_noise: bool,
) -> Tensor:
    """Compute x_{t-1} from `x`, x_t, both [N, C] fp32: the posterior mean and, if `adds_noise`, scaled `noise` [N, C].

    `eps` and `variance` are the network's outputs, [N, C], or [2N, C] with the unconditional half last: guidance, the first
    two numbers of `settings` (`draw_settings`), acts on eps, and the variance is the conditional half's. `variance` (-1 to 1)
    interpolates the log variance between its limits. The constants are those of a `DiffusionStep`.
    """
    if len(eps) > len(x):
        eps, variance = guide_by(eps, settings), variance[: len(x)]
    x0 = (x0_from_x * x - x0_from_noise * eps).clamp_(-1, 1)
    mean = mean_from_x0 * x0 + mean_from_x * x
    if not adds_noise:
        return mean
    share = (variance + 1) / 2
    log_variance = share * log_variance_max + (1 - share) * log_variance_min
    return mean + (0.5 * log_variance).exp() * noise
