"""Guidance, top-k and top-p, against plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hart_infer.ops.cpu import filter
from hart_infer.ops.logits import BEST, drop_tail, drop_tail_below_best, drop_unlikely, filter_logits, guide, keep_ties
from hart_infer.ops.registry import Where, use_backend

V = 50


@pytest.fixture(autouse=True, params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """By the reference and by the CPU's kernel."""
    if request.param == "cpu" and (reason := filter.refusal(Where("cpu", torch.float32))):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def logits(*shape: int, seed: int = 0, ties: bool = False) -> Tensor:
    values = torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 3
    return values.round() if ties else values


def naive(row: list[float], top_k: int, top_p: float) -> list[float]:
    """hart.md's rule for one position, in plain Python and double precision."""
    if 0 < top_k < len(row):
        threshold = sorted(row, reverse=True)[top_k - 1]
        row = [x if x >= threshold else -math.inf for x in row]
    if top_p > 0:
        order = sorted(range(len(row)), key=row.__getitem__)
        total = sum(math.exp(x) for x in row)
        cumulated = 0.0
        row = list(row)
        for i in order[:-1]:
            cumulated += math.exp(row[i]) / total
            if cumulated <= 1 - top_p:
                row[i] = -math.inf
    return row


def kept(filtered: Tensor) -> Tensor:
    return filtered.isfinite()


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, V - 1, V, V + 10])
def test_filter_is_the_naive_rule(top_k: int, top_p: float) -> None:
    given = logits(2, 3)
    filtered = filter_logits(given.clone(), top_k=top_k, top_p=top_p)
    expected = torch.tensor([[naive(row.tolist(), top_k, top_p) for row in image] for image in given])
    assert torch.equal(filtered, expected)


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_top_k_keeps_ties_at_the_threshold(top_k: int) -> None:
    given = logits(4, 8, ties=True)
    filtered = filter_logits(given.clone(), top_k=top_k, top_p=0)
    expected = torch.tensor([[naive(row.tolist(), top_k, 0) for row in image] for image in given])
    assert torch.equal(filtered, expected)
    assert (kept(filtered).sum(-1) > top_k).any()  # there are ties to keep


def test_with_ties_top_p_keeps_as_many_of_each_value_as_the_naive_rule() -> None:
    given = logits(4, 8, ties=True)
    filtered = filter_logits(given.clone(), top_k=0, top_p=0.7).sort(dim=-1).values
    expected = torch.tensor([[naive(row.tolist(), 0, 0.7) for row in image] for image in given]).sort(dim=-1).values
    assert torch.equal(filtered, expected)


@pytest.mark.parametrize(
    ("top_p", "survivors"),
    [(0.0, 4), (1.0, 4), (0.76, 4), (0.75, 3), (0.5, 2), (0.25, 1), (1e-6, 1), (1e-9, 1)],
)
def test_top_p_removes_what_cumulates_to_at_most_one_minus_p(top_p: float, survivors: int) -> None:
    filtered = filter_logits(torch.zeros(1, 1, 4), top_k=0, top_p=top_p)  # four times exactly 0.25
    assert int(kept(filtered).sum()) == survivors


def test_top_p_counts_what_top_k_left() -> None:
    given = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None, None]
    assert kept(filter_logits(given.clone(), top_k=0, top_p=0.65)).tolist() == [[[True, True, False, False]]]
    # Of the best two the lower has 3/7 > 0.35, so it stays; alone it would be removed at 0.5.
    assert kept(filter_logits(given.clone(), top_k=2, top_p=0.65)).tolist() == [[[True, True, False, False]]]
    assert kept(filter_logits(given.clone(), top_k=2, top_p=0.5)).tolist() == [[[True, False, False, False]]]


@pytest.mark.parametrize("top_k", [0, V, V + 1])
def test_no_limit_removes_nothing(top_k: int) -> None:
    assert torch.equal(filter_logits(logits(2, 3), top_k=top_k, top_p=0), logits(2, 3))


def test_the_filter_works_in_place() -> None:
    given = logits(1, 2)
    assert filter_logits(given, top_k=3, top_p=0.5) is given


def test_ties_of_what_stays_come_back() -> None:
    given = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0]]])
    filtered = filter_logits(given.clone(), top_k=0, top_p=0.6)
    assert int(kept(filtered).sum()) == 2  # of the three equal ones, one
    assert kept(keep_ties(filtered, given)).tolist() == [[[True, True, True, True, False]]]


def test_without_ties_nothing_comes_back() -> None:
    filtered = filter_logits(logits(4, 8), top_k=20, top_p=0.7)
    assert torch.equal(keep_ties(filtered, logits(4, 8)), filtered)


def test_guidance():
    conditional, unconditional = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert guide(torch.cat([conditional, unconditional]), 1.5).item() == 2.5 * 3 - 1.5 * 1


@pytest.mark.parametrize("spread", [0.3, 3.0, 9.0])  # of which nuclei hold nearly all, some and one or two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bf16 there are equal logits
@pytest.mark.parametrize("removable", [0.0, 0.05, 0.2, 0.9])
def test_sorting_the_best_alone_drops_the_same_tail(removable: float, dtype: torch.dtype, spread: float) -> None:
    drawn = torch.randn(2, 30, 8 * BEST, generator=torch.Generator().manual_seed(1))
    given = (drawn * spread).to(dtype).float()
    given[1, 3, 5:] = -torch.inf  # as few as five are left
    found, expected = given.transpose(0, 1), given.clone().transpose(0, 1)  # not contiguous
    drop_tail_below_best(found, removable)
    drop_tail(expected, removable)
    assert torch.equal(found, expected)
    assert spread < 1 or removable == 0 or (kept(found).sum(-1) < BEST).any()
    damaged = torch.full((1, 2, 8 * BEST), torch.nan)
    drop_tail_below_best(damaged, removable)
    assert damaged.isnan().all()


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), [(600, 0.96), (0, 0.8), (3, 0.0), (40, 0.5), (0, 1.0)])
def test_the_kernel_keeps_what_the_reference_keeps(backend: str, top_k: int, top_p: float, width: int) -> None:
    drawn = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(width)) * 3
    drawn[0] = drawn[0].bfloat16()  # with equal ones
    drawn[1, 3, 2:] = -torch.inf
    drawn[2, :, ::3] = 0.0
    drawn[2, :, ::2] *= -1  # -0.0 equals 0.0
    given = drawn.transpose(0, 1)
    expected = given.clone()
    drop_unlikely.reference(expected, top_k, top_p)
    assert torch.equal(filter_logits(given, top_k=top_k, top_p=top_p), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_a_softmax_stay_without_one(backend: str, bad: float) -> None:
    given = torch.randn(4, 20)
    given[1, 7] = bad
    given[2] = -torch.inf
    filtered = filter_logits(given.clone(), top_k=5, top_p=0.9)
    assert filtered.softmax(dim=-1).isnan().all(dim=-1).tolist() == [False, True, True, False]


def test_any_number_of_threads_and_no_row_at_all(backend: str) -> None:
    given, before, found = torch.randn(100, 500), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(filter_logits(given.clone(), top_k=50, top_p=0.9))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert filter_logits(torch.empty(0, 9), top_k=3, top_p=0.5).shape == (0, 9)
