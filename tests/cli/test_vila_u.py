"""The command with VILA-U's models: pictures, videos and answers; what the family lacks is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils.flop_counter import FlopCounterMode

from hart_infer import VarPipeline, VilaUPipeline
from hart_infer.checkpoints.families import find_family
from hart_infer.checkpoints.vila_u_costs import position_costs
from hart_infer.cli import main
from hart_infer.cli.console import escaped
from hart_infer.cli.sampling import SamplingOptions
from hart_infer.images import video
from hart_infer.images.files import read_metadata, save_picture
from hart_infer.models.llama import Llama, LlamaConfig
from hart_infer.models.vila_u.depth import DepthConfig, DepthTransformer
from hart_infer.models.vila_u.projector import Projector
from tests.cli.test_cli import here, pixels, shell
from tests.golden.data import golden
from tests.hub import HubServer
from tests.released_vila_u import DEPTH, GRID, HIDDEN, LLAMA_LAYERS, WIDTH, write_checkpoint

pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")  # by `make newest` and `make oldest`

FRAMES = 8
SIDE = 8  # pixels of a picture
REPO = "mit-han-lab/vila-u-7b-256"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("made") / "vila-u")


@pytest.fixture
def model(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, as an argument; the test runs in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(released)


@pytest.fixture
def photo(model: str) -> str:
    """A picture in the working folder."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    save_picture(Image.fromarray(noise), "photo.png")
    return "photo.png"


def load(folder: str | Path) -> VilaUPipeline:
    pipe = VilaUPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames_of(path: str) -> list[np.ndarray]:
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]


# --- which family


def test_family_by_files(released: Path, tmp_path: Path) -> None:
    for place in (released, released / "llm", released / "vision_tower"):
        assert find_family(place) == "VILA-U"
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "model").symlink_to(released)
    assert find_family(tmp_path / "around") == "VILA-U"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "VilaUPipeline"}))
    assert find_family(tmp_path) == "VILA-U"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("generate x --steps 4", "is a VILA-U model, which does not take --steps; leave it out."),
        ("generate x --no-smooth", "does not take --smooth; leave it out."),
        ("generate x --preset fid --no-system-prompt", "does not take --no-system-prompt or --preset; leave them out."),
        ("generate x --text-encoder y --no-ema", "does not take --text-encoder or --no-ema; leave them out."),
        ("generate x --size 7", "--size 7 is not one that this checkpoint was trained for; it has 8."),
        ("reconstruct photo.png -o a.png --no-ema", "does not take --no-ema; leave it out."),
        ("reconstruct photo.png -o a.png --mode hybrid", "is a VILA-U model, whose --mode is discrete, not hybrid."),
        ("reconstruct photo.png -o a.png --mode both", "is a VILA-U model, whose --mode is discrete, not both."),
        ("edit photo.png x --box 0,0,1,.5", "which does not edit pictures; take one of HART's (mit-han-lab/hart-0.7b-1024px)"),
        ("video x --steps 4", "unrecognized arguments: --steps 4"),
        ("video x --size 8", "unrecognized arguments: --size 8"),
        ("answer x --no-ema", "unrecognized arguments: --no-ema"),
    ],
)
def test_what_vila_u_does_not_take_is_a_wrong_command_line(
    photo: str, model: str, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    assert main([*arguments.split(), "-q", "-m", model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 2
    assert here() == [photo]


@pytest.mark.parametrize("command", [["info"], ["convert", "-q"]])
def test_options_of_hart_with_a_positional_model(model: str, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    destination = ["out"] if command[0] == "convert" else []
    assert main([*command, model, *destination, "--no-ema"]) == 2
    assert "which does not take --no-ema; leave it out." in capsys.readouterr().err
    assert here() == []


def test_var_has_neither_videos_nor_answers(model: str, whole_var_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    var = str(whole_var_tiny)
    assert main(["video", "x", "-m", var]) == 2
    assert f"is a VAR model, which does not draw videos; take one of VILA-U's ({REPO})." in capsys.readouterr().err
    assert main(["answer", "x", "-m", var]) == 2
    assert "is a VAR model, which does not answer questions" in capsys.readouterr().err
    assert SamplingOptions().completed("VAR", VarPipeline.from_pretrained(var))["more_smooth"] is False


# --- generate


def test_pictures_are_those_of_the_pipeline(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a cat", "<image> red", "-n", "2", "-m", model, "-s", "5", "-q", "-o", "{prompt}-{seed}.png"]
    assert main([*command, "--json", "--batch-size", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"path": "a-cat-5.png", "prompt": "a cat", "seed": 5}
    assert [line["path"] for line in lines] == ["a-cat-5.png", "a-cat-6.png", "image-red-7.png", "image-red-8.png"]
    expected = load(model)(["a cat", "<image> red"], num_images_per_prompt=2, seed=5).images
    for line, image in zip(lines, expected, strict=True):
        assert np.array_equal(pixels(line["path"]), np.asarray(image))


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--guidance-scale 1 --top-k 5 --top-p 0", {"guidance_scale": 1.0, "top_k": 5, "top_p": 0.0}),
        ("--negative-prompt red", {"negative_prompt": "red"}),
    ],
)
def test_options_arrive_and_are_in_the_metadata(
    model: str, capsys: pytest.CaptureFixture[str], flags: str, changed: dict[str, Any]
) -> None:
    assert main(["generate", "a sofa", "-o", "a.png", "-s", "1", "-q", "-m", model, "--device", "cpu", *flags.split()]) == 0
    expected = load(model)("a sofa", seed=1, **changed).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(expected))
    metadata = read_metadata("a.png")
    assert metadata
    assert metadata.pop("software").startswith("hart-infer ")
    settings = {"guidance_scale": 3.0, "top_k": 40, "top_p": 0.96} | changed
    made_of = {"prompt": "a sofa", "seed": 1, "size": SIDE}
    assert metadata == {**settings, **made_of, "model": "vila-u", "device": "cpu", "dtype": "float32"}
    capsys.readouterr()
    assert main(["info", "a.png"]) == 0
    assert re.search(r"^  prompt +a sofa$", capsys.readouterr().out, re.MULTILINE)


def test_grid(model: str) -> None:
    assert main(["generate", "a", "b", "-m", model, "-q", "-s", "1", "--grid", "-o", "g.png"]) == 0
    metadata = read_metadata("g.png")
    assert metadata
    assert metadata.items() >= {"prompts": ["a", "b"], "seeds": [1, 2], "size": SIDE}.items()
    assert here() == ["g.png"]


def test_a_preview_after_each_row_of_positions(model: str) -> None:
    assert main(["generate", "a", "-n", "2", "-m", model, "-q", "-s", "1", "-o", "{seed}.png", "--preview-dir", "rows"]) == 0
    previews = [f"rows/{seed}-row-{row:02d}.png" for seed in (1, 2) for row in range(GRID)]
    assert here() == ["1.png", "2.png", *previews]
    assert np.array_equal(pixels(previews[GRID - 1]), pixels("1.png"))
    assert not np.array_equal(pixels(previews[0]), pixels("1.png"))


def test_a_prompt_too_long_is_one_sentence(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a " * 600, "-m", model, "-q"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"hart-infer generate: The prompt has [\d,]+ tokens .* the model takes 600\. Shorten it\.\n", err)
    assert here() == []


# --- video


def test_videos_are_those_of_the_pipeline(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["video", "waves", "rain", "-n", "2", "-m", model, "-s", "3", "-q", "--device", "cpu", "--json"]
    assert main([*command, "-o", "{prompt}-{seed}.png", "--top-k", "9", "--negative-prompt", "red"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"path": "waves-3.png", "prompt": "waves", "seed": 3}
    assert [line["path"] for line in lines[1:]] == ["waves-4.png", "rain-5.png", "rain-6.png"]
    expected = load(model).video(["waves", "rain"], num_images_per_prompt=2, seed=3, top_k=9, negative_prompt="red").frames
    for line, frames in zip(lines, expected, strict=True):
        strip = np.concatenate([np.asarray(frame) for frame in frames], axis=1)
        assert np.array_equal(pixels(line["path"]), strip)
    metadata = read_metadata("rain-6.png")
    assert metadata
    assert metadata.pop("software").startswith("hart-infer ")
    settings = {"guidance_scale": 3.0, "top_k": 9, "top_p": 0.96, "negative_prompt": "red", "fps": 8.0}
    made_of = {"prompt": "rain", "seed": 6, "size": SIDE, "model": "vila-u", "device": "cpu", "dtype": "float32"}
    assert metadata == settings | made_of


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".mp4"])
def test_formats_of_videos(model: str, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    name = f"v{suffix}"
    assert main(["video", "waves", "-m", model, "-s", "3", "-q", "-o", name, "--fps", "4"]) == 0
    assert capsys.readouterr() == (f"{name}\n", "")
    read = video.read_video(name, FRAMES)
    assert [frame.size for frame in read] == [(SIDE, SIDE)] * FRAMES
    if suffix != ".mp4":
        with Image.open(name) as file:
            assert file.n_frames == FRAMES
            file.seek(1)
            file.load()
            assert file.info["duration"] == 250
    if suffix == ".webp":
        assert main(["info", name]) == 0
        assert re.search(r"^  fps +4\.0$", capsys.readouterr().out, re.MULTILINE)
        assert main(["video", "waves", "-m", model, "-q", "-o", name, "--no-overwrite"]) == 1
        assert "v.webp exists, and --no-overwrite was given." in capsys.readouterr().err
        assert main(["video", "waves", "-m", model, "-q", "-o", name, "--no-metadata"]) == 0
        assert read_metadata(name) is None


def test_default_names_of_videos_continue(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hart-007.png").touch()
    Path("prompts.txt").write_text("# two\nwaves\n\nrain\n")
    assert main(["video", "--prompts", "prompts.txt", "-m", model]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["hart-000.webp", "hart-001.webp"]
    assert re.search(r"^seed \d+ to \d+$", err, re.MULTILINE)
    assert main(["video", "waves", "-m", model, "-q"]) == 0
    assert capsys.readouterr().out == "hart-002.webp\n"


def test_an_mp4_that_nothing_writes_is_refused_before_loading(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video, "_has", lambda name: False)
    assert main(["video", "waves", "-m", "nowhere", "-q", "-o", "a.mp4"]) == 1
    assert "a.mp4 needs PyAV or imageio: pip install 'hart-infer[video]'" in capsys.readouterr().err


def test_a_checkpoint_without_video_tokens(released: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(released, "stills")
    config = Path("stills/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mm_use_vi_start_end": False}))
    (config.parent / "llm/added_tokens.json").unlink()
    assert main(["video", "waves", "-m", "stills", "-q"]) == 1
    assert "This checkpoint has no <vi_start> token, so it draws no videos" in capsys.readouterr().err
    assert main(["info", "stills", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"]["per_video"] == 0


# --- answer


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("-s 3 --max-new-tokens 12", {"seed": 3, "max_new_tokens": 12, "do_sample": True}),
        ("--greedy --max-new-tokens 30", {"do_sample": False, "max_new_tokens": 30}),
        ("-s 4 --temperature 2 --top-p 0.5", {"seed": 4, "temperature": 2.0, "top_p": 0.5, "do_sample": True}),
    ],
)
def test_answers_are_those_of_the_pipeline(
    photo: str, model: str, capsys: pytest.CaptureFixture[str], flags: str, options: dict[str, Any]
) -> None:
    Path("frames").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(f"frames/{i}.png")
    video.save_video([Image.new("RGB", (16, 16), (0, 60 * i, 0)) for i in range(4)], "v.gif")
    for media in ([], [photo], [photo, "frames", photo], ["v.gif"]):
        expected = load(model).answer([Path(name) for name in media] or None, "What is it?", **options)
        command = ["answer", *media, "What is it?", "-m", model, "-q", *flags.split()]
        assert main([*command, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        wanted = {"question": "What is it?", "media": media, "answer": expected, "seed": options.get("seed")}
        assert printed == wanted
        assert main(command) == 0
        assert capsys.readouterr() == (escaped(expected, keep="\t\n") + "\n", "")


class Stdout(io.StringIO):
    """Notes what had been flushed when."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def speaks(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, error: BaseException | None = None) -> list[str]:
    """Have every answer be these pieces, then raise `error`; return the pieces. Fails if one is asked for before its turn."""
    pieces = ["A\x1b[31m red ", "cat.\n", "\ttwo\u202e "]

    def answer(self: VilaUPipeline, *arguments: Any, **options: Any) -> Iterator[str]:
        for piece in pieces:
            yield piece
            assert stdout.getvalue().endswith(piece.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e"))
        if error:
            raise error

    monkeypatch.setattr(VilaUPipeline, "answer", answer)
    monkeypatch.setattr(sys, "stdout", stdout)
    return pieces


def test_an_answer_is_streamed_and_steers_no_terminal(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Stdout()
    pieces = speaks(monkeypatch, stdout)
    assert main(["answer", "Q?", "-m", model, "-q"]) == 0
    assert stdout.getvalue() == "A\\x1b[31m red cat.\n\ttwo\\u202e \n"
    written = [text for text in dict.fromkeys(stdout.flushed) if text]
    assert len(written) == len(pieces) + 1


def test_ctrl_c_ends_the_line(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stdout = Stdout()
    speaks(monkeypatch, stdout, KeyboardInterrupt())
    assert main(["answer", "Q?", "-m", model, "-q"]) == 130
    assert stdout.getvalue().endswith("\\u202e \n")
    assert capsys.readouterr().err == "hart-infer: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_an_answer(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["answer", "Q?", "-m", model, "-q", "--greedy"]) == 1
    sentence = "hart-infer answer: standard output cannot be written: no space left on device.\n"
    assert capsys.readouterr().err == sentence


def test_the_seed_of_an_answer_is_shown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["answer", "Q?", "-m", model, "--max-new-tokens", "9"]
    assert main(command) == 0
    first, err = capsys.readouterr()
    seed = re.search(r"^seed (\d+)$", err, re.MULTILINE)
    assert seed
    assert main([*command, "--seed", seed[1], "-q"]) == 0
    assert capsys.readouterr() == (first, "")
    assert main([*command, "--greedy"]) == 0
    assert "seed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("none.png what?", "none.png cannot be read: no such file or directory."),
        ("text.txt what?", "text.txt "),
        ("empty what?", "empty holds no frames"),
    ],
)
def test_media_that_cannot_be_read_are_refused_before_loading(
    model: str, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    Path("text.txt").write_text("no picture")
    Path("empty").mkdir()
    assert main(["answer", *arguments.split(), "-m", "nowhere"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hart-infer answer: {complaint}")
    assert len(err.splitlines()) == 1


# --- info, convert, reconstruct, doctor


def test_info_counts_what_is_loaded(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    pipe = load(model)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in pipe.components.items()}
    parameters = report["parameters"]
    assert report["family"] == "VILA-U"
    assert parameters["total"] == sum(counts.values())
    assert {name: parameters[name] for name in ("llama", "depth_transformer", "projector")} == {
        name: counts[name] for name in ("llama", "depth_transformer", "projector")
    }
    assert parameters["encoder"] + parameters["decoder"] + parameters["quantizer"] == counts["vision_tower"]
    assert report["positions"] == {
        "picture_pixels": SIDE,
        "grid": GRID,
        "codes_per_position": DEPTH,
        "per_picture": GRID**2,
        "per_video": FRAMES * GRID**2,
        "video_frames": FRAMES,
        "longest_prompt": 600,
    }
    token = 2 * LLAMA_LAYERS * WIDTH  # keys and values of a row
    assert report["memory"]["bf16"] == {
        "weights_bytes": 2 * parameters["total"],
        "cache_bytes_per_picture": 2 * 2 * GRID**2 * token,  # with guidance
        "cache_bytes_per_video": 2 * 2 * FRAMES * GRID**2 * token,
        "cache_bytes_per_token": 2 * token,
    }
    assert list(report["files"]) == [f"{part}/model.safetensors" for part in ("llm", "vision_tower", "mm_projector")] + [
        "tokenizer"
    ]
    assert report["files"]["vision_tower/model.safetensors"]["tensors_never_read"] == 40
    assert report["defaults"] == {"guidance_scale": 3.0, "top_k": 900, "top_p": 0.96}
    assert report["answers"]["temperature"] == 0.7
    matrices = LLAMA_LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    assert report["cost_per_position"]["one_row"]["llama_flops"] == 2 * (matrices + 2 * LLAMA_LAYERS * WIDTH * GRID**2)
    norms = (2 * LLAMA_LAYERS + 1) * WIDTH
    assert report["cost_per_position"]["weights_read_fp32"]["llama_bytes"] == 4 * (matrices + norms)


def test_info_as_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model]) == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines()[1:] if not line.startswith("  ")]
    first = ["parameters", "positions", "memory", "cost per position", "files", "defaults", "answers", "settings"]
    assert shown.startswith(f"{model} (VILA-U)\n")
    assert titles == [*first, "llama", "depth transformer", "vision tower"]
    assert re.search(r"^  weights read bf16  llama 34\.3 KiB, projector [\d.]+ KiB, depth transformer", shown, re.MULTILINE)
    assert re.search(r"^  one row +llama 0\.04 MFLOP, .*, total 0\.14 MFLOP$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) < 130


@pytest.mark.parametrize("slots", [4, 16])
def test_costs_of_the_released_sizes(slots: int) -> None:
    """Against vila-u.md: 6.6 GMAC and 13.2 GB of the Llama, with its head; 0.51 GMAC and 1.03 GB a slot at E 2560."""
    config = LlamaConfig(
        vocab_size=32004,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    sizes = {"num_layers": 6, "num_heads": 40, "embed_dim": 2560, "vocab_size": 16384, "hidden_size": 4096, "code_dim": 1024}
    with torch.device("meta"):
        llama, projector = Llama(config), Projector("mlp2x_gelu", code_dim=1024, hidden_size=4096)
        depth = DepthTransformer(DepthConfig(num_slots=slots, **sizes))
    costs = position_costs(llama, depth, projector, length=256)
    head = 32004 * 4096
    attention = 2 * 32 * 4096 * 256
    assert costs["llama"].flops == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + attention)
    assert (costs["llama"].flops / 2 - attention + head) / 1e9 == pytest.approx(6.6, abs=0.05)
    assert 2 * (costs["llama"].weights_read + head) / 1e9 == pytest.approx(13.2, abs=0.05)
    assert costs["depth_transformer"].flops / 2 / 1e9 == pytest.approx({4: 2.1, 16: 8.2}[slots], rel=0.02)
    assert 2 * costs["depth_transformer"].weights_read / 1e9 == pytest.approx(slots * 1.03, rel=0.01)
    assert costs["projector"].flops == 2 * (1024 * 4096 + 4096**2)


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [4, 2])
def test_costs_are_what_pytorch_counts(key_heads: int) -> None:
    """One position of a small model, whose matrices PyTorch counts; attention is 2 multiply-adds a width and key."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": key_heads}
    llama = Llama(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, **sizes))
    slots = {"num_slots": 3, "num_layers": 2, "num_heads": 2, "embed_dim": 24}
    depth = DepthTransformer(DepthConfig(code_dim=16, hidden_size=32, vocab_size=40, **slots))
    projector = Projector("mlp2x_gelu", code_dim=16, hidden_size=32)

    def draw() -> None:
        cache = depth.new_cache(1)
        depth.step(depth.embed_hidden(torch.randn(1, 32)), 0, cache)
        for slot in (1, 2):
            depth.step(depth.embed_codes(torch.randn(1, 16), slot), slot, cache)

    runs = {
        "llama": (lambda: llama(torch.randn(1, 1, 32), torch.tensor([[8]]), llama.new_cache(rows=1, length=9).at(8, 1)), 2 * 9),
        "projector": (lambda: projector(torch.randn(1, 16)), 0),
        "depth_transformer": (draw, 2 * (1 + 2 + 3)),
    }
    widths = {"llama": 32, "projector": 0, "depth_transformer": 24}
    costs = position_costs(llama, depth, projector, length=9)
    for name, (run, keys) in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        matrices = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
        assert costs[name].flops == matrices + 2 * 2 * keys * widths[name], name  # 2 layers, 2 operations a multiply-add


def test_converted_checkpoint_draws_the_same(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", model, "own", "-q"]) == 0
    assert capsys.readouterr() == ("own\n", "")
    for name, source in (("a", model), ("b", "own")):
        assert main(["generate", "a cat", "-s", "1", "-q", "-o", f"{name}.png", "-m", source]) == 0
        assert main(["video", "a cat", "-s", "1", "-q", "-o", f"{name}.gif", "-m", source]) == 0
        assert main(["answer", "a.png", "What?", "--greedy", "-q", "-m", source]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert all(np.array_equal(a, b) for a, b in zip(frames_of("a.gif"), frames_of("b.gif"), strict=True))
    lines = capsys.readouterr().out.split("a.gif\n")[1].split("b.png\nb.gif\n")
    assert lines[0] == lines[1]
    reports = []
    for source in (model, "own"):
        assert main(["info", source, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    files = [report.pop("files") for report in reports]
    assert reports[0] == reports[1]
    parts = ("llm", "vision_tower", "depth_transformer", "mm_projector")
    assert list(files[1]) == [*(f"{part}/model.safetensors" for part in parts), "tokenizer"]
    assert all(files[1][f"{part}/model.safetensors"]["tensors_never_read"] == 0 for part in parts)


def test_reconstruct(photo: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reconstruct", photo, "-o", "again.png", "-q", "-m", model]
    assert main(command) == 0
    assert re.fullmatch(r"again.png\tdiscrete\t\d+\.\d\d dB\n", capsys.readouterr().out)
    with Image.open("again.png") as again:
        assert again.size == (SIDE, SIDE)
    before = pixels("again.png")
    assert main([*command, "--mode", "discrete", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["psnr"]) == ["discrete"]
    assert np.array_equal(pixels("again.png"), before)


def test_golden_checkpoints_by_the_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("vila-u-tiny", "vila-u-tiny-384"):
        folder = str(golden(name))
        assert main(["generate", "a cat", "-m", folder, "-q", "-s", "1", "-o", f"{name}.png"]) == 0
        assert np.array_equal(pixels(f"{name}.png"), np.asarray(load(folder)("a cat", seed=1).images[0]))
        assert main(["reconstruct", f"{name}.png", "-m", folder, "-q", "-o", f"{name}-again.png"]) == 0
        assert main(["answer", f"{name}.png", "What is it?", "-m", folder, "-q", "--max-new-tokens", "5", "-s", "1"]) == 0
        assert main(["info", folder]) == 0
    capsys.readouterr()


def test_a_hub_id_is_described_without_its_weights(released: Path, model: str, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "hub" / REPO)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with HubServer(tmp_path / "hub") as hub:
        environment["HF_ENDPOINT"] = hub.url
        info = shell("info", REPO, more=environment)
        assert not [name for name in hub.downloaded(REPO) if "model" in name.split("/")[-1]]
        drawn = shell("generate", "a cat", "-q", "-m", REPO, "-s", "1", "-o", "a.png", more=environment)
        late = shell("info", REPO, "--json", "--local-files-only", more=environment)
        doctor = shell("doctor", "--json", more=environment)
    assert info.returncode == 0
    assert info.stdout.startswith(f"{REPO} (VILA-U)\n")
    assert "not on this machine" in info.stdout
    assert drawn.returncode == 0
    assert "hart-infer" not in drawn.stderr  # an old transformers greets a new cache
    assert len(json.loads(late.stdout)["files"]) == 4
    report = json.loads(doctor.stdout)
    assert report["hub"]["released_models_cached"] == [REPO]
    assert report["software"]["sentencepiece"][0].isdigit()
