"""The operations that kernels may replace, each a plain PyTorch function whose body is its specification."""

from .attention import attention
from .diffusion_step import diffusion_step
from .products import conv2d, linear
from .rms_norm import rms_norm
from .rope_cache import rope_cache
from .swiglu import swiglu

__all__ = ["attention", "conv2d", "diffusion_step", "linear", "rms_norm", "rope_cache", "swiglu"]
