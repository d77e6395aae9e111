"""Small layers shared by the transformer and the residual diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.precision import widens


class RMSNorm(nn.Module):
    """RMS norm with a learned weight (released `LlamaRMSNorm`, named `ln_wo_grad` there although it has one)."""

    def __init__(self, width: int, eps: float) -> None:
        """`width` is the size of the last dimension."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], dtype kept."""
        return ops.rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + update, its norm), [..., width] each; of x alone where there is no update."""
        return (x, self(x)) if update is None else ops.add_rms_norm(x, update, self.weight, self.eps)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift for x [R, L, width], scale and shift [R, 1, width]."""
        return ops.rms_norm_modulate(x, self.weight, scale, shift, self.eps)

    def modulated_after(self, x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + gate * update and its modulated norm: x, update [R, L, width], gate, scale, shift [R, 1, width].

        In several passes: no kernel does it in one.
        """
        x = x + gate * update
        return x, self.modulated(x, scale, shift)


class LayerNorm(nn.Module):
    """Layer norm without learned parameters; blocks scale and shift it by their condition (released VAR `ln_wo_grad`)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return norm(x) * (1 + scale) + shift for x [R, L, width], scale and shift [R, 1, width]."""
        return ops.layer_norm_modulate(x, None, None, scale, shift, self.eps)

    def modulated_after(self, x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + gate * update and its modulated norm, in one pass: shapes as in RMSNorm."""
        return ops.gated_layer_norm_modulate(x, update, gate, None, None, scale, shift, self.eps)


class Linear(nn.Linear):
    """`nn.Linear` through `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves weights on the meta device alone: drawing them there imports a compiler, 150 MB."""

    def reset_parameters(self) -> None:
        """Draw the weights, unless they are on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv2d(nn.Conv2d):
    """A square convolution with bias, through `ops.conv2d`."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0) -> None:
        """No dilation, no groups."""
        super().__init__(channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, out_channels, h', w']."""
        assert self.bias is not None
        return ops.conv2d(x, self.weight, self.bias, stride=self.stride[0], padding=int(self.padding[0]))


MANY_ROWS = 16  # from so many rows on CPU BLAS takes one path, and rounds alike


class SteadyLinear(Linear):
    """A linear map of few rows that rounds on a CPU as the released code's does.

    CPU BLAS takes another path for few rows, and the low temperature 1 / tau amplifies the difference from scale to scale.
    So rows are repeated up to the released code's number: two for each (`halves`), else at least MANY_ROWS in all.
    """

    def __init__(self, in_features: int, out_features: int, *, halves: bool = False) -> None:
        """`halves`: the released code has one row per guidance half here, so two for an image."""
        super().__init__(in_features, out_features)
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if x.device.type != "cpu" or (not self.halves and len(rows) >= MANY_ROWS):
            return super().forward(x)
        if self.halves:
            out = torch.cat([super(SteadyLinear, self).forward(row.expand(2, -1))[:1] for row in rows])
        else:
            out = super().forward(rows.repeat(-(-MANY_ROWS // len(rows)), 1))[: len(rows)]
        return out.view(*x.shape[:-1], -1)


def sinusoid(positions: Tensor, width: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [N, width] fp32 of `positions` [N]: cosines first, then sines."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = positions[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SinusoidEmbedding(nn.Module):
    """A number embedded by a sinusoid and a two-layer MLP (released `TimestepEmbedder`): scale levels, diffusion steps."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        """`width` is the size of the embedding, `frequencies` that of the sinusoid."""
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = SteadyLinear(frequencies, width)
        self.fc2 = SteadyLinear(width, width)

    def forward(self, positions: Tensor) -> Tensor:
        """[N] -> [N, width] in the weights' dtype."""
        features = sinusoid(positions, self.frequencies).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(features)))


CHUNK = 1024  # rows


def in_chunks(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `layer`, which maps every row by itself, to x [..., in] -> [..., out]: on a CPU to CHUNK rows at a time.

    What it computes in between then stays in the caches, and no large memory is mapped for it and given back: an MLP of 8,192
    rows by 1,536 and 4,096 in bf16 ran at 802 instead of 711 GFLOP/s (two cores of an AMD EPYC with AVX512_BF16). Not where
    products are widened, since each chunk would widen the weights again.
    """
    if x.device.type != "cpu" or x.numel() <= CHUNK * x.shape[-1] or torch.compiler.is_compiling() or widens(x, "linear"):
        return layer(x)
    out = torch.cat([layer(rows) for rows in x.reshape(-1, x.shape[-1]).split(CHUNK)])
    return out.view(*x.shape[:-1], -1)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), no biases (released `LlamaMLP`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return in_chunks(lambda rows: self.down(ops.swiglu(self.gate(rows), self.up(rows))), x)


class GeluMLP(nn.Module):
    """fc2(gelu_tanh(fc1 x)) (released `FFN`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return in_chunks(lambda rows: self.fc2(ops.gelu_tanh(self.fc1(rows))), x)
