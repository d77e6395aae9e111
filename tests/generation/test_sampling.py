"""Filtering, drawing and mixing codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hart_infer.errors import WeightsError
from hart_infer.generation.sampling import Draws, Settings, filter_logits, sample_scale
from hart_infer.generation.schedule import Stage, build_schedule

CPU = torch.device("cpu")
V = 50


def logits(*shape: int, seed: int = 0, ties: bool = False) -> Tensor:
    values = torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 3
    return values.round() if ties else values


def stage(top_k: int = 0, index: int = 2) -> Stage:
    return build_schedule((1, 2, 3, 4), context_tokens=5, share_quant_resi=4, top_k=top_k)[index]


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


Draw = Callable[[Draws, int], Tensor]
DRAWS: dict[str, Draw] = {
    "multinomial": lambda draws, images: draws.multinomial(logits(1, 6).softmax(-1).expand(images, -1, -1)),
    "gumbel": lambda draws, images: draws.gumbel(torch.empty(images, 6, V)),
    "start_noise": lambda draws, images: draws.start_noise(images, 6, 4, CPU),
    "step_noise": lambda draws, images: draws.step_noise(images, 6, 4, CPU),
}


@pytest.mark.parametrize("names", [*((name,) for name in DRAWS), ("multinomial", "gumbel", "multinomial", "step_noise")])
def test_an_image_s_draws_do_not_depend_on_its_batch(names: tuple[str, ...]) -> None:
    seeds = [3, 0, 3, 2**64 - 1]
    together = Draws(seeds, CPU)
    batch = [DRAWS[name](together, len(seeds)) for name in names]
    for i, seed in enumerate(seeds):
        alone = Draws([seed], CPU)
        for name, drawn in zip(names, batch, strict=True):
            assert torch.equal(drawn[i : i + 1], DRAWS[name](alone, 1))
    assert torch.equal(batch[-1][0], batch[-1][2])
    assert not torch.equal(batch[-1][0], batch[-1][1])


def exponential(generator: torch.Generator, *shape: int) -> Tensor:
    """What torch 2.13 draws on the CPU, whatever this version draws."""
    return -torch.log1p(-torch.rand(shape, dtype=torch.float64, generator=generator)).float()


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions of torch draw other numbers")
def test_exponential_draws_are_those_of_torch_2_13() -> None:
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    assert torch.equal(exponential(ours, 1000), torch.empty(1000).exponential_(generator=theirs))
    rows = logits(1000).softmax(-1)
    drawn = (rows / exponential(ours, 1000, V)).argmax(dim=-1, keepdim=True)
    assert torch.equal(drawn, torch.multinomial(rows, 1, replacement=True, generator=theirs))


def test_logits_that_are_not_finite_are_not_drawn_from() -> None:
    overflown = logits(1, 6)
    overflown[0, 3, 5] = torch.inf
    with pytest.raises(WeightsError, match="not finite"):
        sample_scale(overflown, torch.eye(V), stage(), Draws([0], CPU), Settings())


def test_many_draws_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Draws([7], CPU).gumbel(torch.empty(1, 6, V))
    monkeypatch.setattr("hart_infer.generation.sampling.FP64_DRAWS", 7)
    assert torch.equal(Draws([7], CPU).gumbel(torch.empty(1, 6, V)), whole)


def test_one_seed_may_cover_a_whole_recorded_batch() -> None:
    draws = Draws([7], CPU, images_per_seed=3)
    probabilities = logits(3, 6).softmax(-1)
    drawn = [draws.multinomial(probabilities), draws.gumbel(probabilities)]
    generator = torch.Generator().manual_seed(7)
    indices = (probabilities / exponential(generator, 3, 6, V)).argmax(dim=-1)
    assert torch.equal(drawn[0], indices)
    assert torch.equal(drawn[1], -exponential(generator, 3, 6, V).log())


def test_the_draws_are_those_that_the_released_code_makes() -> None:
    draws = Draws([7], CPU)
    probabilities = logits(1, 6).softmax(-1)
    codes, noise = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(2):
        indices = (probabilities / exponential(codes, 1, 6, V)).argmax(dim=-1)
        assert torch.equal(draws.multinomial(probabilities), indices)
        assert torch.equal(draws.gumbel(probabilities), -exponential(codes, 1, 6, V).log())
    assert torch.equal(draws.start_noise(1, 6, 4, CPU)[0], torch.randn(6, 4, generator=noise))
    for _ in range(2):  # both guidance halves draw, the first half counts
        assert torch.equal(draws.step_noise(1, 6, 4, CPU)[0], torch.randn(12, 4, generator=noise)[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_fp32_whatever_the_activations_are(dtype: torch.dtype) -> None:
    noise = Draws([1], CPU).gumbel(torch.empty(1, 6, V, dtype=dtype))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, Draws([1], CPU).gumbel(torch.empty(1, 6, V)))


def test_the_computing_device_takes_no_part_in_cpu_draws() -> None:
    # The meta device computes nothing, so the next CPU draw shows what the first one took from the generators.
    meta = torch.device("meta")
    moved, stayed = Draws([5], CPU), Draws([5], CPU)
    assert moved.gumbel(torch.empty(1, 6, V, device=meta)).device == meta
    assert moved.start_noise(1, 6, 4, meta).device == meta
    assert moved.step_noise(1, 6, 4, meta).device == meta
    for name in ("gumbel", "start_noise", "step_noise"):
        DRAWS[name](stayed, 1)
    for name, draw in DRAWS.items():
        assert torch.equal(draw(moved, 1), draw(stayed, 1)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_draws_are_the_same_numbers_on_a_gpu() -> None:
    gpu, cpu = Draws([5], CPU), Draws([5], CPU)
    cuda = torch.device("cuda")
    assert torch.equal(gpu.multinomial(logits(1, 6).softmax(-1).to(cuda)).cpu(), DRAWS["multinomial"](cpu, 1))
    assert torch.equal(gpu.gumbel(torch.empty(1, 6, V, device=cuda)).cpu(), DRAWS["gumbel"](cpu, 1))
    assert torch.equal(gpu.step_noise(1, 6, 4, cuda).cpu(), DRAWS["step_noise"](cpu, 1))


def test_hard_codes_come_as_their_own_embeddings() -> None:
    codebook = torch.randn(V, 4, generator=torch.Generator().manual_seed(1))
    indices, embeddings = sample_scale(logits(2, 9), codebook, stage(), Draws([0, 1], CPU), Settings(more_smooth=False))
    assert indices.shape == (2, 9)
    assert torch.equal(embeddings, codebook[indices])


def test_the_index_is_drawn_before_the_mixture() -> None:
    codebook = torch.randn(V, 4)
    hard, smooth = (
        sample_scale(logits(2, 9), codebook, stage(), Draws([0, 1], CPU), Settings(more_smooth=more_smooth))[0]
        for more_smooth in (False, True)
    )
    assert torch.equal(hard, smooth)


@pytest.mark.parametrize("index", range(4))
def test_the_mixture_is_the_paper_s_gumbel_softmax(index: int) -> None:
    now = stage(top_k=7, index=index)
    progress = min(index, 2) / 3  # the last scale takes the one before's
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    _, weights = sample_scale(logits(1, 9), torch.eye(V), now, Draws([3], CPU), Settings())
    reference = Draws([3], CPU)
    filtered = filter_logits(logits(1, 9), top_k=7, top_p=0)
    reference.multinomial(filtered.softmax(-1))
    expected = ((filtered * (1 + progress) + reference.gumbel(filtered)).double() / tau).softmax(-1)
    # Rounding of the exponent, whose size is about 20 / tau, in units of 2^-24: the rest is exact by comparison.
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=4 * 20 / tau * 2**-24)
    assert weights[~kept(filtered)].eq(0).all()


@pytest.mark.parametrize("more_smooth", [False, True])
def test_removed_codes_are_never_drawn_or_mixed_in(more_smooth: bool) -> None:
    allowed = kept(filter_logits(logits(1, 40), top_k=3, top_p=0.8))
    settings = Settings(more_smooth=more_smooth, top_p=0.8)
    for seed in range(20):
        indices, weights = sample_scale(logits(1, 40), torch.eye(V), stage(top_k=3), Draws([seed], CPU), settings)
        assert allowed.gather(-1, indices[..., None]).all()
        assert weights[~allowed].eq(0).all()


def test_best_code_only_needs_no_luck() -> None:
    for seed in range(5):
        indices, _ = sample_scale(logits(1, 9), torch.eye(V), stage(top_k=1), Draws([seed], CPU), Settings())
        assert torch.equal(indices, logits(1, 9).argmax(-1))
