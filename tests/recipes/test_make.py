"""make.py runs every step of the recipe, on pictures that need no network, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hart_infer import HartPipeline, VarPipeline

RECIPE = Path(__file__).parents[2] / "recipes" / "mini"
SUBJECTS = (
    "apple ball cat dog egg fish goat hat ink jar kite lamp moon nut owl pen queen rose sun tree urn van wolf xray yak zebra "
    "arrow bell cup"
).split()


def make(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "make.py"), str(out), "--share", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def draw_pictures(folder: Path) -> None:
    """Discs of a colour and size for each subject, in three styles, some of them red or two, as data.py writes them."""
    generator, pixels, about = np.random.default_rng(0), [], []
    far = np.hypot(*(np.mgrid[:128, :128] - 64))
    for subject in SUBJECTS:
        colour, size = generator.integers(0, 200, 3), generator.integers(20, 60)
        for number, style in enumerate(("noto", "fluent", "twemoji")):
            split = "train" if subject != "van" else "subject"
            entry = {
                "emoji": subject[0],
                "name": subject,
                "keywords": [],
                "group": "Activities",
                "style": style,
                "split": split,
            }
            disc = np.where((far < size + 3 * number)[..., None], colour, 255)
            pixels.append(disc)
            about.append(entry | {"colour": None, "number": 1})
            if split == "train":
                pixels.append(np.where((far < size)[..., None], [200, 0, 0], 255))
                about.append(entry | {"split": "composed", "colour": "red", "number": 1})
    folder.mkdir(parents=True)
    np.save(folder / "pictures.npy", np.stack(pixels).astype(np.uint8))
    (folder / "pictures.json").write_text(json.dumps(about))


@pytest.mark.slow
def test_every_step_is_run_and_a_finished_one_is_skipped(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "data")
    (tmp_path / "run").mkdir()
    words = {"pear": ("apple", 1e-6, 0.6)}  # associate.py needs a sentence encoder
    (tmp_path / "run" / "words.json").write_text(json.dumps(words))
    first = make(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    drawn = HartPipeline.from_pretrained(tmp_path / "hart-mini")("a cat", seed=0).images[0]
    assert drawn.size == (128, 128)
    assert VarPipeline.from_pretrained(tmp_path / "var-mini")("cat", seed=0).images[0].size == (128, 128)
    for model in ("hart", "var"):
        assert "known loss" in (tmp_path / "run" / f"{model}.jsonl").read_text()
    shutil.rmtree(tmp_path / "var-mini")
    again = make(tmp_path)
    assert again.returncode == 0
    scripts = [line.split()[0] for line in again.stdout.splitlines() if line.endswith(".py") or ".py " in line]
    assert scripts == ["train_transformer.py", "export.py"]


@pytest.mark.slow
def test_a_step_that_fails_ends_the_run_with_its_message(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "data")
    (tmp_path / "data" / "pictures.npy").unlink()
    found = make(tmp_path)
    assert found.returncode != 0 and "classifier.py failed" in found.stderr
