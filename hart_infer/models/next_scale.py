"""The transformer of next-scale prediction, which HART and VAR are (HART: paper section 3.2, released `HARTForT2I`).

It maps the embedded tokens of one scale, given the cached keys and values of the scales before, to hidden states; the
head maps those to logits over the codebook. The loop over the scales is `generation/next_scale.py`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .parts.attention import Attention
from .parts.cache import Place
from .parts.diffusion import ResidualDiffusion
from .parts.layers import LayerNorm, Linear, RMSNorm, SteadyLinear
from .parts.modulation import LinearModulation, Modulation
from .parts.rope import Table


@dataclass(frozen=True)
class Condition:
    """Input of a next-scale model, made from prompts or classes: R rows."""

    inputs: Tensor  # [R, L, D]: the tokens of scale 0, embedded
    table: Table  # their rotary angles
    modulation: Modulation
    last_position: Tensor  # [R] int64: added to the positions of the image tokens
    copies: int = 1  # so many consecutive rows are the same: repeated to round as SteadyLinear says


class Update(NamedTuple):
    """What a sublayer adds to its input: value [R, L, D], times gate [R, 1, D] where it is gated."""

    value: Tensor
    gate: Tensor | None = None

    def added_to(self, x: Tensor) -> Tensor:
        """Return the sum [R, L, D]."""
        return x + (self.value if self.gate is None else self.gate * self.value)


class Block(nn.Module, ABC):
    """Attention and MLP, each after the same norm (released `AdaLNSelfAttn`)."""

    def __init__(self, norm: nn.Module, attn: Attention, mlp: nn.Module, modulation: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp, self.modulation = norm, attn, mlp, modulation

    @abstractmethod
    def forward(
        self, x: Tensor, update: Update | None, vectors: Tensor, table: Table, place: Place, layer: int
    ) -> tuple[Tensor, Update]:
        """Run the block on x [R, L, D], to which `update` is yet to be added; `vectors` [R, n, D] are those of `Modulation`.

        Returns the sum with attention's update, and the MLP's update, which is left to the next block: where its norm takes an
        update, the two are one pass.
        """

    @abstractmethod
    def attention_update(self, x: Tensor, vectors: Tensor, table: Table, place: Place, layer: int) -> Tensor:
        """Return what attention adds to x [R, L, D]."""

    @abstractmethod
    def mlp_update(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Return what the MLP adds to x [R, L, D], which has attention's update."""


class PlainBlock(Block):
    """A block without modulation."""

    norm: RMSNorm

    def forward(
        self, x: Tensor, update: Update | None, vectors: Tensor, table: Table, place: Place, layer: int
    ) -> tuple[Tensor, Update]:
        """As `Block`; `vectors` [R, 0, D] is empty."""
        assert update is None or update.gate is None, "a transformer's blocks are of one kind"
        x, normed = self.norm.after(x, None if update is None else update.value)
        x, normed = self.norm.after(x, self.attn(normed, table, place, layer))
        return x, Update(self.mlp(normed))

    def attention_update(self, x: Tensor, vectors: Tensor, table: Table, place: Place, layer: int) -> Tensor:
        """As `Block`."""
        update: Tensor = self.attn(self.norm(x), table, place, layer)
        return update

    def mlp_update(self, x: Tensor, vectors: Tensor) -> Tensor:
        """As `Block`."""
        update: Tensor = self.mlp(self.norm(x))
        return update


def _of_attention(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, scale and shift of attention, [R, 1, D] each, of a block's vectors [R, 6, D]."""
    gamma, _, scale, _, shift, _ = vectors[:, :, None].unbind(1)
    return gamma, scale, shift


def _of_mlp(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, scale and shift of the MLP, [R, 1, D] each, of a block's vectors [R, 6, D]."""
    _, gamma, _, scale, _, shift = vectors[:, :, None].unbind(1)
    return gamma, scale, shift


class ModulatedBlock(Block):
    """A block whose norms are scaled and shifted, and whose sublayers are gated."""

    norm: RMSNorm | LayerNorm

    def forward(
        self, x: Tensor, update: Update | None, vectors: Tensor, table: Table, place: Place, layer: int
    ) -> tuple[Tensor, Update]:
        """As `Block`; `vectors` [R, 6, D]."""
        gamma1, scale1, shift1 = _of_attention(vectors)
        gamma2, scale2, shift2 = _of_mlp(vectors)
        if update is None:
            normed = self.norm.modulated(x, scale1, shift1)
        else:
            assert update.gate is not None, "a transformer's blocks are of one kind"
            x, normed = self.norm.modulated_after(x, update.value, update.gate, scale1, shift1)
        x, normed = self.norm.modulated_after(x, self.attn(normed, table, place, layer), gamma1, scale2, shift2)
        return x, Update(self.mlp(normed), gamma2)

    def attention_update(self, x: Tensor, vectors: Tensor, table: Table, place: Place, layer: int) -> Tensor:
        """As `Block`."""
        gamma, scale, shift = _of_attention(vectors)
        update: Tensor = self.attn(self.norm.modulated(x, scale, shift), table, place, layer)
        return gamma * update

    def mlp_update(self, x: Tensor, vectors: Tensor) -> Tensor:
        """As `Block`."""
        gamma, scale, shift = _of_mlp(vectors)
        update: Tensor = self.mlp(self.norm.modulated(x, scale, shift))
        return gamma * update


class Head(nn.Module):
    """Logits over the codebook of V codes: adaptive norm in fp32, then a linear map (released `AdaLNBeforeHead`, `head`)."""

    def __init__(self, norm: RMSNorm | LayerNorm, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = LinearModulation(width, 2)
        self.linear = SteadyLinear(width, vocab_size)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """hidden [R, L, D], vectors [R, 2, D] -> logits [R, L, V] fp32."""
        scale, shift = vectors[:, :, None].unbind(1)
        normed = self.norm.modulated(hidden.float(), scale, shift)
        return self.linear(normed.to(self.linear.weight.dtype)).float()


class NextScaleTransformer(nn.Module, ABC):
    """Embeddings, blocks and head. Subclasses define the condition, the scales' embeddings and the positions."""

    def __init__(self, *, channels: int, blocks: Sequence[Block], head: Head) -> None:
        super().__init__()
        self.width = head.linear.in_features
        self.num_heads, self.head_dim = blocks[0].attn.num_heads, blocks[0].attn.head_dim
        self.depth = len(blocks)
        self.word_embed = Linear(channels, self.width)
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.word_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.word_embed.weight.device

    diffusion: ResidualDiffusion  # only of models whose schedules have num_inference_steps

    def residual_condition(self, hidden: Tensor, code_embeddings: Tensor) -> Tensor:
        """Return the residual diffusion's condition z [R, L, D] from hidden states [R, L, D] and drawn codes [B, L, C]."""
        raise NotImplementedError(f"{type(self).__name__} has no residual diffusion.")

    @abstractmethod
    def unconditional(self) -> Condition:
        """Make the condition of one unconditional row, the same for every call."""

    @abstractmethod
    def embed_scales(self) -> list[Tensor]:
        """Return what is added to the embedded tokens of every scale: [1, D] or [L, D] each."""

    @abstractmethod
    def image_tables(self, sides: Sequence[int], last_position: Tensor) -> list[Table]:
        """Return the rotary angles of every scale's side * side tokens, whose positions are shifted by `last_position` [R]."""

    def modulate(self, block_condition: Tensor, head_condition: Tensor) -> Modulation:
        """Compute the vectors of all adaptive norms from the blocks' and the head's condition, [R, D] each."""
        blocks = torch.stack([block.modulation(block_condition) for block in self.blocks])  # type: ignore[operator]
        return Modulation(blocks, self.head.modulation(head_condition))

    def embed_tokens(self, latent: Tensor, scale_embedding: Tensor) -> Tensor:
        """Embed a scale's input, latent [B, C, p, p] fp32 -> [B, p * p, D]; `scale_embedding` is its own of `embed_scales`."""
        tokens = latent.flatten(2).transpose(1, 2).to(self.dtype)
        return self.word_embed(tokens) + scale_embedding

    def forward(self, x: Tensor, modulation: Modulation, table: Table, place: Place) -> Tensor:
        """Run one scale through all blocks: x [R, L, D] -> hidden states [R, L, D]; keys and values go to `place`."""
        update: Update | None = None
        for layer, (block, vectors) in enumerate(self.layers(modulation)):
            x, update = block(x, update, vectors, table, place, layer)
        return x if update is None else update.added_to(x)

    def layers(self, modulation: Modulation) -> Iterator[tuple[Block, Tensor]]:
        """Yield the blocks with their vectors [R, n, D]."""
        return zip(self.blocks, modulation.blocks.unbind(0), strict=True)  # type: ignore[arg-type]
