"""Benchmarks' folders: laid out as their scorers read them, and a kill costs no picture twice."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import InputError

pytest.importorskip("torchmetrics")
pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[2]
STAND_IN = f"""
import argparse, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from hart_infer.batch.driver import run_batch
from hart_infer.batch.reading import read_table
from hart_infer.batch.worker import Model, WorkerOptions
from tests.batch import stand_in

parser = argparse.ArgumentParser()
parser.add_argument("rows")
parser.add_argument("--out")
parser.add_argument("--log")
parser.add_argument("--kill-after", type=int)
args = parser.parse_args()

def draw(prompts, *, seed, **settings):
    if args.kill_after is not None and len(open(args.log).readlines()) >= args.kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(args.log, "a") as log:
        log.writelines(str(one) + chr(10) for one in seed)
    return stand_in.draw(prompts, seed=seed, **settings)

load = lambda: Model(draw, "stand-in", {{}}, {{}}, stand_in.subject, "0123")
rows = read_table(args.rows).rows
end = run_batch(rows, WorkerOptions(load, args.out), chunk_size=1, described={{"model": "stand-in"}})
sys.exit(1 if end.failed else 0)
"""
METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`hart-infer batch` with a model that draws its seed as a colour, and writes down every seed that it draws."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "evaluate"))
    import drawing

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(drawing, "BATCH", (sys.executable, str(tmp_path / "stand_in.py")))
    (tmp_path / "log").touch()
    yield


def write_metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in METADATA))
    return path


def drawn_seeds(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split()


def test_geneval_is_laid_out_for_its_scorer(tmp_path):
    from geneval import main

    assert main([str(write_metadata(tmp_path)), str(tmp_path / "out"), "--", "--log", str(tmp_path / "log")]) == 0
    images = tmp_path / "out" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["00000", "00001"]
    for number, about in enumerate(METADATA):
        folder = images / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == about
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == [f"{i:05d}.png" for i in range(4)]
        assert len({Image.open(path).getpixel((0, 0)) for path in samples}) == 4


def test_a_kill_draws_nothing_twice(tmp_path, capfd):
    from geneval import main

    arguments = [str(write_metadata(tmp_path)), str(tmp_path / "out"), "--", "--log", str(tmp_path / "log")]
    assert main([*arguments, "--kill-after", "3"]) == 1
    assert "goes on where it was" in capfd.readouterr().err
    assert len(drawn_seeds(tmp_path)) == 3 and not (tmp_path / "out" / "images").exists()
    assert main(arguments) == 0
    assert main(arguments) == 0
    counts = Counter(drawn_seeds(tmp_path))
    assert len(counts) == 8 and set(counts.values()) == {1}
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 8


def test_what_a_kill_left_of_a_layout_is_made_anew(tmp_path):
    from geneval import main

    part = tmp_path / "out" / "images" / ".00000.part" / "samples"
    part.mkdir(parents=True)
    (part / "00009.png").write_bytes(b"half")
    assert main([str(write_metadata(tmp_path)), str(tmp_path / "out"), "--", "--log", str(tmp_path / "log")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["00000", "00001"]


def test_other_prompts_are_not_mixed_in(tmp_path, capfd):
    from geneval import main

    path, log = write_metadata(tmp_path), ["--", "--log", str(tmp_path / "log")]
    assert main([str(path), str(tmp_path / "out"), *log]) == 0
    path.write_text(path.read_text().replace("bench", "couch"))
    assert main([str(path), str(tmp_path / "out"), *log]) == 1
    assert "other prompts" in capfd.readouterr().err


def test_dpg_has_the_four_pictures_where_its_scorer_cuts(tmp_path, capsys):
    from dpg import main

    (tmp_path / "prompts").mkdir()
    for name in ("partiprompts7", "COCOval2014_1"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"A picture\nof {name}.\n")
    assert main([str(tmp_path / "prompts"), str(tmp_path / "out"), "--", "--log", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "images"), "4"]
    for name in ("partiprompts7", "COCOval2014_1"):
        whole = np.asarray(Image.open(tmp_path / "out" / "images" / f"{name}.png"))
        assert whole.shape == (8, 8, 3)
        corners = [whole[:4, :4], whole[:4, 4:], whole[4:, :4], whole[4:, 4:]]
        for i, corner in enumerate(corners):
            (drawn,) = (tmp_path / "out" / "drawn" / "images").glob(f"{name}-{i}*.png")  # with a hash behind capitals
            assert np.array_equal(corner, np.asarray(Image.open(drawn)))


def test_mjhq_scores_each_category_alone(tmp_path, capsys):
    from mjhq import main
    from score import main as score

    random, about = np.random.default_rng(0), {}
    for i in range(12):
        category = ("animals", "food")[i % 2]
        about[f"id{i:02d}"] = {"category": category, "prompt": f"thing {i}"}
        (tmp_path / "real" / category).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(
            tmp_path / "real" / category / f"id{i:02d}.jpg"
        )
    (tmp_path / "meta_data.json").write_text(json.dumps(about))
    network = torch.jit.trace(lambda images: images.mean(dim=(2, 3)), torch.zeros(1, 3, 4, 4))
    network.save(str(tmp_path / "means.pt"))
    scoring = ["--features", "torchscript", "--weights", str(tmp_path / "means.pt"), "--device", "cpu"]
    files = [str(tmp_path / "meta_data.json"), str(tmp_path / "out"), "--real", str(tmp_path / "real")]
    assert main([*files, *scoring, "--", "--log", str(tmp_path / "log")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["model"], found["weights"], found["drawn"]["pictures"]) == ("stand-in", "0123", 12)
    assert {name: each["pictures"] for name, each in found["parts"].items()} == {"animals": 6, "food": 6}
    assert found["reference"]["formats"] == ["JPEG"] and "compression" in capsys.readouterr().out
    for name, part in found["parts"].items():
        (tmp_path / name).mkdir()
        for i, each in about.items():
            if each["category"] == name:
                shutil.copy(tmp_path / "out" / "drawn" / "images" / f"{i}.png", tmp_path / name)
        alone = [str(tmp_path / "real" / name), str(tmp_path / name), *scoring, "--out", str(tmp_path / f"{name}.json")]
        assert score(alone) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["score"]["fid"]["value"] == pytest.approx(
            part["fid"]["value"]
        )


def test_mjhq_misses_no_real_picture(tmp_path):
    from mjhq import Entry, score_categories
    from pictures import of_array
    from score import Scoring

    real = of_array("real", np.zeros((1, 4, 4, 3), dtype=np.uint8), ["food/a"])
    drawn = of_array("drawn", np.zeros((2, 4, 4, 3), dtype=np.uint8), ["a", "b"])
    with pytest.raises(InputError, match="food/b"):
        score_categories(real, drawn, [Entry("a", "food", ""), Entry("b", "food", "")], Scoring("torchscript", tmp_path / "no"))


@pytest.mark.parametrize("content", ["[]", '{"a": {"prompt": "x"}}', '{"a": 1}', "{}", "no"])
def test_mjhq_refuses_what_is_no_list_of_prompts(tmp_path, content):
    from mjhq import read_entries

    (tmp_path / "meta_data.json").write_text(content)
    with pytest.raises(InputError):
        read_entries(tmp_path / "meta_data.json")
