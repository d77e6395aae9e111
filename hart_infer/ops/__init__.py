"""The operations that kernels may replace, each a plain PyTorch function whose body is its specification."""

from .attention import attention
from .rms_norm import rms_norm
from .rope import rope

__all__ = ["attention", "rms_norm", "rope"]
