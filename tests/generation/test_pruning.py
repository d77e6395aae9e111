"""Passes of one scale through the blocks, on blocks so simple that the result is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hart_infer.generation.pruning import (
    BlockInputs,
    EveryToken,
    Memory,
    Pruned,
    PrunedOnce,
    Remember,
    RememberOnce,
    deviation,
    highest,
)
from hart_infer.models.parts.modulation import Modulation

ROWS, SIDE, WIDTH, DEPTH = 2, 6, 8, 3


class Tokenwise(nn.Module):
    """A block whose attention looks at its own token and its angles alone, so that no key is missed."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.maps = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]

    def attention_update(self, x: Tensor, vectors: Tensor, table: Any, place: Any, layer: int) -> Tensor:
        return (x @ self.maps[0]).tanh() * table[0][:, 0] + vectors[:, :1]

    def mlp_update(self, x: Tensor, vectors: Tensor) -> Tensor:
        return (x @ self.maps[1]).tanh() * vectors[:, 1:]


class Transformer:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.blocks = [Tokenwise(generator) for _ in range(DEPTH)]

    def layers(self, modulation: Modulation) -> Any:
        return zip(self.blocks, modulation.blocks.unbind(0), strict=True)

    def __call__(self, x: Tensor, modulation: Modulation, table: Any, place: Any) -> Tensor:
        for layer, (block, vectors) in enumerate(self.layers(modulation)):
            x = x + block.attention_update(x, vectors, table, place, layer)
            x = x + block.mlp_update(x, vectors)
        return x


def inputs() -> BlockInputs:
    from hart_infer.models.parts.cache import CachePlace

    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = SIDE * SIDE
    modulation = Modulation(drawn(DEPTH, ROWS, 2, WIDTH), drawn(ROWS, 2, WIDTH))
    table = (drawn(ROWS, 1, length, WIDTH), drawn(ROWS, 1, length, WIDTH))
    no_cache: Any = None
    return BlockInputs(drawn(ROWS, length, WIDTH), modulation, table, CachePlace(no_cache, 0, length, True, slice(None)))


@pytest.mark.parametrize("kept", [0, 1, 20, 36, (36, 5, 0)])
@pytest.mark.parametrize("once", [False, True])
def test_a_memory_of_the_true_updates_restores_everything(kept: int | tuple[int, ...], once: bool) -> None:
    """Where no key is missed, what is left out comes back, and what is kept is what it was."""
    if once and isinstance(kept, tuple):
        pytest.skip("a share per layer chooses in every layer")
    transformer: Any = Transformer()
    given, memory = inputs(), Memory()
    exact = (RememberOnce() if once else Remember())(transformer, given, memory)
    assert torch.equal(exact, EveryToken()(transformer, given, Memory()))
    run: Any = PrunedOnce(SIDE, kept, deviation) if once and isinstance(kept, int) else Pruned(SIDE, kept, deviation)
    torch.testing.assert_close(run(transformer, given, memory), exact, rtol=1e-12, atol=1e-12)


def test_only_the_chosen_tokens_are_computed() -> None:
    transformer: Any = Transformer()
    given, memory = inputs(), Memory()
    exact = RememberOnce()(transformer, given, memory)
    memory.updates = [torch.zeros_like(memory.updates[0])]
    hidden = PrunedOnce(SIDE, 10, deviation)(transformer, given, memory)
    same = (hidden == exact).all(dim=-1)
    assert torch.equal(same.sum(dim=1), torch.tensor([10, 10]))
    scores = (given.x - given.x.mean(dim=1, keepdim=True)).square().sum(dim=-1)
    assert scores[same].view(ROWS, -1).amin(dim=1).gt(scores.masked_fill(same, -1).amax(dim=1)).all()
    assert torch.equal(hidden[~same], given.x[~same])


def test_the_score_is_the_squared_distance_from_the_mean_in_fp32() -> None:
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]]], dtype=torch.bfloat16)
    assert torch.equal(deviation(x), torch.tensor([[5.0, 5.0, 16.0]]))
    assert deviation(x).dtype == torch.float32
    assert torch.equal(x, torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]]], dtype=torch.bfloat16))


def test_the_highest_rise_and_of_equals_the_first_are_taken() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 5.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert highest(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert highest(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert highest(scores, 0).shape == (2, 0)
    assert highest(scores, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize(("cached", "side"), [(6, 8), (36, 48), (10, 13), (5, 13), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_resized_by_area(cached: int, side: int, dtype: torch.dtype) -> None:
    memory = Memory()
    memory.updates = [torch.randn(3, cached * cached, 4).to(dtype)]
    grid = memory.updates[0].unflatten(1, (cached, cached)).double()
    spans = [(cached * i // side, -(-cached * (i + 1) // side)) for i in range(side)]
    rows = torch.stack([grid[:, a:b].mean(dim=1) for a, b in spans], dim=1)
    expected = torch.stack([rows[:, :, a:b].mean(dim=2) for a, b in spans], dim=2).flatten(1, 2)
    resized = memory.resized(0, 2, side)
    assert resized.shape == (2, side * side, 4) and resized.dtype == dtype
    torch.testing.assert_close(resized.double(), expected[:2], rtol=0, atol=4 * float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("run", [Pruned(SIDE, 20, deviation), PrunedOnce(SIDE, 20, deviation)])
def test_a_pass_leaves_the_memory_and_its_inputs_alone(run: Any) -> None:
    transformer: Any = Transformer()
    given, memory = inputs(), Memory()
    (RememberOnce() if isinstance(run, PrunedOnce) else Remember())(transformer, given, memory)
    updates, x = [update.clone() for update in memory.updates], given.x.clone()
    run(transformer, given, memory)
    assert all(map(torch.equal, memory.updates, updates)) and torch.equal(given.x, x)
