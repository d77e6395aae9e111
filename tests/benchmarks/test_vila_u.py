"""VILA-U's benchmark: its counts are those of the published sizes, its checkpoint loads, and its pairs compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

NEAR = 0.03  # relative; the figures are rounded to two digits

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def counts(benchmarks) -> dict[str, Any]:
    from vila_u_counts import count

    return count(slots=4)


@pytest.fixture(scope="module")
def tiny(benchmarks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vila_u_checkpoint import tiny_sizes, write_vila_u_checkpoint

    return write_vila_u_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", tiny_sizes(), dtype="fp32")


@pytest.mark.parametrize(
    ("part", "millions"),
    [("llama", 6740), ("siglip", 291), ("codebook", 16.8), ("decoder", 42), ("projector", 21), ("depth_transformer", 527)],
)
def test_parameters(counts, part: str, millions: float) -> None:
    assert counts["parameters"][part] / 1e6 == pytest.approx(millions, rel=NEAR)


def test_bytes(counts) -> None:
    """Weights in bf16; a picture's and a video's keys and values with guidance, of a prompt of 74 tokens."""
    cache = counts["cache_bytes"]
    assert counts["weights_bytes"] / 1e9 == pytest.approx(15.3, rel=NEAR)
    assert cache["position and row"] == 2 * 32 * 4096 * 2
    assert cache["picture"] / 1e9 == pytest.approx(0.34, rel=NEAR)
    assert cache["video"] / 1e9 == pytest.approx(2.2, rel=NEAR)
    assert counts["bytes_read_per_position"] / 1e9 == pytest.approx(17.3, rel=NEAR)


def test_multiplications(counts) -> None:
    position, picture = counts["mac_per_position_and_row"], counts["mac_per_picture"]
    assert position["llama"] / 1e9 == pytest.approx(6.6, rel=NEAR)
    assert position["depth transformer"] / 1e9 == pytest.approx(2.1, rel=NEAR)
    assert position["depth transformer, re-run"] / 1e9 == pytest.approx(4.9, rel=NEAR)
    once = 21e6 / 2 - 3 * 1024 * 2560 / 2  # the projector and the embedding of codes run once for both halves
    assert position["all"] == pytest.approx(position["llama"] + position["depth transformer"] + once, rel=1e-4)
    assert picture["siglip"] / 1e12 == pytest.approx(0.08, rel=0.05)
    assert picture["decoder"] / 1e12 == pytest.approx(0.13, rel=0.05)


def test_sixteen_slots(benchmarks) -> None:
    """Of the depth transformer alone: 8.2 GMAC with a cache, 64 without."""
    from vila_u_checkpoint import released_sizes
    from vila_u_compare import cached_slots, rerun_slots
    from vila_u_counts import META, ROWS, flops

    from hart_infer.models.vila_u.depth import DepthTransformer

    with META, torch.inference_mode():
        depth = DepthTransformer(released_sizes(slots=16).depth)
        given = torch.empty(ROWS, 4096), torch.empty(ROWS, 16, 1024)
        cached, rerun = (flops(lambda run=run: run(depth, *given)) / 2 / ROWS for run in (cached_slots, rerun_slots))
    assert cached / 1e9 == pytest.approx(8.2, rel=NEAR)
    assert rerun / 1e9 == pytest.approx(64, rel=NEAR)


def test_launches(counts) -> None:
    """One attention a layer and slot, and every matrix once: q, k and v are one in both transformers."""
    layers, slots, blocks = 32, 4, 6
    matrices = layers * 5 + 2 + slots * (1 + blocks * 4 + 1)  # with the projector's, a slot's input and its classifier
    for kind, attention in (("operators", "scaled_dot_product_attention"), ("with kernels", "attention")):
        found = counts["launches_by_name"][kind]
        assert found["linear"] == matrices
        assert found[attention] == layers + slots * blocks
        assert counts["launches_per_position"][kind] == sum(found.values())
    assert counts["launches_per_position"]["with kernels"] < 0.5 * counts["launches_per_position"]["operators"]
    assert counts["launches_by_name"]["with kernels"]["rope_cache"] == layers


def test_views_and_allocations_are_no_launches(benchmarks) -> None:
    from vila_u_counts import META, counted_launches

    x = torch.empty(2, 3, device=META)
    with counted_launches(fused=False) as found:
        y = torch.empty_like(x).t()[1:].contiguous() + 1
        y.add_(y.view(2, 2).transpose(0, 1))
    assert dict(found) == {"clone": 1, "add": 1, "add_": 1}


def test_cached_slots_are_rerun_ones(benchmarks) -> None:
    from vila_u_checkpoint import tiny_sizes
    from vila_u_compare import cached_slots, rerun_slots

    from hart_infer.models.vila_u.depth import DepthTransformer

    torch.manual_seed(0)
    depth = DepthTransformer(tiny_sizes().depth).requires_grad_(False)
    hidden, codes = torch.randn(3, depth.config.hidden_size), torch.randn(3, depth.config.num_slots, depth.config.code_dim)
    ours, theirs = cached_slots(depth, hidden, codes), rerun_slots(depth, hidden, codes)
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-5


def test_both_llamas_answer_alike(benchmarks) -> None:
    from vila_u_compare import llama_config, our_answer, same_llama, their_answer, transformers_llama

    request = {"width": 256, "layers": 2}
    ids = torch.randint(3, 32000, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = transformers_llama(request, torch.float32, torch.device("cpu"))
        ours = same_llama(theirs, llama_config(request))
        assert our_answer(ours, ids, 12)[0] == their_answer(theirs, ids, 12)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_draws(tiny: Path, dtype: torch.dtype) -> None:
    from hart_infer import VilaUPipeline

    pipe = VilaUPipeline.from_pretrained(tiny, dtype=dtype, device="cpu")
    images = pipe("a cat", seed=0, num_images_per_prompt=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert ((images > 0) & (images < 1)).float().mean() > 0.8  # few pixels are saturated
    assert not torch.equal(*images)


def test_a_run(tmp_path: Path) -> None:
    """All uses of the tiny model, in a process of their own."""
    import vila_u

    out = tmp_path / "result.json"
    options = ("--part", "uses", "--dtype", "fp32", "--threads", "1", "--uses-layers", "0")
    assert vila_u.main([*options, "--cache-dir", str(tmp_path), "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["machine"]["torch"] and found["settings"]["uses_layers"] == 0
    uses = found["results"]["uses"]["results"][0]["uses"]
    assert set(uses) == {"draw", "video", "answer", "encode", "reconstruct"}
    assert uses["draw"]["rows"] == 2 and uses["video"]["rows"] == 1
    assert all(use["seconds"] > 0 and use["peak_bytes"] > 0 for use in uses.values())
