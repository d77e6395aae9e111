"""The command: arguments, names, output, exit codes. A stand-in pipeline where the model doesn't matter."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hart_infer
from hart_infer import ops
from hart_infer.checkpoints import families
from hart_infer.checkpoints.hart import Defaults
from hart_infer.cli import main, naming
from hart_infer.cli.console import UsageError, library_messages
from hart_infer.errors import OutOfMemoryError
from hart_infer.generation.speed import Knobs, resolve
from hart_infer.images.files import read_metadata, save_picture
from hart_infer.ops.cuda.library import FILE
from hart_infer.ops.precision import widens
from tests.hub import HubServer

COMMANDS = ("generate", "batch", "edit", "video", "answer", "reconstruct", "serve", "info", "convert", "doctor")
SIDE = 32


@dataclass
class Calls:
    """What was asked of the stand-in."""

    loads: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    error_after: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """A stand-in pipeline; the test runs in an empty folder."""
    calls = Calls()

    class Pipeline:
        sizes = (SIDE,)
        tokenization = "hybrid"
        device = torch.device("cpu")
        dtype = torch.float32
        defaults = Defaults()

        def knobs(self, speed: Any, **given: Any) -> Knobs:
            return resolve(speed, Knobs(**given), sides=(1, 2, 4, 8, 16), depth=2, late_temperature=0.75)

        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> Pipeline:
            calls.loads.append({"path": path, **options})
            made = cls()
            made.name = path
            return made

        def set_progress_bar_config(self, **options: Any) -> None:
            calls.bars.append(options)

        def __call__(self, prompts: list[str], *, seed: list[int], **options: Any) -> Any:
            if calls.error and len(calls.batches) >= calls.error_after:
                raise calls.error
            calls.batches.append({"prompts": prompts, "seed": seed, **options})
            images = [colour(s) for s in seed]
            if callback := options["callback_on_step_end"]:
                for index in range(2):
                    callback(types.SimpleNamespace(index=index, preview=lambda: images))
            return types.SimpleNamespace(images=images, seeds=seed)

        def reconstruct(self, image: Image.Image, mode: str) -> Image.Image:
            return image if mode == "hybrid" else image.point(lambda value: value ^ 1)

        def save_pretrained(self, path: Path, *, max_shard_size: str) -> Path:
            path.mkdir(parents=True)
            (path / "model_index.json").write_text(max_shard_size)
            return path

    module = types.ModuleType("hart_infer.pipelines.hart")
    module.HartPipeline = Pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hart_infer.pipelines.hart", module)
    monkeypatch.setattr(families, "find_family", lambda name, hub: "HART")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return calls


def colour(seed: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (seed % 256, 0, 0))


def seed_of(path: str | Path) -> int:
    with Image.open(path) as image:
        return int(image.getpixel((0, 0))[0])


def here() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def shell(*args: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hart_infer", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**environment(), **(more or {})})


def environment() -> dict[str, str]:
    root = str(Path(hart_infer.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


# --- the command as a whole


def test_version_and_help_are_quick_and_import_nothing_heavy() -> None:
    script = (
        "import sys; from hart_infer.cli import main; code = main(['{}']); "
        "heavy = sorted({{'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub'}} & set(sys.modules)); "
        "sys.exit(code or ', '.join(heavy) or None)"
    )
    for flag in ("--version", "--help"):
        result = subprocess.run([sys.executable, "-c", script.format(flag)], capture_output=True, text=True, env=environment())
        assert (result.returncode, result.stderr) == (0, "")
    assert shell("--version").stdout == f"hart-infer {hart_infer.__version__}\n"


def test_help_names_commands_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in COMMANDS)
    assert all(re.search(rf"^  {code} +\S", shown, re.MULTILINE) for code in (0, 1, 2, 130, 141))
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: hart-infer {name} ")
        assert max(map(len, shown.splitlines())) < 90


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "no prompt"),
        (["generate", ""], "prompt[0] is empty"),
        (["generate", "a", "--num", "0"], "--num: must be a whole number from 1 to 100000, not 0"),
        (["generate", "a", "--seed", "-1"], "--seed: must be a whole number from 0 to 18446744073709551615, not -1"),
        (["generate", "a", "--seed", str(2**64)], "--seed: must be a whole number from 0 to"),
        (["generate", "a", "--num", "2", "--seed", str(2**64 - 1)], "too large for 2 pictures"),
        (["generate", "a", "--top-p", "1.5"], "--top-p: must be a number from 0 to 1, not 1.5"),
        (["generate", "a", "--guidance-scale", "nan"], "--guidance-scale: must be a number from 0 to 1000, not 'nan'"),
        (["generate", "a", "--steps", "many"], "--steps: must be a whole number from 0 to 1000, not 'many'"),
        (["generate", "a", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["generate", "--grid", "a cat"], "'a cat' is not a number of columns; put prompts before --grid"),
        (["generate", "a", "--singles"], "--singles goes with --grid"),
        (["generate", "a", "-o", "cat.gif"], "extension .gif; pictures are written as .png"),
        (["generate", "a", "-o", "cat"], "no extension"),
        (["generate", "a", "-o", "{name}.png"], "there are {index}, {seed}, {prompt}"),
        (["generate", "a", "-o", "{index.real}.png"], "there are {index}, {seed}, {prompt}"),
        (["generate", "a", "-o", "{}.png"], "there are {index}, {seed}, {prompt}"),
        (["generate", "a", "-o", "{index.png"], "is not a pattern"),
        (["generate", "a", "-o", "{prompt:03d}.png"], "is not a pattern"),
        (["generate", "\udcff"], "prompt[0] is not valid Unicode text"),
        (["generate", "a", "--num", "100001"], "--num: must be a whole number from 1 to 100000, not 100001"),
        (["generate", "a", "b", "--num", "50001"], "100,002 pictures are more than one command makes"),
        (["generate", "a", "--guidance-scale", "1" + "0" * 400], "must be a number from 0 to 1000, not '1000"),
        (["generate", "a", "--steps", "1"], "--steps: must be 0 (no residual) or from 2 to 1000, not 1"),
        (["generate", "a", "-m", ""], "--model: it is empty; give a folder or an id"),
        (["generate", "a", "--text-encoder", " "], "--text-encoder: it is empty"),
        (["convert", "", "b"], "SRC: it is empty"),
        (["generate", "a", "--threads", "0"], "--threads: must be a whole number from 1"),
        (["generate", "a", "-o", "{index:99999999d}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", "{prompt:.99999999}{seed:0300d}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", "{index:000000100000000000d}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", "{index:0000000010000000d}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", f"{{index:{'0' * 5000}1d}}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", "{index:\u0669\u0669\u0669d}.png"], "a width of more than 255 fits in no name"),
        (["generate", "a", "-o", "{index:{seed}}.png"], "a placeholder can't have another one inside"),
        (["generate", "a", "-o", "{index:{seed}{seed}}.png", "-s", "99999"], "a placeholder can't have another one inside"),
        (["generate", "a", "-o", "{seed:c}.png"], "a number makes no character of a name"),
        (["reconstruct", "a.png"], "required: -o/--out"),
        (["video", "a"], "required: -m/--model"),
        (["answer", "a.png", "what?"], "required: -m/--model"),
        (["video", "-m", "a"], "no prompt"),
        (["video", "a", "-m", "a", "-o", "a.jpg"], "extension .jpg; videos are written as .webp, .gif, .png, .mp4"),
        (["video", "a", "-m", "a", "--fps", "0"], "--fps: must be a number from 0.1 to 1000, not 0"),
        (["video", "a", "b", "-m", "a", "-n", "50001"], "100,002 videos are more than one command makes"),
        (["video", "a", "-m", "hart-mini"], "hart-mini is a HART model, which does not draw videos; take one of VILA-U's"),
        (["answer", "what?", "-m", "hart-mini"], "is a HART model, which does not answer questions; take one of VILA-U's"),
        (["answer", "-m", "a"], "required: QUESTION"),
        (["answer", " ", "-m", "a"], "the question is empty"),
        (["answer", "what\udcff", "-m", "a"], "question[0] is not valid Unicode text"),
        (["answer", ".", "-m", "a"], "no question: the last argument, ., is a file or folder"),
        (["answer", "", "what?", "-m", "a"], "PICTURE: it is empty"),
        (["answer", "what?", "-m", "a", "--greedy", "--seed", "0"], "--greedy draws nothing, so --seed has no effect"),
        (["answer", "what?", "-m", "a", "--temperature", "0"], "--temperature: must be a number from 1e-06 to 1e+06, not 0"),
        (
            ["convert", "a", "b", "--max-shard-size", "big"],
            '--max-shard-size: max_shard_size must be a size such as "5GB" or "500MB", not \'big\'.',
        ),
        (["convert", "a", "b", "--text-encoder", "c", "--no-text-encoder"], "not allowed with"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_2(
    calls: Calls, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    program = " ".join(["hart-infer", *[a for a in arguments[:1] if a in COMMANDS]])
    assert out == ""
    assert err.startswith(f"{program}: ")
    assert complaint in err
    assert err.endswith(f"\nTry '{program} --help'.\n")
    assert len(err.splitlines()) == 2
    assert len(err) < 400
    assert (calls.loads, here()) == ([], [])


def test_an_error_is_one_sentence_and_exit_1(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.error = OutOfMemoryError("The device is out of memory; turn down --batch-size.")
    assert main(["generate", "a", "-q"]) == 1
    sentence = "hart-infer generate: The device is out of memory; turn down --batch-size.\n"
    assert capsys.readouterr() == ("", sentence)
    assert main(["generate", "a", "-q", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(sentence)


def test_a_fault_of_ours_is_not_hidden(calls: Calls) -> None:
    calls.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["generate", "a"])


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_warnings_and_log_lines_reach_stderr(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = sys.modules["hart_infer.pipelines.hart"].HartPipeline
    original = pipeline.__call__

    def talkative(self: Any, *args: Any, **options: Any) -> Any:
        warnings.warn("Prompt 0 was cut.", stacklevel=2)
        warnings.warn("something is deprecated", DeprecationWarning, stacklevel=2)
        logging.getLogger("hart_infer.pipelines.hart").warning("a fallback is used")
        logging.getLogger("hart_infer.pipelines.hart").debug("detail")
        return original(self, *args, **options)

    monkeypatch.setattr(pipeline, "__call__", talkative)
    assert main(["generate", "a", "--seed", "1"]) == 0
    err = capsys.readouterr().err
    assert "hart-infer: warning: Prompt 0 was cut.\nhart-infer: warning: a fallback is used\n" in err
    assert "deprecated" not in err
    assert "detail" not in err
    assert main(["generate", "a", "--debug"]) == 0
    assert "hart-infer: debug: detail" in capsys.readouterr().err
    assert main(["generate", "a", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert logging.getLogger("hart_infer").handlers == []


# --- generate


def test_one_prompt_one_file(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "-o", "out/cat.png", "-s", "7", "-m", "some/model"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{Path('out/cat.png')}\n"
    assert err.startswith("loading some/model on ")
    assert here() == [str(Path("out/cat.png"))]
    assert seed_of("out/cat.png") == 7
    (load,) = calls.loads
    assert load["path"] == "some/model"
    assert load["text_encoder"] is None
    assert (load["use_ema"], load["revision"], load["local_files_only"]) == (True, None, False)
    (batch,) = calls.batches
    assert batch == {
        "prompts": ["a cat"],
        "num_images_per_prompt": 1,
        "seed": [7],
        "callback_on_step_end": None,
        "size": None,
        "guidance_scale": 4.5,
        "num_inference_steps": 8,
        "residual_temperature": 1.0,
        "top_k": None,
        "top_p": 0.0,
        "more_smooth": True,
        "negative_prompt": None,
        "use_system_prompt": True,
        "guidance_stops_at": None,
        "late_temperature": None,
        "prune": None,
        "stop_after": None,
    }


def test_every_option_arrives(calls: Calls) -> None:
    arguments = (
        "generate x --size 32 --guidance-scale 3 --steps 5 --top-k 9 --top-p .5 --no-smooth "
        "--negative-prompt b --no-system-prompt -m m --variant v --revision r --local-files-only --no-ema --text-encoder t "
        "--residual-temperature .25 --device cpu --dtype bf16 --quantize int8"
    )
    assert main(arguments.split()) == 0
    (load,), (batch,) = calls.loads, calls.batches
    assert load == {
        "quantize": "int8",
        "path": "m",
        "text_encoder": "t",
        "revision": "r",
        "local_files_only": True,
        "use_ema": False,
        "variant": "v",
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    settings = {key: batch[key] for key in ("size", "guidance_scale", "num_inference_steps", "top_k", "top_p")}
    assert list(settings.values()) == [32, 3.0, 5, 9, 0.5]
    assert batch["residual_temperature"] == 0.25
    assert (batch["more_smooth"], batch["negative_prompt"], batch["use_system_prompt"]) == (False, "b", False)


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--smooth"], True), (["--no-smooth"], False)])
def test_smooth_is_the_family_s_unless_given(calls: Calls, flags: list[str], expected: bool) -> None:
    assert main(["generate", "a", *flags]) == 0
    assert calls.batches[0]["more_smooth"] is expected


@pytest.mark.parametrize(
    ("arguments", "expected"), [("a -q b -s 1 c", ["a", "b", "c"]), ("-q -s 1 -- -b --c", ["-b", "--c"]), ("-- -b", ["-b"])]
)
def test_prompts_may_stand_between_options_and_begin_with_hyphens(calls: Calls, arguments: str, expected: list[str]) -> None:
    assert main(["generate", "--batch-size", "3", *arguments.split()]) == 0
    assert calls.batches[0]["prompts"] == expected


def test_the_same_command_twice_replaces_its_picture(calls: Calls) -> None:
    for seed in ("1", "2"):
        assert main(["generate", "a cat", "-o", "cat.png", "--seed", seed]) == 0
    assert here() == ["cat.png"]
    assert seed_of("cat.png") == 2


def test_no_overwrite_refuses_before_loading(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cat-001.png").write_bytes(b"old")
    assert main(["generate", "a cat", "-o", "cat.png", "--num", "2", "--no-overwrite"]) == 1
    assert "cat-001.png exists, and --no-overwrite was given." in capsys.readouterr().err
    assert (calls.loads, here()) == ([], ["cat-001.png"])


def test_default_names_continue_and_never_replace(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "b"]) == 0
    assert main(["generate", "c"]) == 0
    assert here() == ["hart-000.png", "hart-001.png", "hart-002.png"]
    assert main(["generate", "c", "-o", "folder/"]) == 0
    assert main(["generate", "c", "-o", "folder"]) == 0
    capsys.readouterr()
    assert main(["generate", "a", "b", "--grid", "--singles", "-o", "folder"]) == 0
    names = ["hart-002.png", "hart-003.png", "hart-002-grid.png"]
    assert capsys.readouterr().out.split() == [str(Path("folder", name)) for name in names]
    assert main(["generate", "a", "b", "--grid", "-o", "folder"]) == 0
    assert Path("folder/hart-004-grid.png").exists()


def test_a_default_name_taken_meanwhile_is_left_alone(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = sys.modules["hart_infer.pipelines.hart"].HartPipeline
    original = pipeline.__call__

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        Path("hart-000.png").write_bytes(b"someone else's")
        return original(self, *args, **options)

    monkeypatch.setattr(pipeline, "__call__", slow)
    assert main(["generate", "a"]) == 0
    assert capsys.readouterr().out == "hart-001.png\n"
    assert Path("hart-000.png").read_bytes() == b"someone else's"


def test_several_pictures_never_share_a_name(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "a dog", "--num", "2", "-o", "x.png", "--seed", "3"]) == 0
    assert capsys.readouterr().out.split() == ["x-000.png", "x-001.png", "x-002.png", "x-003.png"]
    assert [seed_of(name) for name in here()] == [3, 4, 5, 6]
    assert [batch["prompts"] for batch in calls.batches] == [["a cat"], ["a cat"], ["a dog"], ["a dog"]]


def test_patterns(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "A cat!", "Ein Bär", "-o", "{prompt}/{index:02d}_{seed}.jpg", "--seed", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(Path("a-cat/00_5.jpg")), str(Path("ein-bär/01_6.jpg"))]


def test_batches_split_the_work_and_not_the_seeds(calls: Calls) -> None:
    assert main(["generate", "a", "b", "--num", "3", "--seed", "10", "--batch-size", "4"]) == 0
    assert [batch["seed"] for batch in calls.batches] == [[10, 11, 12, 13], [14, 15]]
    assert [batch["prompts"] for batch in calls.batches] == [["a", "a", "a", "b"], ["b"]]
    assert [batch["num_images_per_prompt"] for batch in calls.batches] == [1, 2]
    assert [bar["desc"] for bar in calls.bars] == ["1-4 of 6", "5-6 of 6"]


def test_a_drawn_seed_is_shown_and_recorded(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--num", "2"]) == 0
    shown = re.search(r"^seed (\d+) to (\d+)$", capsys.readouterr().err, re.MULTILINE)
    assert shown
    seeds = [metadata["seed"] for name in here() if (metadata := read_metadata(name))]
    assert seeds == [int(shown[1]), int(shown[2])] == [int(shown[1]), int(shown[1]) + 1]


def test_prompts_from_a_file_and_from_stdin(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeff# my prompts\n\n  a fox  \r\nein Bär\rlast\u2028line"
    Path("prompts.txt").write_bytes(text.encode())
    expected = ["a fox", "ein Bär", "last\u2028line"]
    assert main(["generate", "first", "--prompts", "prompts.txt", "--batch-size", "9"]) == 0
    assert calls.batches[0]["prompts"] == ["first", *expected]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["generate", "--prompts", "-", "--batch-size", "9"]) == 0
    assert calls.batches[1]["prompts"] == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: no such file"),
        (b"\n# nothing\n", "holds no prompt"),
        (b"a\xff", "not UTF-8 text"),
    ],
)
def test_bad_prompt_files(calls: Calls, capsys: pytest.CaptureFixture[str], content: bytes | None, complaint: str) -> None:
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    assert main(["generate", "--prompts", "prompts.txt"]) == 1
    assert complaint in capsys.readouterr().err
    assert calls.loads == []


def test_grid_alone_is_the_named_file(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--num", "3", "--grid", "-o", "cats.png", "--seed", "1", "--json"]) == 0
    assert here() == ["cats.png"]
    assert Image.open("cats.png").size == (2 * SIDE + 4, 2 * SIDE + 4)
    expected = {"path": "cats.png", "prompts": ["a"] * 3, "seeds": [1, 2, 3]}
    assert json.loads(capsys.readouterr().out) == expected
    metadata = read_metadata("cats.png")
    assert metadata
    assert metadata.items() >= {"prompts": ["a"] * 3, "seeds": [1, 2, 3], "size": SIDE}.items()


def test_grid_with_singles_and_columns(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--num", "3", "--grid", "3", "--singles", "-o", "cats.png"]) == 0
    assert capsys.readouterr().out.split() == ["cats-000.png", "cats-001.png", "cats-002.png", "cats.png"]
    assert Image.open("cats.png").size == (3 * SIDE + 8, SIDE)


def test_a_grid_too_large_for_its_format_is_refused_before_the_work(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--num", "600", "--grid", "600", "-o", "a.webp"]) == 1
    assert "more than its format holds (16383)" in capsys.readouterr().err
    assert (calls.batches, here()) == ([], [])


def test_json_lines(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "ein Bär", "b", "--json", "-o", "{index}.png", "--seed", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"path": "0.png", "prompt": "ein Bär", "seed": 4},
        {"path": "1.png", "prompt": "b", "seed": 5},
    ]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_metadata_says_what_made_the_picture(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    model = tmp_path / "someone" / "my-model"
    model.mkdir(parents=True)
    arguments = ["generate", "a cat", "-o", name, "-m", str(model), "-s", "3", "--negative-prompt", "dogs"]
    assert main(arguments) == 0
    expected = {
        "prompt": "a cat",
        "seed": 3,
        "size": SIDE,
        "guidance_scale": 4.5,
        "num_inference_steps": 8,
        "residual_temperature": 1.0,
        "top_p": 0.0,
        "more_smooth": True,
        "negative_prompt": "dogs",
        "use_system_prompt": True,
        "speed": "exact",
        "model": "my-model",
        "use_ema": True,
        "device": "cpu",
        "dtype": "float32",
        "software": f"hart-infer {hart_infer.__version__}",
    }
    assert read_metadata(name) == expected
    capsys.readouterr()
    assert main(["info", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["info", name]) == 0
    assert re.search(r"^  prompt +a cat$", capsys.readouterr().out, re.MULTILINE)
    assert main([*arguments, "--no-metadata"]) == 0
    assert b"cat" not in Path(name).read_bytes()
    assert main(["info", name]) == 1
    assert "carries no metadata" in capsys.readouterr().err


PRUNED = {"at": [8, 16], "drop": [0.5, 0.75], "cache_at": 4, "once": False}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"speed": "exact", "num_inference_steps": 8}),
        ("--steps 8", {"speed": "exact", "num_inference_steps": 8}),
        ("--steps 4", {"num_inference_steps": 4}),
        ("--speed fast", {"speed": "fast", "num_inference_steps": 8, "guidance_stops_at": 16, "prune": PRUNED}),
        ("--speed turbo", {"speed": "turbo", "num_inference_steps": 4, "guidance_stops_at": 4, "prune": PRUNED}),
        ("--speed turbo --steps 6", {"num_inference_steps": 6, "guidance_stops_at": 4, "prune": PRUNED}),
        (
            "--speed fast --prune-once 16:0.25 --late-temperature 0.5",
            {
                "num_inference_steps": 8,
                "guidance_stops_at": 16,
                "late_temperature": 0.5,
                "prune": {"at": [16], "drop": [0.25], "cache_at": 8, "once": True},
            },
        ),
        ("--stop-after 8", {"num_inference_steps": 8, "stop_after": 8}),
    ],
)
def test_metadata_says_the_speed_and_its_knobs(
    calls: Calls, flags: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The knobs are what the call got; the name stands where they are all its own."""
    monkeypatch.setattr("hart_infer.generation.speed.FINE", 8)
    assert main(["generate", "a cat", "-o", "a.png", *flags.split()]) == 0
    metadata, batch = read_metadata("a.png") or {}, calls.batches[0]
    if "guidance_stops_at" in expected:
        expected = {"late_temperature": 0.75, **expected}
    names = ("speed", "num_inference_steps", "guidance_stops_at", "late_temperature", "prune", "stop_after")
    assert {name: metadata[name] for name in names if name in metadata} == expected
    assert json.loads(json.dumps({name: batch[name] for name in names[1:] if batch[name] is not None})) == {
        name: value for name, value in expected.items() if name != "speed"
    }


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--speed warp", "invalid choice: 'warp'"),
        ("--prune 8", "'8' is not a list of sides and shares; 48:0.5,64:0.75 is one"),
        ("--prune 8:2", "must be a number from 0 to 1, not 2"),
        ("--prune 16:0.5,8:0.5", "must be 2 rising sides"),
        ("--prune 8:0.5 --prune-once 8:0.5", "not allowed with argument --prune"),
        ("--late-temperature 0.5", "late_temperature is of scales that lost their guidance"),
        ("--guidance-stops-at 7", "guidance_stops_at must be the side of one of the model's scales, 1 2 4 8 16, not 7"),
        ("--stop-after 0", "must be a whole number of 1 or more"),
    ],
)
def test_speeds_that_there_are_not(calls: Calls, capsys: pytest.CaptureFixture[str], flags: str, complaint: str) -> None:
    assert main(["generate", "a cat", *flags.split()]) == 2
    assert complaint in capsys.readouterr().err
    assert not calls.batches


def test_previews(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "b", "-o", "{prompt}/x.png", "--preview-dir", "steps", "--batch-size", "2"]) == 0
    expected = [f"x-{picture:03d}-scale-{scale:02d}.png" for picture in (0, 1) for scale in (0, 1)]
    assert sorted(os.listdir("steps")) == expected
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_nothing_is_loaded_if_the_output_cannot_be_written(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("x")
    for arguments in (["-o", "file/cat.png"], ["-o", "cat.png", "--preview-dir", "file"]):
        assert main(["generate", "a", *arguments]) == 1
        assert "is a file, not a folder" in capsys.readouterr().err
    assert (calls.loads, here()) == ([], ["file"])


def test_disk_full_keeps_what_is_finished(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fill_up(descriptor: int) -> None:
        if Path("a-000.png").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    assert main(["generate", "a", "--num", "3", "-o", "a.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "a-000.png\n"
    assert err.endswith("hart-infer generate: a-001.png cannot be written: the disk is full.\n")
    assert here() == ["a-000.png"]


def test_ctrl_c_keeps_what_is_finished(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.error, calls.error_after = KeyboardInterrupt(), 1
    assert main(["generate", "a", "--num", "3", "-o", "a.png", "-q"]) == 130
    assert capsys.readouterr() == ("a-000.png\n", "hart-infer: interrupted\n")
    assert here() == ["a-000.png"]


# --- names


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A cat, on a red sofa!", "a-cat-on-a-red-sofa"),
        ("../../etc/passwd", "etc-passwd"),
        ("ein Bär; ネコ हिन्दी", "ein-bär-ネコ-हिन्दी"),
        ("😺", "picture"),
        ("word " * 100, "-".join(["word"] * 16)),
        ("ネ" * 100, "ネ" * 26),
        ("a\0b\nc", "a-b-c"),
    ],
)
def test_slugs(prompt: str, expected: str) -> None:
    assert naming.slug(prompt) == expected


def test_equal_slugs_are_numbered_around_what_is_there() -> None:
    prompts = ["a cat", "a CAT!", "a cat 000"]
    plan = naming.make_plan("{prompt}.png", prompts, num=1, first_seed=0, grid=False)
    assert [job.path.name for job in plan.jobs] == ["a-cat-001.png", "a-cat-002.png", "a-cat-000.png"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("cats.png", "cats.png"),
        ("out/{prompt}-{seed}.png", "out/hart-grid.png"),
        ("{prompt}/{index:03d}.jpg", "hart-grid.jpg"),
        ("my cat.v2_{seed}.webp", "my cat.v2-grid.webp"),
        ("{prompt:.3}_cats.png", "cats-grid.png"),
        ("a{{b}}.png", "a{b}.png"),
    ],
)
def test_names_of_grids(pattern: str, expected: str) -> None:
    plan = naming.make_plan(pattern, ["a cat", "dog"], num=1, first_seed=0, grid=True)
    assert plan.grid == Path(expected)
    assert plan.grid not in [job.path for job in plan.jobs]


def test_folders_may_have_braces(tmp_path: Path) -> None:
    (tmp_path / "{x}").mkdir()
    plan = naming.make_plan(str(tmp_path / "{x}"), ["a"], num=1, first_seed=0, grid=False)
    assert plan.jobs[0].path == tmp_path / "{x}" / "hart-000.png"
    with pytest.raises(UsageError):
        naming.make_plan("{x}/a.png", ["a"], num=1, first_seed=0, grid=False)


# --- reconstruct, convert, doctor, device


def test_reconstruct(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save("photo.png")
    assert main(["reconstruct", "photo.png", "-o", "again.png", "-q"]) == 0
    assert capsys.readouterr() == ("again.png\thybrid\tinf dB\n", "")
    assert Image.open("again.png").size == (SIDE, SIDE)
    assert calls.loads[0]["text_encoder"] is False
    assert main(["reconstruct", "photo.png", "-o", "again.png", "--mode", "both"]) == 0
    score = 10 * np.log10(255**2)
    assert capsys.readouterr().out == f"again.png\tdiscrete\t{score:.2f} dB\nagain.png\thybrid\tinf dB\n"
    assert Image.open("again.png").size == (3 * SIDE + 8, SIDE)
    assert main(["reconstruct", "photo.png", "-o", "again.png", "--mode", "both", "--json"]) == 0
    psnr = {"discrete": round(score, 4), "hybrid": None}
    assert json.loads(capsys.readouterr().out) == {"path": "again.png", "psnr": psnr}


def test_reconstruct_what_is_no_picture(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:900])
    for name, complaint in (
        ("none.png", "no such file"),
        ("text.png", "not a whole picture"),
        ("cut.png", "not a whole picture"),
        (".", "is not a file"),
    ):
        assert main(["reconstruct", name, "-o", "out.png"]) == 1
        assert complaint in capsys.readouterr().err
    Image.new("RGBA", (64, 32), (0, 0, 0, 0)).save("clear.png")
    assert main(["reconstruct", "clear.png", "-o", "out.png", "--size", "33"]) == 2
    assert "--size 33 is not one that this checkpoint was trained for; it has 32." in capsys.readouterr().err
    assert main(["reconstruct", "clear.png", "-o", "out.png"]) == 0
    assert Image.open("out.png").getpixel((0, 0)) == (255, 255, 255)


def test_convert(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "some/model", "new/folder", "--dtype", "bf16", "--max-shard-size", "500mb"]) == 0
    assert capsys.readouterr().out == f"{Path('new/folder')}\n"
    assert Path("new/folder/model_index.json").read_text() == "500mb"
    assert calls.loads[0]["dtype"] == torch.bfloat16
    assert calls.loads[0]["device"] == "cpu"
    assert main(["convert", "some/model", "other", "--no-text-encoder"]) == 0
    assert calls.loads[1]["text_encoder"] is False
    assert calls.loads[1]["dtype"] is None


def test_convert_refuses_before_loading(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/something").touch()
    for destination, complaint in (
        ("full", "full exists and is not a saved hart_infer checkpoint"),
        ("full/something", "is a file; give a new or empty folder"),
        ("full/something/deep", "can't be written (Not a directory: "),
    ):
        assert main(["convert", "some/model", destination]) == 1
        assert complaint in capsys.readouterr().err.replace(os.sep, "/")
    assert calls.loads == []


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"software", "cpu", "gpu", "kernels", "hub", "used by default"}
    assert report["software"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["kernels"].keys() == set(ops.__all__)
    for name in ("drop_unlikely", "exponential"):
        assert report["kernels"].pop(name).startswith(("cpu", "PyTorch; ")), "any x86-64 CPU runs its kernel"
    assert all(value.startswith("PyTorch; ") for value in report["kernels"].values())
    assert "the compiled extension is absent" in report["gpu"]["compiled_kernels"] or FILE.exists()
    widened = widens(torch.empty(0, dtype=torch.bfloat16), "linear")
    assert report["cpu"]["bf16"] == ("products computed in fp32" if widened else "native")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert report["used by default"]["device"].startswith(f"{device}: ")
    assert main(["doctor"]) == 0
    assert str(Path.home()) not in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there(calls: Calls, capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert main(["generate", "a", "--device", device]) == 1
    assert device in capsys.readouterr().err
    assert calls.loads == []


# --- with a real model


@pytest.fixture
def model(hart_tiny: Path, text_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for the small checkpoint; the test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["-m", str(hart_tiny), "--text-encoder", str(text_tiny), "--dtype", "fp32", "--device", "cpu"]


def pixels(path: str | Path) -> Any:
    return np.asarray(Image.open(path))


def test_pictures_are_those_of_the_pipeline(
    model: list[str], hart_tiny: Path, text_tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a cat", "a red house", "--num", "2", "--seed", "5", *model]
    assert main([*command, "-o", "one/{index}.png", "--preview-dir", "steps"]) == 0
    assert main([*command, "-o", "all/{index}.png", "--batch-size", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a red house", 7),
        ("a red house", 8),
    ]
    pipe = hart_infer.HartPipeline.from_pretrained(hart_tiny, text_encoder=text_tiny, torch_dtype=torch.float32, device="cpu")
    expected = pipe(["a cat", "a red house"], num_images_per_prompt=2, seed=5).images
    for index, image in enumerate(expected):
        assert np.array_equal(pixels(f"all/{index}.png"), np.asarray(image))
        alone = pixels(f"one/{index}.png").astype(int)
        assert np.abs(alone - np.asarray(image)).max() <= 2  # same codes; smooth sampling amplifies rounding
    scales = len(pipe.transformer.config.patch_nums)
    assert len(os.listdir("steps")) == 4 * scales
    assert np.array_equal(pixels(f"steps/3-scale-{scales - 1:02d}.png"), pixels("one/3.png"))


@pytest.mark.parametrize("flags", ["--speed turbo", "--speed draft", "--guidance-stops-at 6 --prune-once 4:0.3,6:0.6"])
def test_a_picture_s_metadata_draws_it_again(model: list[str], hart_tiny: Path, text_tiny: Path, flags: str) -> None:
    assert main(["generate", "a cat", "--seed", "5", "-q", "-o", "a.png", *flags.split(), *model]) == 0
    metadata = read_metadata("a.png") or {}
    not_of_a_call = {"model", "use_ema", "device", "dtype", "software", "text_encoder"}
    pipe = hart_infer.HartPipeline.from_pretrained(hart_tiny, text_encoder=text_tiny, torch_dtype=torch.float32, device="cpu")
    again = pipe(**{name: value for name, value in metadata.items() if name not in not_of_a_call}).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(again))
    assert not np.array_equal(pixels("a.png"), np.asarray(pipe("a cat", seed=5).images[0]))


def test_converted_checkpoint_paints_the_same(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, source, *text_encoder = model[:4]
    assert main(["convert", source, "own", *text_encoder, "--max-shard-size", "1MB", "-q"]) == 0
    assert main(["generate", "a cat", "--seed", "1", "-o", "a.png", *model]) == 0
    assert main(["generate", "a cat", "--seed", "1", "-o", "b.png", "-m", "own", "--dtype", "fp32"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    capsys.readouterr()
    reports = []
    for path in (source, "own"):
        assert main(["info", path, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["parameters"] == reports[1]["parameters"]
    assert any(name.startswith("transformer/model-00001-of-") for name in reports[1]["files"])


def test_info_counts_what_is_loaded(model: list[str], hart_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(hart_tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    pipe = hart_infer.HartPipeline.from_pretrained(hart_tiny, text_encoder=False)
    parts = [*pipe.transformer.parameters(), *pipe.autoencoder.parameters()]
    assert report["parameters"]["total"] == sum(part.numel() for part in parts)
    assert report["memory"]["fp32"]["weights_bytes"] == sum(part.numel() * 4 for part in parts)
    assert report["schedule"]["picture_pixels"] == pipe.sizes[0]
    assert report["defaults"] == {
        "guidance_scale": 4.5,
        "top_p": 0.0,
        "use_system_prompt": True,
        "residual_temperature": 1.0,
        "late_temperature": 1.0,
    }
    assert {"llm/ema_model.bin", "tokenizer/model.safetensors"} == set(report["files"])
    assert main(["info", str(hart_tiny), "--no-ema"]) == 0
    assert "llm/model.safetensors" in capsys.readouterr().out


def test_reconstruct_with_a_real_tokenizer(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((50, 40), 50).convert("RGB").save("photo.jpg")
    options = [*model[:2], *model[4:]]
    assert main(["reconstruct", "photo.jpg", "-o", "out/both.webp", "--mode", "both", "-q", *options]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(\S+\t(discrete|hybrid)\t\d+\.\d\d dB\n){2}", out)
    assert err == ""


@pytest.mark.parametrize("command", [["generate", "a cat"], ["reconstruct", "photo.png", "-o", "again.png"]])
def test_a_size_that_the_model_lacks_is_a_wrong_command_line(
    model: list[str], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    Image.new("RGB", (8, 8)).save("photo.png")
    options = model if command[0] == "generate" else model[:2]
    assert main([*command, "-q", *options, "--size", "7"]) == 2
    assert "--size 7" in capsys.readouterr().err
    assert here() == ["photo.png"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--top-k", "999999"], "999999"),
        (["-m", "no/such/folder"], "no/such/folder"),
        (["-m", "."], "checkpoint"),
        (["--text-encoder", "./nowhere"], "nowhere"),
    ],
)
def test_what_the_library_refuses_is_one_sentence(
    model: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(["generate", "a cat", "-q", "--local-files-only", *model, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hart-infer generate: ")
    assert complaint in err
    assert "Traceback" not in err
    assert here() == []


def test_info_of_a_hub_id_downloads_configurations_only(hart_tiny: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "someone" / "hart"
    for name in ("llm", "tokenizer"):
        shutil.copytree(hart_tiny / name, repo / name)
    hub_environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with HubServer(tmp_path / "hub") as hub:
        hub_environment["HF_ENDPOINT"] = hub.url
        result = shell("info", "someone/hart", "--json", more=hub_environment)
        assert result.returncode == 0
        assert hub.downloaded("someone/hart") == ["llm/config.json", "tokenizer/config.json"]
        missing = shell("info", "someone/else", more=hub_environment)
    report = json.loads(result.stdout)
    assert report["files"] == {}
    assert report["parameters"]["total"] > 2_000_000
    assert missing.returncode == 1
    assert missing.stderr.startswith("hart-infer info: someone/else ")
    offline = shell("info", "someone/hart", "--local-files-only", more=hub_environment)
    assert (offline.returncode, offline.stderr) == (0, "")
    assert "not on this machine" in offline.stdout


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_in_the_middle(model: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hart_infer", "generate", "a cat", "--num", "2000", *model]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, their children too
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path, preexec_fn=heed
    ) as process:
        assert process.stdout
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.endswith("hart-infer: interrupted\n")
    assert "Traceback" not in err
    assert sorted((first + out).split()) == sorted(os.listdir(tmp_path))


# --- as a process


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("POSIX pipes")
    command = [sys.executable, "-m", "hart_infer", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=tmp_path) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


# --- what hostile use found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hart_infer", "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr == "hart-infer doctor: standard output cannot be written: no space left on device.\n"


def test_metadata_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (2, 2)), path, metadata={"prompt": "a \x1b[31mcat\x07\x9b2J", "seed": 2972281612})
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert r"a \x1b[31mcat\x07\x9b2J" in shown
    assert "2972281612" in shown  # as --seed takes it
    assert not any(c in shown for c in "\x1b\x07\x9b")


@pytest.mark.parametrize("break_", ["\n", "\r", "\x0b", "\x85", "\u2028", "\u2029"])
def test_metadata_fakes_no_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], break_: str) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (2, 2)), path, metadata={"prompt": f"x{break_}  seed  1", f"a{break_}  seed": 1, "seed": 2})
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 4
    assert re.findall(r"^  seed +(\d)$", shown, re.MULTILINE) == ["2"]


def test_what_reverses_text_is_escaped_and_what_joins_letters_is_not(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-o", "\u202egnp.exe\u2066.png", "-q"]) == 0
    assert capsys.readouterr().out == "\\u202egnp.exe\\u2066.png\n"
    assert main(["generate", "a", "-o", "\u0645\u06cc\u200c\u062e.png", "-q"]) == 0  # Persian is written with it
    assert capsys.readouterr().out == "\u0645\u06cc\u200c\u062e.png\n"


def test_messages_and_log_lines_fake_no_lines(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.error = OutOfMemoryError("one\nhart-infer: done\x1b[2J")
    assert main(["generate", "a", "-q"]) == 1
    assert capsys.readouterr().err == "hart-infer generate: one\\nhart-infer: done\\x1b[2J\n"
    with library_messages(quiet=False, debug=False):
        logging.getLogger("hart_infer").warning("two\nlines\u202e")
    assert capsys.readouterr().err == "hart-infer: warning: two\\nlines\\u202e\n"


def test_a_name_too_long_is_shortened_in_the_message(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-o", f"{'x' * 5000}.png"]) == 1
    err = capsys.readouterr().err
    assert "the name is too long" in err
    assert len(err) < 200


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 1, "hart-infer doctor: standard output cannot be written: it is closed.\n"),
        (">&- 2>&-", 1, ""),
        ("2>&- >/dev/null", 0, ""),
    ],
)
def test_closed_streams(redirection: str, code: int, message: str) -> None:
    command = f'"{sys.executable}" -m hart_infer doctor {redirection}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)


def test_a_picture_is_written_though_stderr_is_closed(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", "a", "-o", "a.png"]) == 0
    assert here() == ["a.png"]
    assert {"disable": True} in calls.bars
    assert main(["generate", "a", "-o", "a.gif"]) == 2
    assert main(["generate", "a", "--nonsense"]) == 2


def test_info_of_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "missing.png"]) == 1
    assert capsys.readouterr().err == "hart-infer info: missing.png does not exist.\n"


@pytest.mark.parametrize("device", ["xpu", "meta", "vulkan"])
def test_a_device_that_the_models_do_not_run_on(calls: Calls, capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert main(["generate", "a", "--device", device]) == 1
    assert f"'{device}' is not a device that hart_infer runs on; cpu, cuda, mps are." in capsys.readouterr().err
    assert calls.loads == []


def test_threads_are_the_pipeline_s(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = sys.modules["hart_infer.pipelines.hart"].HartPipeline
    monkeypatch.setattr(pipeline, "num_threads", 1, raising=False)
    seen: list[int] = []
    call = pipeline.__call__
    monkeypatch.setattr(pipeline, "__call__", lambda self, *a, **k: seen.append(self.num_threads) or call(self, *a, **k))
    assert main(["generate", "a", "--threads", "3", "-q"]) == main(["generate", "a", "-q"]) == 0
    assert seen == [3, 1]


def test_info_of_a_configuration_out_of_reason(hart_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(hart_tiny, tmp_path / "large", ignore=shutil.ignore_patterns("trace*"))
    config = json.loads((root / "llm/config.json").read_text()) | {"depth": 10**9}
    (root / "llm/config.json").write_text(json.dumps(config))
    assert main(["info", str(root)]) == 1
    assert "depth must be at most 1,024, not 1,000,000,000." in capsys.readouterr().err
