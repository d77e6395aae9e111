"""The command with VAR's models: the family is found from the files, prompts are classes, what HART alone has is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import VarPipeline
from hart_infer.checkpoints.families import find_family
from hart_infer.cli import main
from hart_infer.cli.sampling import PRESETS
from hart_infer.errors import CheckpointNotFoundError, ConfigError
from hart_infer.images.files import read_metadata
from hart_infer.pipelines import var
from tests.cli.test_cli import here, pixels, shell
from tests.hub import HubServer

NAMES = ["cock", "tench", "golden retriever", "tabby", "tiger", "daisy", "acorn", "ant", "bee", "llama"]


@pytest.fixture
def var_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_var_tiny: Path) -> Path:
    """A small released checkpoint of ten classes; the test runs in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return whole_var_tiny


@pytest.fixture
def named(var_tiny: Path, tmp_path: Path) -> Path:
    """The same with names of its classes, and a second transformer."""
    folder = tmp_path / "named"
    folder.mkdir()
    for file in var_tiny.glob("v*.pth"):
        (folder / file.name).symlink_to(file)
    (folder / "var_d9.pth").symlink_to(var_tiny / "var_d2.pth")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


# --- which family


def test_families_by_their_files(hart_tiny: Path, var_tiny: Path, tmp_path: Path) -> None:
    assert find_family("hart-mini") == "HART"
    assert find_family(hart_tiny) == find_family(hart_tiny / "llm") == "HART"
    assert find_family(var_tiny) == "VAR"
    index = tmp_path / "own" / "model_index.json"
    index.parent.mkdir()
    for name, family in (("VarPipeline", "VAR"), ("HartPipeline", "HART")):
        index.write_text(json.dumps({"_class_name": name}))
        assert find_family(index.parent) == family


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", 7, None, ["VarPipeline"]])
def test_an_index_of_another_pipeline(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ConfigError, match="not of HartPipeline, VarPipeline or VilaUPipeline"):
        find_family(tmp_path)


def test_a_folder_of_no_family(tmp_path: Path) -> None:
    (tmp_path / "vae_ch32.pth").touch()
    (tmp_path / "my_var_d16.pth").touch()
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint of HART, VAR or VILA-U: neither model_index.json"):
        find_family(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("generate 1 --steps 4", "is a VAR model, which does not take --steps; leave it out."),
        ("generate 1 --negative-prompt x", "does not take --negative-prompt; leave it out."),
        ("generate 1 --no-system-prompt --no-ema", "does not take --no-system-prompt or --no-ema; leave them out."),
        ("generate 1 --text-encoder x", "does not take --text-encoder; leave it out."),
        ("edit photo.png 1 --box 0,0,1,.5 --steps 4", "does not take --steps; leave it out."),
        ("reconstruct photo.png -o a.png --no-ema", "does not take --no-ema; leave it out."),
        ("generate 10", "a class must be a whole number from 0 to 9, not 10."),
        ("generate 1 2 tiger", '"tiger" is a name, but this checkpoint has no names; give a number from 0 to 9.'),
        ("edit photo.png --box 0,0,1,.5 --size 7", "--size 7 is not one that this checkpoint was trained for; it has 256."),
    ],
)
def test_what_var_does_not_take_is_a_wrong_command_line(
    var_tiny: Path, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    Image.new("RGB", (8, 8)).save("photo.png")
    assert main([*arguments.split(), "-q", "-m", str(var_tiny)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 2
    assert here() == ["photo.png"]


@pytest.mark.parametrize(
    ("command", "option"),
    [(["info"], "--no-ema"), (["convert", "-q"], "--no-ema"), (["convert", "-q"], "--no-text-encoder")],
)
def test_options_of_hart_with_a_positional_model(
    var_tiny: Path, capsys: pytest.CaptureFixture[str], command: list[str], option: str
) -> None:
    destination = ["out"] if command[0] == "convert" else []
    assert main([*command, str(var_tiny), *destination, option]) == 2
    assert f"which does not take {option}; leave it out." in capsys.readouterr().err
    assert here() == []


def test_what_hart_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a cat", "--preset", "fid", "-q"]) == 2
    assert "hart-mini is a HART model, which does not take --preset; leave it out." in capsys.readouterr().err
    assert main(["generate", "a cat", "--variant", "fp16", "-q"]) == 1
    assert "expected model.fp16.safetensors" in capsys.readouterr().err
    assert main(["info", "hart-mini", "--variant", "fp16"]) == 1
    assert "expected model.fp16.safetensors" in capsys.readouterr().err


# --- generate


def test_pictures_are_those_of_the_pipeline(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "-m", str(named), "--variant", "d2", "--seed", "5", "-q"]
    assert main([*command, "golden retriever", "3", "-n", "2", "-o", "{prompt}-{seed}.png", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"path": "golden-retriever-5.png", "class_index": 2, "class_name": "golden retriever", "seed": 5}
    assert [line["path"] for line in lines[1:]] == ["golden-retriever-6.png", "3-7.png", "3-8.png"]
    assert lines[3]["class_name"] == "tabby"
    pipe = VarPipeline.from_pretrained(named, variant="d2")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(["golden retriever", 3], num_images_per_prompt=2, seed=5).images
    for line, image in zip(lines, expected, strict=True):
        assert np.array_equal(pixels(line["path"]), np.asarray(image))


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--preset fid", {"guidance_scale": 1.5, "top_p": 0.96}),
        ("--preset fid --guidance-scale 2 --smooth", {"guidance_scale": 2.0, "top_p": 0.96, "more_smooth": True}),
        ("--top-k 3 --top-p 0", {"top_k": 3, "top_p": 0.0}),
        ("--speed fast", {"speed": "fast", "guidance_stops_at": 16, "late_temperature": 1.0}),
    ],
)
def test_metadata_says_the_class_and_how_it_was_drawn(
    var_tiny: Path, capsys: pytest.CaptureFixture[str], flags: str, changed: dict[str, Any]
) -> None:
    assert main(["generate", "7", "-o", "a.png", "-s", "1", "-q", "-m", str(var_tiny), "--device", "cpu", *flags.split()]) == 0
    metadata = read_metadata("a.png")
    assert metadata
    assert metadata.pop("software").startswith("hart-infer ")
    settings = {"guidance_scale": 4.0, "top_k": 900, "top_p": 0.95, "more_smooth": False, "speed": "exact"} | changed
    made_of = {"class_index": 7, "seed": 1, "size": 256}
    assert metadata == {**settings, **made_of, "model": "var-tiny", "device": "cpu", "dtype": "float32"}
    capsys.readouterr()
    assert main(["info", "a.png"]) == 0
    assert re.search(r"^  class index +7$", capsys.readouterr().out, re.MULTILINE)


def test_the_preset_is_the_pipeline_s(var_tiny: Path) -> None:
    assert tuple(var.PRESETS) == PRESETS
    assert main(["generate", "1", "-m", str(var_tiny), "-q", "-s", "3", "--preset", "fid", "-o", "a.png"]) == 0
    pipe = VarPipeline.from_pretrained(var_tiny)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels("a.png"), np.asarray(pipe(1, seed=3, preset="fid").images[0]))


def test_grid(named: Path) -> None:
    command = ["generate", "tiger", "ant", "-m", str(named), "--variant", "d2", "-q", "-s", "1", "--device", "cpu"]
    assert main([*command, "--grid", "-o", "g.png"]) == 0
    metadata = read_metadata("g.png")
    assert metadata
    wanted = {"class_indices": [4, 7], "class_names": ["tiger", "ant"], "seeds": [1, 2], "variant": "d2"}
    assert metadata.items() >= wanted.items()
    assert here() == ["g.png"]


def test_several_models_and_no_variant(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "1", "-q", "-m"], ["info"]):
        assert main([*command, str(named)]) == 1
        assert "has several VAR models; choose one by variant= (--variant): d2, d9." in capsys.readouterr().err
        assert main([*command, str(named), "--variant", "d7"]) == 1
        assert "has no variant 'd7'; it has d2, d9." in capsys.readouterr().err
    assert main(["generate", "retriever", "-q", "-m", str(named), "--variant", "d2"]) == 2
    assert "did you mean golden retriever (2)?" in capsys.readouterr().err
    assert here() == []


# --- info, convert, reconstruct


def test_info_counts_what_is_loaded(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(named), "--variant", "d2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    pipe = VarPipeline.from_pretrained(named, variant="d2")
    parts = [*pipe.transformer.parameters(), *pipe.autoencoder.parameters()]
    assert report["family"] == "VAR"
    assert report["parameters"]["total"] == sum(part.numel() for part in parts)
    assert "residual_diffusion" not in report["parameters"]
    sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    assert report["schedule"] == {
        "picture_pixels": 256,
        "scales": 10,
        "sides": sides,
        "image_tokens": 680,
        "classes": 10,
    }
    cache = 2 * 2 * 2 * 680 * pipe.transformer.width * 4  # depth, keys and values, guidance
    assert report["memory"]["fp32"]["cache_bytes_per_picture"] == cache
    assert report["defaults"] == {"guidance_scale": 4.0, "top_k": 900, "top_p": 0.95, "late_temperature": 1.0}
    assert list(report["files"]) == ["var_d2.pth", "vae_ch32v1024z8.pth", "class names"]
    assert report["files"]["var_d2.pth"]["tensors_never_read"] in (3, 4)  # the subset lacks a dead one
    assert main(["info", str(named), "--variant", "d2"]) == 0
    assert capsys.readouterr().out.startswith(f"{named} (VAR)\nparameters\n")


def test_converted_checkpoint_draws_the_same(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(named), "own", "--variant", "d2", "-q"]) == 0
    assert capsys.readouterr().out == "own\n"
    assert main(["generate", "ant", "-s", "1", "-q", "-o", "a.png", "-m", str(named), "--variant", "d2"]) == 0
    assert main(["generate", "ant", "-s", "1", "-q", "-o", "b.png", "-m", "own"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    capsys.readouterr()
    reports = []
    for arguments in ([str(named), "--variant", "d2"], ["own"]):
        assert main(["info", *arguments, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    files = [report.pop("files") for report in reports]
    assert reports[0] == reports[1]
    assert list(files[1]) == ["transformer/model.safetensors", "autoencoder/model.safetensors", "class names"]


def test_reconstruct_takes_the_codes_of_a_discrete_tokenizer(var_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((50, 40), 50).convert("RGB").save("photo.jpg")
    command = ["reconstruct", "photo.jpg", "-o", "again.png", "-q", "-m", str(var_tiny)]
    assert main(command) == 0
    assert re.fullmatch(r"again.png\tdiscrete\t\d+\.\d\d dB\n", capsys.readouterr().out)
    pipe = VarPipeline.from_pretrained(var_tiny)
    expected = pipe.reconstruct(Image.open("photo.jpg"), mode="discrete")
    assert np.array_equal(pixels("again.png"), np.asarray(expected))
    assert main([*command, "--mode", "hybrid"]) == 0
    assert not np.array_equal(pixels("again.png"), np.asarray(expected))


def test_a_hub_id_is_described_once_its_weights_are_here(var_tiny: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "FoundationVision" / "var"
    repo.mkdir(parents=True)
    for file in var_tiny.glob("v*.pth"):
        shutil.copy(file, repo)
    shutil.copy(repo / "var_d2.pth", repo / "var_d9.pth")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with HubServer(tmp_path / "hub") as hub:
        environment["HF_ENDPOINT"] = hub.url
        early = shell("info", "FoundationVision/var", "--variant", "d2", more=environment)
        assert hub.downloaded("FoundationVision/var") == []
        drawn = shell("generate", "1", "-q", "-m", "FoundationVision/var", "--variant", "d2", "-o", "a.png", more=environment)
        assert hub.downloaded("FoundationVision/var") == ["vae_ch32v1024z8.pth", "var_d2.pth"]
        late = shell("info", "FoundationVision/var", "--variant", "d2", "--json", more=environment)
        other = shell("info", "FoundationVision/var", "--variant", "d9", more=environment)
        doctor = shell("doctor", "--json", more=environment)
    assert early.returncode == other.returncode == 1
    assert early.stderr == other.stderr
    assert early.stderr.startswith("hart-infer info: FoundationVision/var is a VAR model whose weights are not on this machine")
    assert len(early.stderr.splitlines()) == 1
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert list(json.loads(late.stdout)["files"]) == ["var_d2.pth", "vae_ch32v1024z8.pth"]
    assert json.loads(doctor.stdout)["hub"]["released_models_cached"] == ["FoundationVision/var"]


# --- edit


@pytest.fixture
def photo(var_tiny: Path) -> Path:
    """photo.png and masks of its size in the working folder."""
    image = np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)
    Image.fromarray(image).save("photo.png")
    mask = np.zeros((260, 300), dtype=np.uint8)
    mask[100:180, 120:200] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask * 0).save("black.png")
    Image.new("L", (30, 26), 255).save("small.png")
    Path("text.png").write_text("no picture")
    return Path("photo.png")


INPUTS = ["black.png", "mask.png", "photo.png", "small.png", "text.png"]


def test_edit_is_the_pipeline_s(photo: Path, var_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["-m", str(var_tiny), "-q", "-s", "4", "--device", "cpu"]
    assert main(["edit", "photo.png", "--mask", "mask.png", "3", *model, "-n", "2", "-o", "{seed}.png"]) == 0
    assert capsys.readouterr().out.split() == ["4.png", "5.png"]
    assert main(["edit", "photo.png", "--box", "0.25,0.25,0.75,0.5", *model, "-o", "box.png", "--no-blend"]) == 0
    assert main(["edit", "photo.png", "3", "--box", "0.25,0.25,0.75,0.5", "--outside", *model, "-o", "around.png"]) == 0
    pipe = VarPipeline.from_pretrained(var_tiny)
    pipe.set_progress_bar_config(disable=True)
    image, mask = Image.open("photo.png"), Image.open("mask.png")
    box = (0.25, 0.25, 0.75, 0.5)
    inside = pipe.inpaint(image, mask, 3, num_images_per_prompt=2, seed=4).images
    assert np.array_equal(pixels("4.png"), np.asarray(inside[0]))
    assert np.array_equal(pixels("5.png"), np.asarray(inside[1]))
    assert np.array_equal(pixels("box.png"), np.asarray(pipe.inpaint(image, box, seed=4, blend=False).images[0]))
    assert np.array_equal(pixels("around.png"), np.asarray(pipe.outpaint(image, box, 3, seed=4).images[0]))
    metadata = read_metadata("4.png")
    assert metadata
    wanted = {"edited": "photo.png", "mask": "mask.png", "blend": True, "class_index": 3, "seed": 4, "guidance_scale": 4.0}
    assert metadata.items() >= wanted.items()
    metadata = read_metadata("box.png")
    assert metadata
    assert metadata.items() >= {"edited": "photo.png", "box": list(box), "outside": False, "blend": False}.items()
    assert not {"class_index", "prompt", "mask"} & metadata.keys()


def test_edit_with_grid_previews_and_json(photo: Path, var_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["edit", "photo.png", "--box", "0,0,.5,1", "-n", "2", "--batch-size", "2", "-s", "1", "-m", str(var_tiny), "-q"]
    assert main([*command, "-o", "out/", "--grid", "--singles", "--json", "--preview-dir", "steps"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("seed") or line["seeds"] for line in lines] == [1, 2, [1, 2]]
    assert lines[0] == {"path": str(Path("out/hart-000.png")), "seed": 1}
    assert len(list(Path("steps").iterdir())) == 2 * 10


def test_edit_with_hart(photo: Path, capsys: pytest.CaptureFixture[str], hart_tiny: Path, text_tiny: Path) -> None:
    model = ["-m", str(hart_tiny), "--text-encoder", str(text_tiny), "-q", "-s", "1", "--steps", "4", "--dtype", "fp32"]
    assert main(["edit", "photo.png", "--box", "0,0,0.5,1", "a cat", *model, "-o", "{prompt}.png"]) == 0
    assert main(["edit", "photo.png", "--box", "0,0,0.5,1", *model, "-o", "{prompt}.png"]) == 0
    assert capsys.readouterr().out.split() == ["a-cat.png", "picture.png"]
    metadata = read_metadata("a-cat.png")
    assert metadata
    assert metadata.items() >= {"prompt": "a cat", "num_inference_steps": 4, "more_smooth": True}.items()
    again = Image.open("a-cat.png")
    assert again.size == (32, 32)
    kept = torch.tensor(np.asarray(again))[28:]
    assert torch.equal(kept, torch.tensor(pixels("picture.png"))[28:])
    assert main(["edit", "photo.png", "--box", "0,0,0.5,1", "--preset", "fid", *model]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ("photo.png", 2, "one of the arguments --mask --box is required"),
        ("--mask mask.png", 2, "required: IMAGE"),
        ("photo.png --mask=", 2, "--mask: it is empty; give a picture's file"),
        ("photo.png --mask mask.png --box 0,0,1,1", 2, "not allowed with argument"),
        ("photo.png --mask mask.png --outside", 2, "--outside goes with --box; of a mask, swap black and white."),
        ("photo.png --box 1,2,3", 2, "a box has four numbers, TOP,LEFT,BOTTOM,RIGHT, not 3"),
        ("photo.png --box 0,0,2,1", 2, "must be a number from 0 to 1, not 2.0"),
        ("photo.png --box 0,a,1,1", 2, "must be a number from 0 to 1, not 'a'"),
        ("photo.png --box 0.5,0,0.5,1", 2, "'0.5,0,0.5,1' is empty: top must be above bottom, and left before right"),
        ("photo.png --box .5,0,.501,1", 1, "is too thin: its edges go to the nearest of 16 cells"),
        ("photo.png --mask black.png", 1, "so there is nothing to paint"),
        ("photo.png --mask small.png", 1, "small.png has 30 x 26 pixels and photo.png 300 x 260; the mask must have"),
        ("photo.png --mask none.png", 1, "none.png cannot be read: no such file"),
        ("photo.png --mask text.png", 1, "text.png cannot be read: it is not a whole picture"),
        ("text.png --box 0,0,1,.5", 1, "text.png cannot be read: it is not a whole picture"),
        ("none.png --box 0,0,1,.5", 1, "none.png cannot be read: no such file"),
        ("photo.png 11 --box 0,0,1,.5", 2, "a class must be a whole number from 0 to 9, not 11."),
        ("photo.png --box 0,0,1,.5 -o a.gif", 2, "extension .gif"),
        ("photo.png --box 0,0,1,.5 -o text.png/a.png", 1, "is a file, not a folder"),
        ("photo.png --box 0,0,1,.5 --singles", 2, "--singles goes with --grid"),
    ],
)
def test_bad_edits(
    photo: Path, var_tiny: Path, capsys: pytest.CaptureFixture[str], arguments: str, code: int, complaint: str
) -> None:
    assert main(["edit", *arguments.split(), "-q", "-m", str(var_tiny)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.startswith("hart-infer edit: ")
    assert len(err.splitlines()) == code
    assert here() == INPUTS


def test_an_empty_prompt_of_an_edit(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "photo.png", " ", "--mask", "mask.png"]) == 2
    assert "prompt[0] is empty" in capsys.readouterr().err
    assert here() == INPUTS
