"""How one scale goes through the transformer's blocks: with all its tokens, or pruned (FastVAR, arXiv:2503.23367).

A pruned scale computes some of its tokens. The others get what the blocks gave at an earlier scale, which `Memory` keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..models.next_scale import NextScaleTransformer
from ..models.parts.cache import CachePlace
from ..models.parts.modulation import Modulation
from ..models.parts.quantizer import area_resize
from ..models.parts.rope import Table


@dataclass(frozen=True)
class BlockInputs:
    """One scale's tokens on their way through the blocks, and where their keys and values go."""

    x: Tensor  # [R, L, D]
    modulation: Modulation
    table: Table  # rotary angles, [R, 1, L, d] each
    place: CachePlace

    def rows(self, own: slice) -> BlockInputs:
        """Return some consecutive rows alone."""
        cos, sin = self.table
        chosen = range(self.place.cache.keys.shape[1])[self.place.rows][own]
        place = replace(self.place, rows=slice(chosen.start, chosen.stop))
        return BlockInputs(self.x[own], self.modulation.rows(own), (cos[own], sin[own]), place)

    def at(self, chosen: Tensor) -> BlockInputs:
        """Return those at the places `chosen` [R, K] alone."""
        cos, sin = (_take(angles[:, 0], chosen)[:, None] for angles in self.table)
        return BlockInputs(_take(self.x, chosen), self.modulation, (cos, sin), replace(self.place, length=chosen.shape[1]))


class Memory:
    """What the blocks added to the tokens of one scale, [R, c * c, D] each: kept for the later scales that prune theirs."""

    def __init__(self) -> None:
        self.updates: list[Tensor] = []  # of each sublayer, attention's and the MLP's in turn; or one of all blocks together

    def resized(self, index: int, rows: int, side: int) -> Tensor:
        """Return update `index` of the first `rows` rows, resized by area to [rows, side * side, D]."""
        update = self.updates[index][:rows]
        cached_side = round(update.shape[1] ** 0.5)
        grid = update.unflatten(1, (cached_side, cached_side)).permute(0, 3, 1, 2)  # [rows, D, c, c]
        return area_resize(grid, side).permute(0, 2, 3, 1).reshape(rows, side * side, -1)


class Pass(ABC):
    """Sends one scale's tokens through the blocks."""

    @abstractmethod
    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """Return hidden states [R, L, D]; keys and values go to the tokens' place."""

    def num_updates(self, depth: int) -> int:
        """Return how many updates it keeps in the memory, of a model of `depth` blocks."""
        return 0


@dataclass(frozen=True)
class EveryToken(Pass):
    """The model as it is."""

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        hidden: Tensor = transformer(inputs.x, inputs.modulation, inputs.table, inputs.place)
        return hidden


@dataclass(frozen=True)
class Remember(Pass):
    """Computes every token, and keeps what each sublayer added."""

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        x, memory.updates = inputs.x, []
        for layer, (block, vectors) in enumerate(transformer.layers(inputs.modulation)):
            memory.updates.append(block.attention_update(x, vectors, inputs.table, inputs.place, layer))
            x = x + memory.updates[-1]
            memory.updates.append(block.mlp_update(x, vectors))
            x = x + memory.updates[-1]
        return x

    def num_updates(self, depth: int) -> int:
        """As `Pass`."""
        return 2 * depth


@dataclass(frozen=True)
class Pruned(Pass):
    """Runs each sublayer on the tokens that score highest on its input; the others get the memory's update of that sublayer.

    Each row and sublayer chooses for itself, as released. Only the chosen tokens' keys and values enter the cache.
    """

    side: int
    kept: int | tuple[int, ...]  # tokens; or of each layer
    score: Callable[[Tensor], Tensor]

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        x = inputs.x
        for layer, (block, vectors) in enumerate(transformer.layers(inputs.modulation)):
            kept = self.kept if isinstance(self.kept, int) else self.kept[layer]
            chosen = highest(self.score(x), kept)
            part = replace(inputs, x=x).at(chosen)
            update = block.attention_update(part.x, vectors, part.table, part.place, layer)
            x = x + _put(update, chosen, memory.resized(2 * layer, len(x), self.side))
            chosen = highest(self.score(x), kept)
            update = block.mlp_update(_take(x, chosen), vectors)
            x = x + _put(update, chosen, memory.resized(2 * layer + 1, len(x), self.side))
        return x


@dataclass(frozen=True)
class RememberOnce(Pass):
    """Computes every token, and keeps what all blocks together added."""

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        hidden = EveryToken()(transformer, inputs, memory)
        memory.updates = [hidden - inputs.x]
        return hidden

    def num_updates(self, depth: int) -> int:
        """As `Pass`."""
        return 1


@dataclass(frozen=True)
class PrunedOnce(Pass):
    """Chooses once, on the first block's input: the chosen tokens run through all blocks, the others get the memory's update.

    Resizing is linear, so for equal choices this is what `Pruned` computes, with one gather and one scatter.
    """

    side: int
    kept: int
    score: Callable[[Tensor], Tensor]

    def __call__(self, transformer: NextScaleTransformer, inputs: BlockInputs, memory: Memory) -> Tensor:
        """As `Pass`."""
        chosen = highest(self.score(inputs.x), self.kept)
        hidden = EveryToken()(transformer, inputs.at(chosen), memory)
        return _put(hidden, chosen, inputs.x + memory.resized(0, len(inputs.x), self.side))


def deviation(x: Tensor) -> Tensor:
    """Score tokens [R, L, D] by their squared distance from the mean token of their row -> [R, L] fp32."""
    x = x.float()
    return (x - x.mean(dim=1, keepdim=True)).square_().sum(dim=-1)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the places of each row's `count` highest of scores [R, L], rising, [R, count] int64; of equals the first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def _take(x: Tensor, chosen: Tensor) -> Tensor:
    """Return x [R, L, D] at the places `chosen` [R, K], [R, K, D]."""
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def _put(tokens: Tensor, chosen: Tensor, into: Tensor) -> Tensor:
    """Write tokens [R, K, D] over those of `into` [R, L, D] at the places `chosen` [R, K], in place; return it."""
    return into.scatter_(1, chosen[..., None].expand(-1, -1, into.shape[-1]), tokens)
