"""VILA-U's loop, stepped: how codes and tokens are drawn, what a seed replays, what a row sees. Random tiny networks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_infer.errors import InputError, WeightsError
from hart_infer.generation.next_token import (
    AnswerSettings,
    AnswerState,
    GenerationState,
    KeptPrefix,
    Networks,
    Prefix,
    answer,
    embed_prompts,
    finish,
    prefill,
    prefill_alone,
    run_position,
    run_token,
    splice_images,
    start,
    token_limit,
)
from hart_infer.generation.sampling import (
    CodeRule,
    GeneratorTokenSampler,
    GreedySampler,
    PhiloxTokenSampler,
    TextRule,
    TokenRule,
    TokenSampler,
    make_token_sampler,
)
from hart_infer.models.llama import Llama, LlamaConfig
from hart_infer.models.parts.cache import KVCache
from hart_infer.models.vila_u.depth import DepthConfig, DepthTransformer
from hart_infer.models.vila_u.projector import Projector
from hart_infer.models.vila_u.text import IMAGE_ID
from hart_infer.ops.logits import blend, filter_logits, nucleus
from hart_infer.ops.registry import use_backend

CPU = torch.device("cpu")
WIDTH, CODE_DIM, SLOTS, CODES, WORDS, POSITIONS = 32, 8, 3, 1200, 60, 5
PROMPT, OTHER, EMPTY = [1, 5, 9, 12, 7, 30], [1, 44, 3, 2, 8, 21, 50, 6], [1, 30, 4]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def networks() -> Networks:
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        llama = Llama(
            LlamaConfig(
                vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
            )
        )  # fmt: skip
        depth = DepthTransformer(
            DepthConfig(
                num_slots=SLOTS, code_dim=CODE_DIM, hidden_size=WIDTH, embed_dim=24, num_layers=2, num_heads=3,
                vocab_size=CODES,
            )
        )  # fmt: skip
        projector = Projector("mlp2x_gelu", code_dim=CODE_DIM, hidden_size=WIDTH)
        codebooks = torch.randn(SLOTS, CODES, CODE_DIM)
        modules: list[nn.Module] = [llama, depth, projector]
        for module in modules:
            module.eval().requires_grad_(False)
            for name, parameter in module.named_parameters():
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    return Networks(llama, depth, projector, lambda codes, slot: F.embedding(codes, codebooks[slot]))


def begin(
    networks: Networks,
    sampler: TokenSampler,
    prompts: Sequence[Sequence[int]] = (PROMPT,),
    rule: CodeRule | None = None,
    unconditional: Prefix | None = None,
) -> GenerationState:
    prefix = unconditional or prefill_alone(networks.llama, EMPTY)
    return start(networks, prompts, prefix, sampler, rule or CodeRule(), num_positions=POSITIONS)


def run(networks: Networks, sampler: TokenSampler, prompts: Sequence[Sequence[int]] = (PROMPT,), **options) -> Tensor:
    state = begin(networks, sampler, prompts, **options)
    for _ in range(POSITIONS):
        run_position(state)
    return finish(state)[0]


def exponential(generator: torch.Generator, *shape: int) -> Tensor:
    """What torch 2.13 draws on the CPU, whatever this version draws."""
    return -torch.log1p(-torch.rand(shape, dtype=torch.float64, generator=generator)).float()


def logits_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


# Rules.


def test_guidance_is_the_unconditional_and_so_much_of_the_difference() -> None:
    rows = logits_of(4, 50)
    assert torch.equal(blend(rows, 3.0), rows[2:] + 3.0 * (rows[:2] - rows[2:]))
    assert torch.equal(blend(rows, 0.0), rows[2:])


def test_of_more_codes_the_best_900_may_be_drawn() -> None:
    logits = logits_of(2, 1500)
    allowed = CodeRule(top_p=0).probabilities(logits.clone()) > 0
    assert allowed.sum(-1).tolist() == [900, 900]
    assert logits[allowed].view(2, -1).amin(-1).gt(logits.masked_fill(allowed, -math.inf).amax(-1)).all()
    assert (CodeRule(top_p=0).probabilities(logits[:, :800].clone()) > 0).all()


def test_ties_with_the_900th_stay() -> None:
    logits = torch.cat([torch.arange(899.0) + 2, torch.ones(5), torch.zeros(400)])[None]
    allowed = CodeRule(top_p=0).probabilities(logits / 100) > 0
    assert int(allowed.sum()) == 904


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.zeros(1, 2000)
    logits[0, :900] = 1e-3  # of all 2000 they have 45 %
    assert int((CodeRule(top_p=0.5).probabilities(logits) > 0).sum()) == 450


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_codes_are_kept_up_to_the_first_at_which_top_p_is_reached(top_p: float, kept: int) -> None:
    probabilities = nucleus(torch.full((1, 4), 0.25), top_p)
    assert int((probabilities > 0).sum()) == kept


def test_codes_are_cumulated_in_descending_order() -> None:
    """0.5 + 0.46 is 0.96 in fp32 as 0.96 is, and 0.04 a little more than 1 - 0.96 is: ascending keeps all three."""
    probabilities = torch.tensor([[0.04000002145767212, 0.4599999785423279, 0.5]])
    assert (nucleus(probabilities, 0.96) > 0).tolist() == [[False, True, True]]
    assert (CodeRule().probabilities(probabilities.log()) > 0).tolist() == [[False, True, True]]
    assert filter_logits(probabilities.log(), top_k=0, top_p=0.96).isfinite().all()


def test_what_is_kept_is_renormalised_in_code_order() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])
    expected = torch.tensor([[0, 4 / 7, 0, 3 / 7], [1, 0, 0, 0]])
    assert torch.allclose(nucleus(probabilities, 0.65), expected)
    assert torch.allclose(CodeRule().probabilities(logits_of(3, 1500)).sum(-1), torch.ones(3))


@pytest.mark.parametrize(("top_p", "kept"), [(0.76, 4), (0.75, 3), (0.5, 2), (0.25, 1), (1e-6, 1)])
def test_a_word_is_removed_at_exactly_one_minus_top_p_but_never_the_best(top_p: float, kept: int) -> None:
    rule = TextRule(top_k=50, top_p=top_p)
    assert int((rule.probabilities(torch.zeros(1, 4)) > 0).sum()) == kept


def test_words_that_tie_with_the_50th_stay() -> None:
    logits = torch.cat([torch.full((49,), 2.0), torch.ones(3), torch.zeros(20)])[None]
    assert int((TextRule(top_k=50, top_p=0).probabilities(logits) > 0).sum()) == 52


# Draws.


def test_a_seed_replays_the_released_draws_text_included(networks: Networks) -> None:
    """Per position D multinomials [n, K], then one [2n, V] that nothing uses, after the last position too."""
    images = 2
    sampler = GeneratorTokenSampler([7], images_per_seed=images)
    state = begin(networks, sampler)
    generator, logits = torch.Generator().manual_seed(7), []
    inner = sampler.draw

    def draw(given: Tensor, rule: CodeRule, step: int) -> Tensor:
        logits.append(given.clone())
        return inner(given, rule, step)

    sampler.draw = draw  # type: ignore[method-assign, assignment]
    for position in range(POSITIONS):
        logits.clear()
        run_position(state)
        for slot, rows in enumerate(logits):
            probabilities = CodeRule().probabilities(blend(rows, 3.0))
            expected = (probabilities / exponential(generator, images, CODES)).argmax(-1)
            assert torch.equal(state.codes[position][:, slot], expected)
        exponential(generator, 2 * images, WORDS)
    given = logits_of(images, CODES)
    expected = (CodeRule().probabilities(given.clone()) / exponential(generator, images, CODES)).argmax(-1)
    assert torch.equal(inner(given, CodeRule(), 0), expected)


def test_every_draw_has_a_step_of_its_own(networks: Networks) -> None:
    steps: list[int] = []

    class Counting(PhiloxTokenSampler):
        def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
            steps.append(step)
            return super().draw(logits, rule, step)

    run(networks, Counting([1], CPU))
    assert steps == list(range(POSITIONS * SLOTS))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions of torch draw other numbers")
def test_a_draw_is_torch_s_multinomial() -> None:
    sampler, generator = GeneratorTokenSampler([3], images_per_seed=2), torch.Generator().manual_seed(3)
    for step in range(4):
        logits = logits_of(2, CODES, seed=step)
        expected = torch.multinomial(CodeRule().probabilities(logits.clone()), 1, generator=generator)[:, 0]
        assert torch.equal(sampler.draw(logits, CodeRule(), step), expected)
        torch.empty(4, WORDS).exponential_(generator=generator)
        sampler.end_position(WORDS)


@pytest.mark.parametrize("kind", [GeneratorTokenSampler, lambda seeds: PhiloxTokenSampler(seeds, CPU)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_alone_is_that_picture_in_a_batch(networks: Networks, kind, scale: float) -> None:
    seeds, prompts = [3, 11, 2**64 - 1, 3], [PROMPT, OTHER]
    rule = CodeRule(guidance_scale=scale)
    together = run(networks, kind(seeds), prompts, rule=rule)
    assert together.shape == (4, POSITIONS, SLOTS) and together.dtype == torch.int64
    for i, seed in enumerate(seeds):
        alone = run(networks, kind([seed]), [prompts[i // 2]], rule=rule)
        assert torch.equal(together[i : i + 1], alone)
    assert len({tuple(codes.flatten().tolist()) for codes in together}) == 4


def test_the_device_chooses_the_sampler() -> None:
    assert isinstance(make_token_sampler([1], CPU), GeneratorTokenSampler)


def test_philox_draws_what_the_rule_allows_as_often_as_it_says() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(3000, 1)
    rule = CodeRule(top_k=900, top_p=0.85)
    drawn = Counter(PhiloxTokenSampler(range(3000), CPU).draw(logits, rule, 5).tolist())
    assert set(drawn) == {0, 1, 2}
    for code, share in enumerate((4 / 9, 3 / 9, 2 / 9)):
        assert abs(drawn[code] / 3000 - share) < 4 * math.sqrt(share / 3000)


@pytest.mark.parametrize("vocab_size", [1200, 16384])
def test_kernels_draw_what_the_reference_draws(vocab_size: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU Triton interprets them
    rows = logits_of(4, vocab_size).to(device)
    sampler = PhiloxTokenSampler([5, 6], device)
    with use_backend("torch"):
        expected = sampler.draw(rows.clone(), CodeRule(), 9)
    with use_backend("triton"):
        assert torch.equal(sampler.draw(rows.clone(), CodeRule(), 9), expected)


def test_kernels_run_the_networks(networks: Networks) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode(False):
        config = replace(networks.llama.config, num_key_value_heads=4)
        llama, depth = Llama(config).to(device).requires_grad_(False), networks.depth.to(device)
    (prompt,) = embed_prompts(llama, [PROMPT])
    hidden = logits_of(2, WIDTH).to(device)
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            state = AnswerState(llama, prompt, SETTINGS, GreedySampler())
            tokens = [run_token(state) for _ in range(3)]
            found.append((tokens, state.hidden_states, depth.step(depth.embed_hidden(hidden), 0, depth.new_cache(2))))
    assert found[0][0] == found[1][0]
    for ours, expected in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_philox_guides_as_the_released_code_does() -> None:
    rows = logits_of(128, 40)
    guided = blend(rows, 3.0)
    sampler, rule = PhiloxTokenSampler(range(64), CPU), CodeRule(top_k=0, top_p=0)
    assert torch.equal(sampler.draw(rows, rule, 2), sampler.draw(guided, rule, 2))


@pytest.mark.parametrize("sampler", [GeneratorTokenSampler([0]), PhiloxTokenSampler([0], CPU), GreedySampler()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_reported(sampler: TokenSampler, value: float) -> None:
    logits = logits_of(1, CODES)
    logits[0, 7] = value
    with pytest.raises(WeightsError, match="not finite"):
        assert int(sampler.draw(logits, CodeRule(), 0)) >= 0
        sampler.check()


# Rows.


def test_without_guidance_there_is_no_other_half(networks: Networks) -> None:
    rule = CodeRule(guidance_scale=1.0)
    state = begin(networks, GeneratorTokenSampler([4]), rule=rule)
    assert len(state.hidden_states) == 1
    almost = CodeRule(guidance_scale=1 + 1e-12)  # both halves, and the conditional alone in fp32
    assert len(begin(networks, GeneratorTokenSampler([4]), rule=almost).hidden_states) == 2
    assert torch.equal(
        run(networks, GeneratorTokenSampler([4]), rule=rule), run(networks, GeneratorTokenSampler([4]), rule=almost)
    )


@pytest.mark.parametrize("guided", [True, False])
def test_every_position_is_what_a_fresh_run_of_the_whole_row_gives(networks: Networks, guided: bool) -> None:
    """Teacher forcing: the prompt and the projected features, without a cache and without padding."""
    rule = CodeRule(guidance_scale=3.0 if guided else 1.0)
    state, hidden = begin(networks, GeneratorTokenSampler([3, 4]), [PROMPT, OTHER], rule), []
    for _ in range(POSITIONS):
        run_position(state)
        hidden.append(state.hidden_states)
    codes, features = finish(state)
    assert torch.equal(features, sum(networks.embed_code(codes[..., slot], slot) for slot in range(SLOTS)))
    llama = networks.llama
    prompts = [PROMPT, OTHER, EMPTY, EMPTY] if guided else [PROMPT, OTHER]
    for row, ids in enumerate(prompts):
        fed = networks.projector(features[row % 2, :-1])
        whole = torch.cat([*embed_prompts(llama, [ids]), fed])[None]
        length = whole.shape[1]
        positions = torch.arange(length)[None]
        expected = llama(whole, positions, llama.new_cache(rows=1, length=length).at(0, length))[0, len(ids) - 1 :]
        ours = torch.stack(hidden, dim=1)[row]
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_no_row_has_written_is_not_read(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(networks, GeneratorTokenSampler([3, 4]), [PROMPT, OTHER])
    new_cache = Llama.new_cache

    def poisoned(self: Llama, **options: int) -> KVCache:
        cache = new_cache(self, **options)
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
        return cache

    monkeypatch.setattr(Llama, "new_cache", poisoned)
    assert torch.equal(run(networks, GeneratorTokenSampler([3, 4]), [PROMPT, OTHER]), expected)


def test_a_padded_row_counts_positions_from_its_own_first_token(networks: Networks) -> None:
    """So its keys are those of the prompt alone, which a kept prefix needs; attention by itself would not tell."""
    llama, length = networks.llama, 10
    cache = llama.new_cache(rows=4, length=length)
    prefill(llama, embed_prompts(llama, [PROMPT, OTHER]), cache, slice(0, 4), length)
    for row, ids in enumerate([PROMPT, PROMPT, OTHER, OTHER]):
        alone = prefill_alone(llama, ids)
        for ours, expected in ((cache.keys, alone.keys), (cache.values, alone.values)):
            assert torch.allclose(ours[:, row, :, length - len(ids) :], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_a_kept_prefix_is_a_fresh_one_until_the_weights_or_the_prompt_change(networks: Networks) -> None:
    kept, llama = KeptPrefix(), networks.llama
    first = kept.get(llama, EMPTY)
    expected = run(networks, GeneratorTokenSampler([5]))
    for _ in range(2):  # a generation leaves it as it is
        assert torch.equal(run(networks, GeneratorTokenSampler([5]), unconditional=kept.get(llama, EMPTY)), expected)
    assert kept.get(llama, EMPTY) is first
    fresh = prefill_alone(llama, EMPTY)
    assert all(torch.equal(getattr(first, name), getattr(fresh, name)) for name in ("keys", "values", "hidden_states"))
    assert kept.get(llama, PROMPT).length == len(PROMPT)
    kept.get(llama, EMPTY)
    with torch.inference_mode(False):
        llama.layers[0].attn.v.weight.mul_(2)
    changed = kept.get(llama, EMPTY)
    assert not torch.equal(changed.values, first.values)
    assert torch.equal(changed.values, prefill_alone(llama, EMPTY).values)


def test_a_negative_prompt_may_be_the_longest(networks: Networks) -> None:
    codes = run(networks, GeneratorTokenSampler([5]), unconditional=prefill_alone(networks.llama, OTHER))
    assert codes.shape == (1, POSITIONS, SLOTS)
    assert not torch.equal(codes, run(networks, GeneratorTokenSampler([5])))


def test_a_run_that_stops_early_has_the_same_codes_so_far(networks: Networks) -> None:
    state = begin(networks, GeneratorTokenSampler([5]))
    run_position(state)
    run_position(state)
    assert state.position == 2
    codes, features = finish(state)
    assert torch.equal(codes, run(networks, GeneratorTokenSampler([5]))[:, :2])
    assert features.shape == (1, 2, CODE_DIM) and state.cache is None


@pytest.mark.parametrize("count", [0, 3])
def test_prompts_that_do_not_share_the_pictures_are_refused(networks: Networks, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} prompts"):
        begin(networks, GeneratorTokenSampler([1, 2]), [PROMPT] * count)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_bf16_draws_pictures_and_text(networks: Networks, guidance_scale: float) -> None:
    for module in (networks.llama, networks.depth, networks.projector):
        module.bfloat16()
    rule = CodeRule(guidance_scale=guidance_scale)
    state = begin(networks, GeneratorTokenSampler([1, 2]), [PROMPT, OTHER], rule)
    for _ in range(POSITIONS):
        run_position(state)
    codes, features = finish(state)
    assert ((codes >= 0) & (codes < CODES)).all() and features.isfinite().all()
    (prompt,) = embed_prompts(networks.llama, [PROMPT])
    assert len(list(answer(networks.llama, prompt, SETTINGS, GeneratorTokenSampler([1])))) == SETTINGS.max_new_tokens


# Answers.

SETTINGS = AnswerSettings(max_new_tokens=12, eos_token_ids=(), temperature=0.6, rule=TextRule(top_k=50, top_p=0.9))


def test_an_answer_replays_the_released_draws(networks: Networks) -> None:
    """Each token: temperature, top-k, top-p, one multinomial on [1, V]; every step from the whole row, without a cache."""
    llama, row, generator = networks.llama, list(PROMPT), torch.Generator().manual_seed(9)
    (prompt,) = embed_prompts(llama, [PROMPT])
    for token in answer(llama, prompt, SETTINGS, GeneratorTokenSampler([9])):
        logits = llama.logits(prefill_alone(llama, row).hidden_states) / 0.6
        probabilities = SETTINGS.rule.probabilities(logits)
        assert token == int((probabilities / exponential(generator, 1, WORDS)).argmax())
        row.append(token)
    assert len(row) == len(PROMPT) + 12


def test_a_greedy_answer_takes_the_best_whatever_the_temperature(networks: Networks) -> None:
    (prompt,) = embed_prompts(networks.llama, [PROMPT])
    tokens = list(answer(networks.llama, prompt, SETTINGS, GreedySampler()))
    assert tokens == list(answer(networks.llama, prompt, replace(SETTINGS, temperature=2.0), GreedySampler()))
    row = list(PROMPT)
    for token in tokens:
        assert token == int(networks.llama.logits(prefill_alone(networks.llama, row).hidden_states).argmax())
        row.append(token)


def test_an_answer_stops_behind_its_end_token(networks: Networks) -> None:
    (prompt,) = embed_prompts(networks.llama, [PROMPT])
    whole = list(answer(networks.llama, prompt, SETTINGS, GeneratorTokenSampler([2])))
    end = whole[4]
    short = list(answer(networks.llama, prompt, replace(SETTINGS, eos_token_ids=(WORDS + 1, end)), GeneratorTokenSampler([2])))
    assert short == whole[: whole.index(end) + 1]


def test_tokens_come_one_by_one(networks: Networks) -> None:
    runs: list[int] = []
    networks.llama.register_forward_hook(lambda *_: runs.append(1))
    (prompt,) = embed_prompts(networks.llama, [PROMPT])
    tokens = answer(networks.llama, prompt, SETTINGS, GreedySampler())
    for count in range(1, 4):
        next(tokens)
        assert len(runs) == count


def test_max_new_tokens_overrides_max_length_which_counts_a_token_more() -> None:
    assert token_limit(None, 4096) == 4095
    assert token_limit(7, 4096) == 7
    assert token_limit(5000, 4096) == 5000


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        replace(SETTINGS, **change)


@pytest.mark.parametrize("ids", [[1, IMAGE_ID, 5, IMAGE_ID], [IMAGE_ID, IMAGE_ID, 3], [IMAGE_ID, 2, 3, IMAGE_ID]])
def test_pictures_take_their_places_in_order(networks: Networks, ids: list[int]) -> None:
    images = logits_of(2, 4, WIDTH)
    expected, left = [], list(images)
    for token in ids:
        expected.append(left.pop(0) if token == IMAGE_ID else networks.llama.embed_tokens.weight[token][None])
    assert torch.equal(splice_images(networks.llama, ids, images), torch.cat(expected))


def test_a_prompt_without_pictures_is_its_embeddings(networks: Networks) -> None:
    spliced = splice_images(networks.llama, PROMPT, torch.empty(0, 4, WIDTH))
    assert torch.equal(spliced, networks.llama.embed_tokens.weight[PROMPT])


def test_another_number_of_pictures_is_refused(networks: Networks) -> None:
    with pytest.raises(InputError, match="2 places for pictures, and there are 1"):
        splice_images(networks.llama, [IMAGE_ID, IMAGE_ID], torch.zeros(1, 4, WIDTH))
