"""The examples run as they stand, offline, from top to bottom."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_infer import HartPipeline
from hart_infer.images.files import make_grid
from tests.golden.data import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started finds this package, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


def test_the_notebook(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / "hart_infer.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the notebook's outputs before it is committed"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) == 5
    assert any("<figcaption>seed 7</figcaption>" in data.get("text/html", "") for data in shown)


def test_the_script_draws_what_the_pipeline_draws(tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / "like_diffusers.py"), "a cat", "a dog", "--seed", "5", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.splitlines()[-1] == str(tmp_path / "1.png")
    assert "scale 5: latents (2, 16, 16, 16)" in run.stdout
    expected = HartPipeline.from_pretrained("hart-mini", device="cpu")(["a cat", "a dog"], seed=5).images
    assert [Image.open(tmp_path / f"{i}.png").tobytes() for i in range(2)] == [image.tobytes() for image in expected]


def test_the_animation_ends_with_the_pictures(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "sharpening.py"), "prompts.txt", "out.gif", "--seed", "5", "--columns", "1"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    pipe = HartPipeline.from_pretrained("hart-mini", device="cpu")
    expected = make_grid(pipe(["a cat", "a dog"], seed=5).images, 1).quantize()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames == 6
        animation.seek(5)
        assert animation.info["duration"] == 3200 and animation.size == expected.size
        gap = np.abs(np.asarray(animation.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
        assert gap.mean() < 3  # of 255; without the residual diffusion it is more


def test_two_processes_draw_what_one_does(tmp_path: Path):
    """By torchrun, over gloo on the CPU; three prompts, so that the shares differ."""
    prompts = ["a cat", "a dog", "a red heart, fluent style"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "data_parallel.py"), "prompts.txt", "pictures", "--seed", "5"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300)
    assert run.stdout.splitlines()[-1] == "3 pictures by 2 processes in pictures"
    expected = HartPipeline.from_pretrained("hart-mini", device="cpu")(prompts, seed=5).images
    found = [Image.open(tmp_path / "pictures" / f"{i:06d}.png").tobytes() for i in range(3)]
    assert found == [image.tobytes() for image in expected]


def test_two_processes_share_a_picture(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "guidance_parallel.py"), "a cat", "--seed", "5", "--guidance", "1.5", "--out", "cat.png"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    with Image.open(tmp_path / "cat.png") as image:  # what is on it: tests/pipelines/test_guidance_parallel.py
        assert image.size == (128, 128) and len(image.getcolors(2**14)) > 100
