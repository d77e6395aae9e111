"""The key/value cache: every scale in its place, one scratch for the last, the size that was announced."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hart_infer.generation.schedule import Stage, build_schedule
from hart_infer.models.config import TransformerConfig
from hart_infer.models.parts.cache import KVCache
from hart_infer.ops.precision import widens

CPU = torch.device("cpu")
META = torch.device("meta")
SMALL = TransformerConfig(
    patch_nums=(1, 2, 3), context_token=5, context_dim=8, embed_dim=16, num_heads=2, depth=3, disable_aln=True
)
RELEASED = TransformerConfig(
    patch_nums=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    context_token=300,
    context_dim=1536,
    embed_dim=1536,
    num_heads=24,
    depth=24,
    disable_aln=True,
)
ROWS = 2


def schedule(config: TransformerConfig) -> tuple[Stage, ...]:
    return build_schedule(config.patch_nums, context_tokens=config.context_token, share_quant_resi=4)


def poisoned(config: TransformerConfig = SMALL) -> KVCache:
    """A cache whose fresh memory is NaN, so that reading what nothing wrote shows."""
    cache = KVCache(config, schedule(config), rows=ROWS, dtype=torch.float32, device=CPU)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def write(cache: KVCache, layer: int, stage: Stage) -> tuple[Tensor, Tensor]:
    """Put random keys and values of a stage into a layer; returns them."""
    slots = cache.slot(layer, stage)
    written = tuple(torch.randn(ROWS, SMALL.num_heads, stage.length, SMALL.head_dim) for _ in slots)
    for slot, tensor in zip(slots, written, strict=True):
        slot.copy_(tensor)
    return written  # type: ignore[return-value]


def test_a_stage_sees_all_that_its_layer_wrote_and_nothing_else() -> None:
    cache = poisoned()
    written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(SMALL.depth)]
    for stage, layer in itertools.product(schedule(SMALL), range(SMALL.depth)):
        written[layer].append(write(cache, layer, stage))
        expected = [torch.cat(parts, dim=2) for parts in zip(*written[layer], strict=True)]
        for seen, wanted in zip(cache.visible(layer, stage), expected, strict=True):
            assert seen.shape == (ROWS, SMALL.num_heads, stage.offset + stage.length, SMALL.head_dim)
            assert torch.equal(seen, wanted)


def test_the_last_scale_is_not_kept() -> None:
    cache = poisoned()
    *earlier, last = schedule(SMALL)
    for stage, layer in itertools.product(earlier, range(SMALL.depth)):
        write(cache, layer, stage)
    kept = cache.keys.clone(), cache.values.clone()
    assert cache.keys.shape[3] == last.offset
    for layer in range(SMALL.depth):
        write(cache, layer, last)
        cache.visible(layer, last)
    assert torch.equal(cache.keys, kept[0])
    assert torch.equal(cache.values, kept[1])


def test_slots_are_views_and_all_blocks_share_the_scratch() -> None:
    cache = poisoned()
    *earlier, last = schedule(SMALL)
    keys, values = cache.keys.untyped_storage().data_ptr(), cache.values.untyped_storage().data_ptr()
    for stage, layer in itertools.product(earlier, range(SMALL.depth)):
        for views in (cache.slot(layer, stage), cache.visible(layer, stage)):
            assert [view.untyped_storage().data_ptr() for view in views] == [keys, values]
    scratch = {view.untyped_storage().data_ptr() for layer in range(SMALL.depth) for view in cache.slot(layer, last)}
    assert len(scratch) == 1
    assert not scratch & {keys, values}


def storages(cache: KVCache) -> int:
    """Bytes behind all tensors of a cache, each storage once."""
    found = {s._cdata: s.nbytes() for t in vars(cache).values() if isinstance(t, Tensor) for s in [t.untyped_storage()]}
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("config", [SMALL, RELEASED], ids=["small", "released"])
def test_the_announced_size_is_what_is_allocated(config: TransformerConfig, rows: int, dtype: torch.dtype) -> None:
    stages = schedule(config)
    cache = KVCache(config, stages, rows=rows, dtype=dtype, device=META)
    before = storages(cache)
    cache.slot(0, stages[-1])
    announced = KVCache.size_in_bytes(config, stages, rows=rows, itemsize=dtype.itemsize)
    assert storages(cache) == announced
    assert before < announced  # the scratch waits until the last scale


def test_the_released_cache_has_the_size_that_the_paper_s_numbers_give() -> None:
    # 300 context tokens and 1 + 4 + ... + 48^2 image tokens, less scale 0's single one: the context is its input.
    kept = 300 + sum(side * side for side in RELEASED.patch_nums[1:-1])
    cache = KVCache(RELEASED, schedule(RELEASED), rows=2, dtype=torch.bfloat16, device=META)
    assert cache.keys.shape == (24, 2, 24, kept, 64)


def test_the_context_s_own_cache_keeps_its_one_stage() -> None:
    context = schedule(SMALL)[0]
    cache = KVCache(SMALL, [context], rows=ROWS, dtype=torch.float32, device=CPU)
    keys, values = write(cache, 1, context)
    assert torch.equal(cache.keys[1], keys)
    assert torch.equal(cache.visible(1, context)[1], values)
    assert storages(cache) == KVCache.size_in_bytes(SMALL, [context], rows=ROWS, itemsize=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scratch_is_in_the_dtype_that_products_are_taken_in(dtype: torch.dtype) -> None:
    cache = KVCache(SMALL, schedule(SMALL), rows=ROWS, dtype=dtype, device=CPU)
    last = schedule(SMALL)[-1]
    assert {view.dtype for stage in schedule(SMALL)[:-1] for view in cache.slot(0, stage)} == {dtype}
    assert {view.dtype for view in cache.slot(0, last)} == {torch.float32 if widens(cache.keys, "attention") else dtype}
