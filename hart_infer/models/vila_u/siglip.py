"""SigLIP's vision encoder but for its last layer: pictures to hidden states (arXiv:2303.15343; `SiglipVisionModel`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ... import ops
from ..parts.checks import MAX_SIDE, require, require_positive
from ..parts.layers import Conv2d, GeluMLP, Linear

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The sizes of a SigLIP vision encoder, by the names in its `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # with the last one, which is neither built nor run
    num_attention_heads: int
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        """Refuse sizes that don't fit each other, or that nothing could hold."""
        require_positive(self, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=2**10, num_attention_heads=2**12)
        require_positive(self, image_size=2**14, patch_size=2**10)
        width, heads = self.hidden_size, self.num_attention_heads
        require(width % heads == 0, f"hidden_size {width} must split into num_attention_heads {heads}.")
        fits = 0 < self.grid <= MAX_SIDE
        require(fits, f"image_size {self.image_size} must hold 1 to {MAX_SIDE} patches of patch_size {self.patch_size} a side.")

    @property
    def grid(self) -> int:
        """Positions along a side of a picture; pixels that fill no patch are left out."""
        return self.image_size // self.patch_size


# The encoders of the released towers by their Hub ids, which `pretrained_model` of the tower's config.json names.
SIGLIP_CONFIGS = {
    "google/siglip-large-patch16-256": SiglipConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=256,
        patch_size=16,
    ),
    "google/siglip-so400m-patch14-384": SiglipConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
}


class SiglipAttention(nn.Module):
    """Attention of all positions to all, softmax scale d^-1/2; q, k and v in one matrix."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, d]
        # The kernel has never been timed at these shapes, so PyTorch's stays.
        return self.proj(ops.attention.reference(q, k, v, scale=q.shape[-1] ** -0.5))


class SiglipLayer(nn.Module):
    """x += attn(norm1(x)), then x += mlp(norm2(x))."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SiglipAttention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = GeluMLP(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SiglipEncoder(nn.Module):
    """Patches, learned positions, and all layers but the last; no class token, no norm at the end."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embed = Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embed = nn.Embedding(config.grid**2, config.hidden_size)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, size, size] in -1..1 -> hidden states [B, grid * grid, C], row by row, in the weights' dtype."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))  # [B, C, grid, grid]
        x: Tensor = patches.flatten(2).transpose(1, 2) + self.position_embed.weight
        for layer in self.layers:
            x = layer(x)
        return x
