"""Define the model's operations as plain PyTorch functions, each the specification of the kernels that may replace it."""

from .attention import attention, causal_attention
from .diffusion_step import diffusion_step
from .exponential import exponential
from .gelu_tanh import gelu_tanh
from .group_norm_silu import group_norm_silu
from .guided_sample import guided_sample
from .int8_linear import int8_linear
from .layer_norm_modulate import gated_layer_norm_modulate, layer_norm_modulate
from .logits import drop_unlikely
from .normal_noise import normal_noise
from .products import conv2d, linear
from .rms_norm import add_rms_norm, rms_norm, rms_norm_modulate, rms_norm_quantized
from .rope_cache import rope_cache
from .settings import draw_settings as draw_settings
from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "causal_attention",
    "conv2d",
    "diffusion_step",
    "drop_unlikely",
    "exponential",
    "gated_layer_norm_modulate",
    "gelu_tanh",
    "group_norm_silu",
    "guided_sample",
    "int8_linear",
    "layer_norm_modulate",
    "linear",
    "normal_noise",
    "rms_norm",
    "rms_norm_modulate",
    "rms_norm_quantized",
    "rope_cache",
    "swiglu",
]
