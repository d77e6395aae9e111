"""Guidance, filters, draws and mixture: the reference against fp64 and probability, the Triton kernel against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import ops
from hart_infer.errors import BackendError, WeightsError
from hart_infer.generation.sampling import PhiloxSampler, check_finite
from hart_infer.generation.schedule import Settings, Stage, hart_schedule
from hart_infer.ops.logits import filter_logits
from hart_infer.ops.philox import philox
from hart_infer.ops.registry import use_backend
from hart_infer.pipelines import next_scale
from tests.ops.checks import check, every_dtype, strided

pytest.importorskip("triton")
OPTIONS: dict[str, Any] = {
    "guidance": 2.5,
    "top_k": 9,
    "top_p": 0.0,
    "logit_gain": 1.3,
    "temperature": 0.4,
    "more_smooth": True,
}


def drawn(logits: Tensor, codebook: Tensor, seeds: Tensor, offset: Tensor, options: dict[str, Any], by: Any = None) -> Any:
    """What the operation, or its reference as `by`, draws with `options` as numbers."""
    numbers = {name: value for name, value in options.items() if name != "more_smooth"}
    flags = {"top_k": 0 < options["top_k"] < logits.shape[-1], "top_p": options["top_p"] > 0}
    settings = ops.draw_settings(**numbers).to(logits.device)
    return (by or ops.guided_sample)(logits, codebook, seeds, offset, settings, **flags, more_smooth=options["more_smooth"])


both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def exact(logits: Tensor, codebook: Tensor, seeds: Tensor, offset: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Everything in fp64, but for the draws' 23 bits."""
    conditional, unconditional = logits.double().chunk(2) if len(logits) > len(seeds) else (logits.double(),) * 2
    x = (1 + options["guidance"]) * conditional - options["guidance"] * unconditional
    x = filter_logits(x, top_k=options["top_k"], top_p=options["top_p"])
    token, code = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[2])
    noise = []
    for seed in seeds:
        words = philox((code, token, offset & 0xFFFFFFFF, offset >> 32), seed)
        noise.append([-(-(((word >> 9).double() + 0.5) * 2**-23).log()).log() for word in words[:2]])
    race, mixing = (torch.stack(part) for part in zip(*noise, strict=True))
    weights = ((x * options["logit_gain"] + mixing) / options["temperature"]).softmax(-1)
    return (x + race).argmax(-1), weights @ codebook.double()


def inputs(images: int, length: int, vocabulary: int, channels: int, halves: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(length + vocabulary)
    logits, codebook = torch.randn(halves * images, length, vocabulary) * 2, torch.randn(vocabulary, channels)
    return logits, codebook, torch.tensor([7, -1, 2**40 + 3])[:images], torch.tensor([2**33 + 5])


@every_dtype
@pytest.mark.parametrize(
    ("shape", "changes"),
    [  # images, tokens, codes, channels, halves
        ((1, 1, 1, 1, 1), {"top_k": 0}),
        ((2, 17, 50, 4, 2), {}),
        ((1, 3, 130, 20, 2), {"top_k": 40, "top_p": 0.8, "temperature": 0.02}),
        ((1, 5, 64, 32, 1), {"top_k": 0, "top_p": 0.6, "guidance": 0.0}),
        ((3, 2, 33, 5, 2), {"top_k": 0}),
    ],
    ids=str,
)
def test_kernel_and_reference_draw_alike_and_mix_as_exactly(shape, changes, dtype):
    logits, codebook, seeds, offset = inputs(*shape)
    logits, options = strided(logits.to(dtype)), OPTIONS | changes
    with use_backend("triton"):
        indices, embeddings = drawn(logits, codebook, seeds, offset, options)
    reference = drawn(logits, codebook, seeds, offset, options, ops.guided_sample.reference)
    best, mixture = exact(logits, codebook, seeds, offset, options)
    assert torch.equal(indices, reference[0]) and torch.equal(indices, best)
    check(embeddings, reference[1], mixture)


@both_backends
def test_without_mixing_the_code_comes_as_itself(backend):
    given = inputs(2, 5, 50, 4)
    with use_backend(backend):
        indices, embeddings = drawn(*given, OPTIONS | {"more_smooth": False})
        mixed, _ = drawn(*given, OPTIONS)
    assert torch.equal(indices, mixed) and torch.equal(embeddings, given[1][indices])


@both_backends
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 49, 50, 60])
def test_what_stays_is_what_the_filter_leaves(top_k, top_p, backend):
    logits, _, seeds, offset = inputs(1, 3, 50, 1, 1)
    options = OPTIONS | {"top_k": top_k, "top_p": top_p, "temperature": 5.0}
    with use_backend(backend):
        _, weights = drawn(logits, torch.eye(50), seeds, offset, options)
    assert torch.equal(weights > 0, filter_logits(logits.clone(), top_k=top_k, top_p=top_p).isfinite())


@both_backends
@pytest.mark.parametrize(
    ("row", "options", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], {"top_k": 0, "top_p": 0.5}, [True] * 4),  # the filter would keep two of them
        ([1.0, 1.0, 0.0, 0.0], {"top_k": 1, "top_p": 0.01}, [True, True, False, False]),
        ([3.0, 0.0, -0.0, -1.0], {"top_k": 2}, [True, True, True, False]),
        ([3.0, -0.0, 0.0, -1.0], {"top_k": 2}, [True, True, True, False]),
        ([-1.0, -torch.inf, -3.0, -2.0], {"top_k": 3}, [True, False, True, True]),
        ([-1.0, -torch.inf, -torch.inf, -torch.inf], {"top_k": 2, "top_p": 1.0}, [True, False, False, False]),
    ],
)
def test_equal_logits_stay_or_go_together(row, options, kept, backend):
    options = OPTIONS | {"temperature": 5.0} | options
    with use_backend(backend):
        _, weights = drawn(torch.tensor([[row]]), torch.eye(4), torch.tensor([1]), torch.tensor([0]), options)
    assert (weights > 0).tolist() == [[kept]]


@both_backends
def test_an_image_depends_on_its_seed_and_on_the_offset_alone(backend):
    logits, codebook, seeds, offset = inputs(3, 4, 50, 4, 1)
    logits = logits[:1].expand(3, -1, -1)
    with use_backend(backend):
        together = drawn(logits, codebook, seeds, offset, OPTIONS)
        for i in range(3):
            alone = drawn(logits[:1], codebook, seeds[i : i + 1], offset, OPTIONS)
            assert torch.equal(together[0][i : i + 1], alone[0])
            torch.testing.assert_close(together[1][i : i + 1], alone[1], rtol=1e-5, atol=1e-5)
        later = drawn(logits, codebook, seeds, offset + 1, OPTIONS)
    assert not torch.equal(together[0][0], together[0][1]) and not torch.equal(together[0], later[0])


def test_codes_are_drawn_with_their_probabilities_and_apart_from_the_mixture():
    """Chi-square of 20 000 draws, and of the pairs of a drawn code and the heaviest of its mixture."""
    row = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -8.0])
    options = OPTIONS | {"top_k": 6, "logit_gain": 1.0, "temperature": 1e-3}
    indices, weights = drawn(row.expand(1, 20000, 7), torch.eye(7), torch.tensor([11]), torch.tensor([3]), options)
    expected = row[:6].double().softmax(-1)
    counts = indices.flatten().bincount(minlength=7).double()
    assert counts[6] == 0, "top-k removed it"
    assert ((counts[:6] - 20000 * expected) ** 2 / (20000 * expected)).sum() < 25.7, "1 in 10 000, 5 degrees of freedom"
    pairs = (indices * 7 + weights.argmax(-1)).flatten().bincount(minlength=49).double().view(7, 7)[:6, :6]
    together = 20000 * expected[:, None] * expected
    assert ((pairs - together) ** 2 / together).sum() < 73.1, "1 in 10 000 or rarer, 35 degrees of freedom"


@both_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_without_a_softmax_are_flagged_and_stay_alone(value, backend):
    logits, codebook, seeds, offset = inputs(1, 4, 50, 4, 1)
    logits[0, 1, 49], logits[0, 2] = value, -torch.inf
    for mixes in (True, False):
        with use_backend(backend):
            indices, embeddings = drawn(logits, codebook, seeds, offset, OPTIONS | {"more_smooth": mixes})
        assert (indices == -1).tolist() == [[False, True, True, False]]
        assert embeddings.isnan().all(-1).tolist() == [[False, True, True, False]]
        assert embeddings.isfinite().all(-1).tolist() == [[True, False, False, True]]


def test_what_does_not_fit_is_refused():
    logits, codebook, seeds, offset = inputs(2, 3, 50, 4)
    with use_backend("triton"):
        for given, message in (
            ((logits[0], codebook, seeds, offset), "must be \\[B or 2B, L, V\\]"),
            ((logits, codebook[1:], seeds, offset), "\\[V, C\\], not \\[4, 3, 50\\] and \\[49, 4\\]"),
            ((logits, codebook.half(), seeds, offset), "codebook must be float32"),
            ((logits[:3], codebook, seeds, offset), "one for each image"),
            ((logits, codebook, seeds.int(), offset), "seeds must be int64"),
            ((logits, codebook, seeds, offset.float()), "offset must be one int64"),
            ((logits, codebook, seeds, seeds), "offset must be one int64"),
        ):
            with pytest.raises(ValueError, match=f"guided_sample: .*{message}"):
                drawn(*given, OPTIONS)
        for changes in ({"top_p": 1.5}, {"temperature": 0.0}):
            with pytest.raises(ValueError, match="top_p must be from 0 to 1, temperature above 0"):
                drawn(logits, codebook, seeds, offset, OPTIONS | changes)
        with pytest.raises(BackendError, match="at most 16384 codes, not 16385"):
            drawn(torch.zeros(2, 1, 16385), torch.zeros(16385, 1), seeds, offset, OPTIONS)


def sampler(more_smooth: bool = True) -> tuple[PhiloxSampler, Stage]:
    """As a CUDA device draws, on a machine without one; and a stage."""
    settings = Settings(guidance_scale=3.0, top_k=7, top_p=0.9, more_smooth=more_smooth)
    schedule = hart_schedule((1, 2, 3, 4), context_tokens=5, share_quant_resi=4, settings=settings)
    return PhiloxSampler([3, 2**64 - 1], torch.device("cpu"), schedule), schedule.stages[2]


@both_backends
@pytest.mark.parametrize("more_smooth", [False, True])
def test_a_scale_on_a_gpu_is_this_operation(more_smooth, backend):
    now, stage = sampler(more_smooth)
    logits, codebook, _, _ = inputs(2, 9, 50, 4)
    with use_backend(backend):
        found = now.draw(logits, codebook, stage)
    options = {"guidance": 2.0, "top_k": 7, "top_p": 0.9, "logit_gain": 5 / 3, "temperature": 0.27 * (1 - 0.95 * 2 / 3)}
    options["more_smooth"] = more_smooth
    expected = drawn(logits, codebook, torch.tensor([3, -1]), torch.tensor([2]), options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_a_gpu_is_asked_for_failed_codes_in_the_end():
    check_finite([sampler()[0].failed(torch.tensor([[0, 4]])), None])
    with pytest.raises(WeightsError, match="not finite"):
        check_finite([None, sampler()[0].failed(torch.tensor([[0, -1]]))])


def test_a_gpu_s_draws_make_whole_pictures(pipe, monkeypatch):
    head = pipe.transformer.head.forward
    monkeypatch.setattr(next_scale, "make_sampler", PhiloxSampler)
    both, first, other = (
        pipe("a cat", seed=seed, num_images_per_prompt=n, output_type="latent").images for seed, n in ((3, 2), (3, 1), (4, 1))
    )
    assert both.isfinite().all() and torch.equal(both, torch.cat([first, other])) and not torch.equal(first, other)
    scales = iter(range(99))

    def broken(hidden, modulation):
        logits = head(hidden, modulation)
        return logits.fill_(torch.nan) if next(scales) == 1 else logits

    monkeypatch.setattr(pipe.transformer.head, "forward", broken)
    with pytest.raises(WeightsError, match="not finite"):
        pipe("a cat", seed=3)
    assert next(scales) == len(pipe.transformer.config.patch_nums), "asked once, in the end"
