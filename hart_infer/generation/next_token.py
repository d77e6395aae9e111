"""The loop over VILA-U's sequence, one step at a time: a position's codes, or a token of an answer.

`start` sends prompts through the Llama, `GenerationState` is what one generation has so far, `run_position` advances it by one
position, and `finish` gives codes and features. `AnswerState` and `run_token` do the same for text; `answer` iterates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models.llama import Llama, prefill_mask, seen_mask
from ..models.parts.cache import KVCache
from ..models.parts.stamp import Stamp
from ..models.vila_u.depth import DepthTransformer
from ..models.vila_u.text import IMAGE_ID
from .sampling import CodeRule, TextRule, TokenSampler


@dataclass(frozen=True)
class Networks:
    """What draws codes."""

    llama: Llama
    depth: DepthTransformer
    projector: nn.Module  # features [..., C] -> [..., H]
    embed_code: Callable[[Tensor, int], Tensor]  # codes [B] and their slot -> their vectors [B, C]: the quantizer's `rows`


@dataclass(frozen=True)
class Prefix:
    """A prompt's keys and values, and its last hidden state: the same prompt has the same ones in every generation."""

    keys: Tensor  # [layers, 1, G, L, d]
    values: Tensor
    hidden_states: Tensor  # [1, H]

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return self.keys.shape[3]


def embed_prompts(llama: Llama, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the embeddings [L, H] of each prompt's ids."""
    return [llama.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=llama.device)) for ids in prompts]


def splice_images(llama: Llama, ids: Sequence[int], images: Tensor) -> Tensor:
    """Embed a prompt, each IMAGE_ID replaced by the T projected positions of its picture: `images` [N, T, H] -> [L, H].

    Raises InputError unless there is one picture for each IMAGE_ID.
    """
    places = [index for index, token in enumerate(ids) if token == IMAGE_ID]
    if len(places) != len(images):
        raise InputError(f"The prompt has {len(places)} places for pictures, and there are {len(images)} pictures.")
    parts: list[Tensor] = []
    begin = 0
    for place, image in zip(places, images.to(llama.device, llama.dtype), strict=True):
        parts += [*embed_prompts(llama, [ids[begin:place]]), image]
        begin = place + 1
    return torch.cat([*parts, *embed_prompts(llama, [ids[begin:]])])


def prefill(llama: Llama, prompts: Sequence[Tensor], cache: KVCache, rows: slice, length: int) -> Tensor:
    """Run P embedded prompts [L, H], padded on the left to `length`; fill `rows` of the cache -> last hidden states [P, H].

    Each prompt fills len(rows) / P consecutive rows. Positions are counted from its own first token, and padding is not
    attended to.
    """
    lengths = [len(prompt) for prompt in prompts]
    padding = torch.tensor([length - own for own in lengths], device=llama.device)
    inputs = torch.stack([F.pad(prompt, (0, 0, length - own, 0)) for prompt, own in zip(prompts, lengths, strict=True)])
    positions = (torch.arange(length, device=llama.device) - padding[:, None]).clamp_(min=0)  # [P, L]
    mask = None if min(lengths) == length else prefill_mask(padding, length)
    first = slice(rows.start, rows.stop, (rows.stop - rows.start) // len(prompts))
    hidden = llama(inputs, positions, cache.at(0, length, rows=first), mask)
    cache.spread(rows, len(prompts), length)
    return hidden[:, -1].clone()


def prefill_alone(llama: Llama, ids: Sequence[int]) -> Prefix:
    """Prefill one prompt into a new cache; the Prefix can be copied into the caches of several generations."""
    cache = llama.new_cache(rows=1, length=len(ids))
    hidden = prefill(llama, embed_prompts(llama, [ids]), cache, slice(0, 1), len(ids))
    return Prefix(cache.keys, cache.values, hidden)


def copy_prefix(prefix: Prefix, cache: KVCache, rows: slice, length: int) -> None:
    """Copy a prompt's keys and values to `rows` of the cache, to end at `length`; what is before it becomes 0."""
    for kept, given in ((cache.keys, prefix.keys), (cache.values, prefix.values)):
        kept[:, rows, :, : length - prefix.length].zero_()  # finite, as it is multiplied by 0
        kept[:, rows, :, length - prefix.length : length].copy_(given)


class KeptPrefix:
    """Keeps the prefix of the unconditional prompt, and computes it anew only after weights, settings or ids have changed."""

    def __init__(self) -> None:
        self._kept: tuple[Stamp, tuple[int, ...], Prefix] | None = None

    def get(self, llama: Llama, ids: Sequence[int]) -> Prefix:
        """Return the prefix of prompt `ids`."""
        kept = self._kept
        if kept is None or kept[1] != tuple(ids) or not kept[0].fits(llama):
            stamp = Stamp(llama)
            kept = self._kept = (stamp, tuple(ids), prefill_alone(llama, ids))
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leave it out of copies, whose weights are others."""
        return {"_kept": None}

    def clear(self) -> None:
        """Free it."""
        self._kept = None


class GenerationState:
    """State of generating B pictures or videos of `num_positions` positions each.

    Its rows are B conditional ones and, with guidance, B unconditional ones behind them.
    """

    def __init__(
        self,
        networks: Networks,
        sampler: TokenSampler,
        rule: CodeRule,
        *,
        num_positions: int,
        lengths: Sequence[int],
        hidden_states: Tensor,
        cache: KVCache,
    ) -> None:
        """`lengths`: of each row's prompt, without padding; the longest ends where the positions begin in `cache`."""
        self.networks, self.sampler, self.rule = networks, sampler, rule
        self.batch_size, self.num_positions = sampler.batch_size, num_positions
        self.hidden_states = hidden_states  # [R, H]: what draws the codes of the position that is run next, or ran last
        self.codes: list[Tensor] = []  # per finished position [B, D] int64
        self.features: list[Tensor] = []  # per finished position [B, C]: the sum of its codes' vectors
        self.prompt_length = max(lengths)
        device = networks.llama.device
        self.first_positions = torch.tensor(lengths, device=device)[:, None]  # [R, 1]
        padded = min(lengths) < self.prompt_length
        padding = self.prompt_length - self.first_positions[:, 0]
        self.seen = seen_mask(padding, self.prompt_length + num_positions) if padded else None  # [R, 1, 1, N]
        self.cache: KVCache | None = cache
        self.depth_cache = networks.depth.new_cache(len(hidden_states))

    @property
    def position(self) -> int:
        """Number of finished positions."""
        return len(self.codes)


def start(
    networks: Networks,
    prompts: Sequence[Sequence[int]],
    unconditional: Prefix | None,
    sampler: TokenSampler,
    rule: CodeRule,
    *,
    num_positions: int,
) -> GenerationState:
    """Prefill P prompts, B / P pictures each in order, and return the state before the first position.

    Without `unconditional`, or with a guidance scale of 1, which is the conditional half alone, there are no other rows.
    """
    llama, batch_size = networks.llama, sampler.batch_size
    if not prompts or batch_size % len(prompts):
        raise InputError(f"{len(prompts)} prompts can't share {batch_size} pictures evenly.")
    guided = unconditional if rule.guidance_scale != 1 else None
    lengths = [len(ids) for ids in prompts for _ in range(batch_size // len(prompts))]
    lengths += [guided.length] * batch_size if guided else []
    length = max(lengths)
    cache = llama.new_cache(rows=len(lengths), length=length + num_positions - 1)  # the last position is not fed
    hidden = prefill(llama, embed_prompts(llama, prompts), cache, slice(0, batch_size), length)
    hidden = hidden.repeat_interleave(batch_size // len(prompts), dim=0)
    if guided:
        copy_prefix(guided, cache, slice(batch_size, 2 * batch_size), length)
        hidden = torch.cat([hidden, guided.hidden_states.expand(batch_size, -1)])
    return GenerationState(
        networks, sampler, rule, num_positions=num_positions, lengths=lengths, hidden_states=hidden, cache=cache
    )


def run_position(state: GenerationState) -> None:
    """Advance a state by one position: the Llama's hidden states, then D codes, drawn one after another."""
    if state.codes:
        state.hidden_states = _next_hidden(state)
    networks, depth, hidden = state.networks, state.networks.depth, state.hidden_states
    copies = len(hidden) // state.batch_size  # the codes of both halves are the same
    first_step = state.position * depth.config.num_slots
    codes: list[Tensor] = []
    feature = torch.zeros((), device=hidden.device)
    for slot in range(depth.config.num_slots):
        x = depth.embed_codes(feature, slot).repeat(copies, 1) if slot else depth.embed_hidden(hidden)
        logits = depth.step(x, slot, state.depth_cache)
        codes.append(state.sampler.draw(logits, state.rule, first_step + slot))
        feature = feature + networks.embed_code(codes[-1], slot)
    state.sampler.end_position(networks.llama.config.vocab_size)
    state.codes.append(torch.stack(codes, dim=1))
    state.features.append(feature)


def finish(state: GenerationState) -> tuple[Tensor, Tensor]:
    """Return codes [B, P, D] int64 and features [B, P, C] of the P positions that were run, and free the cache.

    Raises WeightsError where logits were not finite.
    """
    state.cache = None
    state.sampler.check()
    return torch.stack(state.codes, dim=1), torch.stack(state.features, dim=1)


def _next_hidden(state: GenerationState) -> Tensor:
    """Feed the last position's feature to the Llama -> hidden states [R, H]."""
    assert state.cache is not None, "the state is finished"
    llama, rows = state.networks.llama, len(state.hidden_states)
    x = state.networks.projector(state.features[-1].to(llama.dtype))  # [B, H]
    fed = state.position - 1
    place = state.cache.at(state.prompt_length + fed, 1, rows=slice(0, rows))
    mask = None if state.seen is None else state.seen[..., : place.offset + 1]
    x = x[:, None].repeat(rows // state.batch_size, 1, 1)
    return llama(x, state.first_positions + fed, place, mask)[:, 0]


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How long an answer gets and how its tokens are drawn; whether they are drawn is the sampler's choice."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    rule: TextRule = TextRule(top_k=50, top_p=0.0)

    def __post_init__(self) -> None:
        """Raise InputError for an answer without tokens and a temperature that is not positive."""
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise InputError(
                f"temperature must be above 0, not {self.temperature}; for the likeliest tokens use do_sample=False."
            )


def token_limit(max_new_tokens: int | None, max_length: int) -> int:
    """Return the most new tokens of an answer: `max_new_tokens` if given, else a generation config's `max_length` less one.

    The released code counts a BOS, which was never fed, for max_length.
    """
    return max_length - 1 if max_new_tokens is None else max_new_tokens


class AnswerState:
    """State of one answer: the tokens so far, and the cache of all before the last."""

    def __init__(self, llama: Llama, prompt: Tensor, settings: AnswerSettings, sampler: TokenSampler) -> None:
        """Prefill `prompt`, the embeddings [L, H] of the question and its pictures."""
        self.llama, self.settings, self.sampler = llama, settings, sampler
        self.prompt_length = len(prompt)
        self.cache = llama.new_cache(rows=1, length=len(prompt) + settings.max_new_tokens - 1)  # the last token is not fed
        self.hidden_states = prefill(llama, [prompt], self.cache, slice(0, 1), len(prompt))  # [1, H]
        self.tokens: list[int] = []

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended or is as long as it may get."""
        ended = bool(self.tokens) and self.tokens[-1] in self.settings.eos_token_ids
        return ended or len(self.tokens) >= self.settings.max_new_tokens


def run_token(state: AnswerState) -> int:
    """Advance an answer by one token and return it; waits for the device."""
    llama, settings = state.llama, state.settings
    if state.tokens:
        place = state.cache.at(state.prompt_length + len(state.tokens) - 1, 1)
        token = torch.tensor([state.tokens[-1:]], device=llama.device)
        position = torch.full((1, 1), place.offset, device=llama.device)
        state.hidden_states = llama(llama.embed_tokens(token), position, place)[:, 0]
    logits = llama.logits(state.hidden_states) / settings.temperature
    drawn = int(state.sampler.draw(logits, settings.rule, len(state.tokens)))
    state.sampler.check()
    state.tokens.append(drawn)
    return drawn


@torch.no_grad()
def answer(llama: Llama, prompt: Tensor, settings: AnswerSettings, sampler: TokenSampler) -> Iterator[int]:
    """Yield an answer's tokens as they are drawn, an end token included."""
    state = AnswerState(llama, prompt, settings, sampler)
    while not state.is_done:
        yield run_token(state)
