"""Drawing and mixing codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer.errors import WeightsError
from hart_infer.generation.sampling import GeneratorSampler, PhiloxSampler, make_sampler
from hart_infer.generation.schedule import Settings, Stage, hart_schedule
from hart_infer.ops.logits import filter_logits

CPU = torch.device("cpu")
V = 50


SCHEDULE = hart_schedule((1, 2, 3, 4), context_tokens=5, share_quant_resi=4)


def logits(*shape: int, seed: int = 0, ties: bool = False) -> Tensor:
    values = torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 3
    return values.round() if ties else values


def stage(top_k: int = 0, index: int = 2, **settings: Any) -> Stage:
    chosen = Settings(top_k=top_k, **settings)
    return hart_schedule((1, 2, 3, 4), context_tokens=5, share_quant_resi=4, settings=chosen).stages[index]


def kept(filtered: Tensor) -> Tensor:
    return filtered.isfinite()


def draw(given: Tensor, codebook: Tensor, now: Stage, *seeds: int) -> tuple[Tensor, Tensor]:
    return GeneratorSampler(seeds).draw(given, codebook, now)


Draw = Callable[[GeneratorSampler], Tensor]
DRAWS: dict[str, Draw] = {
    "multinomial": lambda sampler: sampler.multinomial(logits(1, 6).softmax(-1).expand(sampler.batch_size, -1, -1)),
    "gumbel": lambda sampler: sampler.gumbel(torch.empty(sampler.batch_size, 6, V)),
    "start noise": lambda sampler: sampler.noise.start(6, 4, CPU),
    "step noise": lambda sampler: sampler.noise.step(6, 4, CPU),
}


@pytest.mark.parametrize("names", [*((name,) for name in DRAWS), ("multinomial", "gumbel", "multinomial", "step noise")])
def test_an_image_s_draws_do_not_depend_on_its_batch(names: tuple[str, ...]) -> None:
    seeds = [3, 0, 3, 2**64 - 1]
    together = GeneratorSampler(seeds)
    batch = [DRAWS[name](together) for name in names]
    for i, seed in enumerate(seeds):
        alone = GeneratorSampler([seed])
        for name, drawn in zip(names, batch, strict=True):
            assert torch.equal(drawn[i : i + 1], DRAWS[name](alone))
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
        draw(overflown, torch.eye(V), stage(), 0)


def test_one_seed_may_cover_a_whole_recorded_batch() -> None:
    sampler = GeneratorSampler([7], images_per_seed=3)
    assert sampler.batch_size == 3
    probabilities = logits(3, 6).softmax(-1)
    drawn = [sampler.multinomial(probabilities), sampler.gumbel(probabilities)]
    generator = torch.Generator().manual_seed(7)
    indices = (probabilities / exponential(generator, 3, 6, V)).argmax(dim=-1)
    assert torch.equal(drawn[0], indices)
    assert torch.equal(drawn[1], -exponential(generator, 3, 6, V).log())


def test_the_draws_are_those_that_the_released_code_makes() -> None:
    sampler = GeneratorSampler([7])
    probabilities = logits(1, 6).softmax(-1)
    codes, noise = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(2):
        indices = (probabilities / exponential(codes, 1, 6, V)).argmax(dim=-1)
        assert torch.equal(sampler.multinomial(probabilities), indices)
        assert torch.equal(sampler.gumbel(probabilities), -exponential(codes, 1, 6, V).log())
    assert torch.equal(sampler.noise.start(6, 4, CPU)[0], torch.randn(6, 4, generator=noise))
    for _ in range(2):  # both guidance halves draw, the first half counts
        assert torch.equal(sampler.noise.step(6, 4, CPU)[0], torch.randn(12, 4, generator=noise)[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_fp32_whatever_the_activations_are(dtype: torch.dtype) -> None:
    noise = GeneratorSampler([1]).gumbel(torch.empty(1, 6, V, dtype=dtype))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, GeneratorSampler([1]).gumbel(torch.empty(1, 6, V)))


def test_the_computing_device_takes_no_part_in_cpu_draws() -> None:
    # The meta device computes nothing, so the next CPU draw shows what the first one took from the generators.
    meta = torch.device("meta")
    moved, stayed = GeneratorSampler([5]), GeneratorSampler([5])
    assert moved.gumbel(torch.empty(1, 6, V, device=meta)).device == meta
    assert moved.noise.start(6, 4, meta).device == meta
    assert moved.noise.step(6, 4, meta).device == meta
    for name in ("gumbel", "start noise", "step noise"):
        DRAWS[name](stayed)
    for name, drawn in DRAWS.items():
        assert torch.equal(drawn(moved), drawn(stayed)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_draws_are_the_same_numbers_on_a_gpu() -> None:
    gpu, cpu = GeneratorSampler([5]), GeneratorSampler([5])
    cuda = torch.device("cuda")
    assert torch.equal(gpu.multinomial(logits(1, 6).softmax(-1).to(cuda)).cpu(), DRAWS["multinomial"](cpu))
    assert torch.equal(gpu.gumbel(torch.empty(1, 6, V, device=cuda)).cpu(), DRAWS["gumbel"](cpu))
    assert torch.equal(gpu.noise.step(6, 4, cuda).cpu(), DRAWS["step noise"](cpu))


@pytest.mark.parametrize(("device", "kind"), [("cpu", GeneratorSampler), ("mps", GeneratorSampler), ("cuda", PhiloxSampler)])
def test_a_cuda_device_draws_for_itself_and_the_cpu_for_all_else(device: str, kind: type, monkeypatch) -> None:
    monkeypatch.setattr(PhiloxSampler, "__init__", lambda *given: None)
    assert type(make_sampler([1], torch.device(device), SCHEDULE)) is kind


def test_hard_codes_come_as_their_own_embeddings() -> None:
    codebook = torch.randn(V, 4, generator=torch.Generator().manual_seed(1))
    indices, embeddings = draw(logits(2, 9), codebook, stage(more_smooth=False), 0, 1)
    assert indices.shape == (2, 9)
    assert torch.equal(embeddings, codebook[indices])


def test_the_index_is_drawn_before_the_mixture() -> None:
    codebook = torch.randn(V, 4)
    hard, smooth = (draw(logits(2, 9), codebook, stage(more_smooth=more_smooth), 0, 1)[0] for more_smooth in (False, True))
    assert torch.equal(hard, smooth)


@pytest.mark.parametrize("index", range(4))
def test_the_mixture_is_the_paper_s_gumbel_softmax(index: int) -> None:
    now = stage(top_k=7, index=index)
    progress = min(index, 2) / 3  # the last scale takes the one before's
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    _, weights = draw(logits(1, 9), torch.eye(V), now, 3)
    reference = GeneratorSampler([3])
    filtered = filter_logits(logits(1, 9), top_k=7, top_p=0)
    reference.multinomial(filtered.softmax(-1))
    expected = ((filtered * (1 + progress) + reference.gumbel(filtered)).double() / tau).softmax(-1)
    # Rounding of the exponent, whose size is about 20 / tau, in units of 2^-24: the rest is exact by comparison.
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=4 * 20 / tau * 2**-24)
    assert weights[~kept(filtered)].eq(0).all()


@pytest.mark.parametrize("more_smooth", [False, True])
def test_removed_codes_are_never_drawn_or_mixed_in(more_smooth: bool) -> None:
    allowed = kept(filter_logits(logits(1, 40), top_k=3, top_p=0.8))
    now = stage(top_k=3, more_smooth=more_smooth, top_p=0.8)
    for seed in range(20):
        indices, weights = draw(logits(1, 40), torch.eye(V), now, seed)
        assert allowed.gather(-1, indices[..., None]).all()
        assert weights[~allowed].eq(0).all()


def test_best_code_only_needs_no_luck() -> None:
    for seed in range(5):
        indices, _ = draw(logits(1, 9), torch.eye(V), stage(top_k=1), seed)
        assert torch.equal(indices, logits(1, 9).argmax(-1))
