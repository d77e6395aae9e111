"""The key/value cache: every scale in its place, one scratch for those that are not cached, the size that was announced."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer.generation.schedule import Schedule, Stage, hart_schedule
from hart_infer.models.parts.cache import CachePlace, KVCache
from hart_infer.ops.precision import widens

CPU = torch.device("cpu")
META = torch.device("meta")
ROWS = 2
SMALL = {"depth": 3, "num_heads": 2, "head_dim": 8}
RELEASED = {"depth": 24, "num_heads": 24, "head_dim": 64}
SCHEDULES = {
    "small": hart_schedule((1, 2, 3), context_tokens=5, share_quant_resi=4),
    "released": hart_schedule((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), context_tokens=300, share_quant_resi=4),
}


def build(
    schedule: Schedule,
    sizes: dict[str, int],
    *,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> KVCache:
    lengths: dict[str, Any] = {"length": schedule.cached_length, "scratch_length": schedule.scratch_length}
    return KVCache(**sizes, rows=rows, **lengths, dtype=dtype, device=device)


def poisoned() -> KVCache:
    """A cache whose fresh memory is NaN, so that reading what nothing wrote shows."""
    cache = build(SCHEDULES["small"], SMALL)
    for tensor in (cache.keys, cache.values, cache.scratch):
        tensor.fill_(torch.nan)
    return cache


def place(cache: KVCache, stage: Stage, rows: slice = slice(None)) -> CachePlace:
    return cache.at(stage.offset, stage.length, cached=stage.cached, rows=rows)


def write(where: CachePlace, layer: int) -> tuple[Tensor, Tensor]:
    """Put random keys and values of a scale into a layer; returns them."""
    slots = where.slot(layer)
    written = tuple(torch.randn(slot.shape) for slot in slots)
    for slot, tensor in zip(slots, written, strict=True):
        slot.copy_(tensor)
    return written  # type: ignore[return-value]


def test_a_scale_sees_all_that_its_layer_wrote_and_nothing_else() -> None:
    cache = poisoned()
    written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(3)]
    for stage, layer in itertools.product(SCHEDULES["small"], range(3)):
        written[layer].append(write(place(cache, stage), layer))
        expected = [torch.cat(parts, dim=2) for parts in zip(*written[layer], strict=True)]
        for seen, wanted in zip(place(cache, stage).visible(layer), expected, strict=True):
            assert seen.shape == (ROWS, 2, stage.offset + stage.length, 8)
            assert torch.equal(seen, wanted)


@pytest.mark.parametrize("skipped", [1, 2])
def test_a_scale_that_is_not_cached_is_not_kept(skipped: int) -> None:
    """Whichever it is: the scales behind it see what was before it, and themselves."""
    cache, offset = poisoned(), 0
    seen: list[Tensor] = []
    for index, length in enumerate((5, 4, 4)):
        where = cache.at(offset, length, cached=index != skipped)
        keys, _ = write(where, 0)
        assert torch.equal(where.visible(0)[0], torch.cat([*seen, keys], dim=2))
        if index != skipped:
            seen.append(keys)
            offset += length
    assert torch.equal(cache.keys[0, :, :, :offset], torch.cat(seen, dim=2))


def test_some_of_the_rows_are_written_and_seen() -> None:
    """Every second one, and the first half: where guidance ends early, or a prompt has several images."""
    cache, (first, second, last) = poisoned(), SCHEDULES["small"]
    keys, _ = write(place(cache, first, slice(0, 2, 2)), 1)
    assert torch.equal(cache.keys[1, :1, :, : first.length], keys)
    assert cache.keys[1, 1].isnan().all()
    for stage in (second, last):
        half = place(cache, stage, slice(0, 1))
        own, _ = write(half, 1)
        assert torch.equal(half.visible(1)[0][:, :, -stage.length :], own)
        assert half.visible(1)[0].isfinite().all()


def test_slots_are_views_and_all_blocks_share_the_scratch() -> None:
    cache = poisoned()
    *earlier, last = SCHEDULES["small"]
    keys, values, scratch = (x.untyped_storage().data_ptr() for x in (cache.keys, cache.values, cache.scratch))
    for stage, layer in itertools.product(earlier, range(3)):
        for views in (place(cache, stage).slot(layer), place(cache, stage).visible(layer)):
            assert [view.untyped_storage().data_ptr() for view in views] == [keys, values]
    views = [view for layer in range(3) for view in place(cache, last).slot(layer)]
    assert {view.untyped_storage().data_ptr() for view in views} == {scratch}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("name", "sizes"), [("small", SMALL), ("released", RELEASED)])
def test_the_announced_size_is_what_is_allocated(name: str, sizes: dict[str, int], rows: int, dtype: torch.dtype) -> None:
    schedule = SCHEDULES[name]
    cache = build(schedule, sizes, rows=rows, dtype=dtype, device=META)
    announced = KVCache.size_in_bytes(
        depth=sizes["depth"],
        rows=rows,
        width=sizes["num_heads"] * sizes["head_dim"],
        length=schedule.cached_length,
        scratch_length=schedule.scratch_length,
        itemsize=dtype.itemsize,
    )
    assert sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.scratch)) == announced


def test_the_released_cache_has_the_size_that_the_paper_s_numbers_give() -> None:
    # 300 context tokens and 1 + 4 + ... + 48^2 image tokens, less scale 0's single one: the context is its input.
    kept = 300 + sum(stage.side * stage.side for stage in list(SCHEDULES["released"])[1:-1])
    cache = build(SCHEDULES["released"], RELEASED, dtype=torch.bfloat16, device=META)
    assert cache.keys.shape == (24, 2, 24, kept, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scratch_is_in_the_dtype_that_products_are_taken_in(dtype: torch.dtype) -> None:
    cache = build(SCHEDULES["small"], SMALL, dtype=dtype)
    *earlier, last = SCHEDULES["small"]
    assert {view.dtype for stage in earlier for view in place(cache, stage).slot(0)} == {dtype}
    wide = torch.float32 if widens(cache.keys, "attention") else dtype
    assert {view.dtype for view in place(cache, last).slot(0)} == {wide}
