"""The scripts that time, model, compare and plot, on the tiny model; the sweep of tiles without a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts(benchmarks: None) -> dict[str, ModuleType]:
    names = ("architecture", "attention_tiles", "counting", "latency", "measure", "plot", "roofline", "run")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def released(scripts: dict[str, ModuleType]) -> Any:
    counting = scripts["counting"]
    return counting.launches(counting.Work(scripts["architecture"].PRESETS["1024"]), kernels=True)


def test_the_counts_are_those_of_the_published_shapes(released: Any) -> None:
    """TMAC of one 1024 px picture with guidance, as they follow from its shapes."""
    tera: dict[str, float] = {}
    for launch in released:
        tera[launch.kind] = tera.get(launch.kind, 0) + launch.flops / 2e12
    assert tera["attention"] == pytest.approx(8.82, abs=0.02)
    assert tera["linear"] == pytest.approx(15.38, abs=0.05)  # .12 of the head and 2.2 of the diffusion among them
    assert tera["convolution"] + tera["wide attention"] == pytest.approx(3.23, abs=0.05)
    stages = list(dict.fromkeys(launch.stage for launch in released))
    assert stages[0] == "scale 0 (1x1)" and stages[-3:] == ["scale 13 (64x64)", "diffusion", "decode"] and len(stages) == 16


@pytest.mark.slow
def test_kernels_save_launches_and_bytes_but_no_product(scripts: dict[str, ModuleType], released: Any) -> None:
    counting = scripts["counting"]
    plain = counting.launches(counting.Work(scripts["architecture"].PRESETS["1024"]), kernels=False)
    assert len(released) < len(plain) / 2 and sum(x.nbytes for x in released) < sum(x.nbytes for x in plain)
    products = [sum(x.flops for x in found if x.kind in scripts["roofline"].KINDS) for found in (released, plain)]
    assert products[0] == products[1]


@pytest.mark.slow
def test_fast_modes_and_batches_are_counted(scripts: dict[str, ModuleType], released: Any) -> None:
    counting, preset = scripts["counting"], scripts["architecture"].PRESETS["1024"]

    def operations(**work: Any) -> int:
        return sum(x.flops for x in counting.launches(counting.Work(preset, **work), kernels=True))

    exact = sum(x.flops for x in released)
    assert exact / operations(speed="turbo") == pytest.approx(2.63, abs=0.15)  # docs/fast.md
    assert operations(batch_size=2) / exact == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("device", ["a100", "h100", "4090"])
def test_a_gpu_is_modelled_and_called_a_model(
    scripts: dict[str, ModuleType], device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "roofline.json"
    assert scripts["roofline"].main(["--device", device, "--size", "256", "--out", str(out)]) == 0
    assert "none measured: a MODEL" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert 0 < record["total"]["seconds"] < record["total"]["eager"] and record["rates"]["assumed"] and not record["measured"]


def test_a_launch_takes_the_longer_of_its_bytes_and_operations(scripts: dict[str, ModuleType]) -> None:
    roofline, Launch = scripts["roofline"], scripts["counting"].Launch
    device = roofline.Device("x", True, 1e9, 1e12, 1e12, 1e12, 1e12, 1e6, 1e-3, 5e-3)
    times = [
        Launch("s", "mm", "linear", 10**6, 3 * 10**12),
        Launch("s", "mm", "linear", 7 * 10**9, 1),
        Launch("s", "add", "other", 0, 0),
    ]
    assert [device.seconds(launch) for launch in times] == pytest.approx([3.001, 7.001, 0.001])
    assert roofline.predicted(times, device)["s"]["eager"] == pytest.approx(3.001 + 7.001 + 0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_is_timed_where_the_cpu_has_kernels_of_its_own(scripts: dict[str, ModuleType], dtype: torch.dtype) -> None:
    assert 0 < scripts["roofline"].launch_seconds(dtype) < 0.1


def test_latency_in_one_command(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    latency, measure = scripts["latency"], scripts["measure"]
    monkeypatch.setitem(measure.SIZES, 128, "tiny")
    out = tmp_path / "latency.json"
    arguments = ["--size", "128", "--dtype", "fp32", "--device", "cpu", "--batch", "1", "2", "--speed", "exact", "draft"]
    assert latency.main([*arguments, "--repeats", "2", "--cache-dir", str(tmp_path), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    kinds = [(row["batch"], row["speed"], row["graphs"]) for row in record["rows"]]
    assert kinds == [(1, "exact", False), (1, "draft", False), (2, "exact", False)], "graphs only on CUDA"
    assert all(0 < row["seconds"]["p50"] <= row["seconds"]["p95"] and row["peak_bytes"] > 0 for row in record["rows"])
    assert "decode" in record["stages"] and "pictures/s" in capsys.readouterr().out
    cuda = list(latency.configurations([1, 8], ["exact", "fast"], torch.device("cuda")))
    assert [str(how) for how in cuda][-2:] == ["batch 8  exact  eager", "batch 8  exact  graphs"] and len(cuda) == 6


def test_a_slower_stage_is_flagged_and_a_slower_machine_is_not(scripts: dict[str, ModuleType]) -> None:
    run = scripts["run"]
    seconds = {"scale 0": 1.0, "scale 1": 2.0, "decode": 4.0, "other": 0.01}
    before = run.ratios(seconds, 0.1)
    assert before == pytest.approx({"scale 0": 10, "scale 1": 20, "decode": 40, run.OTHERS: 0.1, "whole": 70.1})
    assert run.slower(run.ratios({name: 3 * value for name, value in seconds.items()}, 0.3), before) == []
    (found,) = run.slower(run.ratios(seconds | {"scale 1": 2.4}, 0.1), before)
    assert found.startswith("scale 1 takes 1.20 times what it took (24.0 products, not 20.0)")


def test_records_are_compared_in_one_command(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = scripts["run"]
    monkeypatch.setitem(scripts["measure"].SIZES, 128, "tiny")
    out = tmp_path / "run.json"
    common = ["--size", "128", "--dtype", "fp32", "--repeats", "1", "--cache-dir", str(tmp_path), "--threads", "1"]
    assert run.main([*common, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    record["ratios"] = {name: value / 1e3 for name, value in record["ratios"].items()}
    out.write_text(json.dumps(record))
    assert run.main([*common, "--compare", str(out)]) == 1
    assert "whole takes" in capsys.readouterr().err
    record["machine"]["cpu"] = "another"
    out.write_text(json.dumps(record))
    assert run.main([*common, "--compare", str(out)]) == 2
    assert "on another, not of this" in capsys.readouterr().err


def test_the_winner_of_a_sweep_is_the_tile_with_the_least_time_over_all_shapes(scripts: dict[str, ModuleType]) -> None:
    tiles = scripts["attention_tiles"]
    shapes, fast, even, partly = ((2, 64, 99), (2, 128, 200)), (64, 64, 4, 2), (128, 64, 4, 3), (64, 32, 4, 2)
    seconds = {fast: (1, 9), even: (3, 3), partly: (0.1,)}
    timings = [
        tiles.Timing(64, *shape, ranged, tile, time)
        for tile, times in seconds.items()
        for shape, time in zip(shapes, times, strict=False)
        for ranged in (False, True)
    ]
    assert tiles.best(timings, 64, shapes) == even
    assert tiles.best(timings, 128, shapes) is None


def test_winners_are_written_into_the_kernel_s_table(scripts: dict[str, ModuleType]) -> None:
    tiles = scripts["attention_tiles"]
    source = tiles.KERNEL.read_text(encoding="utf-8")
    rows = [tiles.row(80, 64, 64, (128, 64, 4, 3)), tiles.row(80, 64, 0, (16, 64, 4, 3))]
    once = tiles.written(source, rows, "NVIDIA A100")
    twice = tiles.written(once, [tiles.row(90, 64, 64, (128, 128, 8, 2))], "NVIDIA H100")
    wide = tiles.written(twice, [tiles.row(80, 128, 64, (128, 32, 8, 2))], "NVIDIA A100")
    again = tiles.written(wide, rows[:1], "NVIDIA A100")
    names: dict[str, Any] = {}
    start, end = again.index("TIMED:"), again.index("@triton.jit\ndef _attend")
    exec(f"from hart_infer.kernels.launch import Config\nMAX_HEAD_DIM = 128\n{again[start:end]}", names)
    found = [(row[0], *row[2:4], row[4].rows, row[4].warps) for row in names["TIMED"]]
    assert found == [((90,), 64, 64, 128, 8), ((80,), 64, 64, 128, 4), ((80,), 128, 64, 128, 8)], "narrow ones first"
    assert names["CONFIGS"][:3] == names["TIMED"] and len(names["CONFIGS"]) > 8
    assert "# NVIDIA A100" in again


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_without_a_gpu_says_so(scripts: dict[str, ModuleType], capsys: Any) -> None:
    assert scripts["attention_tiles"].main([]) == 1
    assert capsys.readouterr().err == "error: a sweep of attention's tiles needs a CUDA device, and there is none\n"


def test_a_plot(scripts: dict[str, ModuleType], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    roofline, plot = scripts["roofline"], scripts["plot"]
    record, out = tmp_path / "roofline.json", tmp_path / "plot.png"
    assert roofline.main(["--size", "256", "--out", str(record)]) == 0
    assert plot.main(["--roofline", str(record), "--size", "256", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 900
    other = json.loads(record.read_text())
    latency = tmp_path / "latency.json"
    for settings, told in (
        ({"dtype": "fp32", "checkpoint": "random weights"}, "is of fp32, not of bf16"),
        ({"dtype": "bf16", "checkpoint": "mine"}, "is of mine, not of random weights"),
    ):
        latency.write_text(json.dumps({"machine": other["machine"], "settings": settings}))
        assert plot.main(["--roofline", str(record), "--latency", str(latency), "--out", str(out)]) == 1
        assert told in capsys.readouterr().err
    other["machine"]["cpu"] = "another"
    record.write_text(json.dumps(other))
    against = next((ROOT / "benchmarks/results").glob("against_official_256*.json"))
    assert plot.main(["--roofline", str(record), "--against", str(against), "--out", str(out)]) == 1
    assert "not of another" in capsys.readouterr().err
