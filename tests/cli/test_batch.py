"""The command: its options, what it prints, and pictures of all three families."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hart_infer import HartPipeline
from hart_infer.batch.rows import SETTINGS
from hart_infer.cli import batch, main
from hart_infer.cli.families import SPEED_OPTIONS
from hart_infer.cli.sampling import SamplingOptions
from hart_infer.images.files import read_metadata
from tests.released_vila_u import write_checkpoint

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(out: str = "out") -> list[dict[str, Any]]:
    return parquet.read_table(f"{out}/manifest.parquet").to_pylist()


def test_hart_mini_draws_a_table(capsys):
    Path("p.csv").write_text("id,prompt,seed,guidance_scale\ncat,a cat,7,\ndog,a dog,8,2\nbad,,,\n")
    assert main(["batch", "p.csv", "-o", "out", "--grid", "--batch-size", "2", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "manifest": "out/manifest.parquet",
        "rows": 3,
        "drawn": 2,
        "failed": 1,
        "drawn_before": 0,
    }
    assert "3 rows: 1 refused, 2 to draw" in printed.err
    assert "1 of 3 rows could not be drawn; the manifest's column error says why." in printed.err
    assert [(line["id"], line["error"]) for line in lines()] == [
        ("cat", None),
        ("dog", None),
        ("bad", "line 4: there is no prompt"),
    ]
    assert [json.loads(line["settings"])["guidance_scale"] for line in lines()[:2]] == [0.0, 2.0]
    assert {line["model"] for line in lines()[:2]} == {"hart-mini"}
    assert main(["generate", "a cat", "--seed", "7", "-o", "alone.png", "--quiet"]) == 0
    assert Image.open("alone.png").tobytes() == Image.open("out/images/cat.png").tobytes()
    batched, alone = read_metadata("out/images/cat.png"), read_metadata("alone.png")
    assert batched == alone
    side = Image.open("alone.png").width
    assert Image.open(next(Path("out/sheets").iterdir())).size == (2 * side + 4, side)
    capsys.readouterr()
    Path("p.csv").write_text("id,prompt,seed\ncat,a cat,7\ndog,a dog,8\n")
    assert main(["batch", "p.csv", "-o", "out"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "out/manifest.parquet\n"
    assert "2 rows: 2 drawn before, 0 to draw" in printed.err
    assert "loading" not in printed.err
    assert main(["batch", "p.csv", "-o", "out", "--guidance-scale", "3"]) == 1
    assert "out was begun with guidance_scale left out, not 3.0. Give the same again" in capsys.readouterr().err


def test_a_changed_prompt_of_a_drawn_row_is_counted(capsys):
    Path("p.csv").write_text("id,prompt\na,a cat\nb,a dog\n")
    assert main(["batch", "p.csv", "-o", "out"]) == 0
    assert "another prompt" not in capsys.readouterr().err
    Path("p.csv").write_text("id,prompt\na,a cat\nb,an owl\n")
    assert main(["batch", "p.csv", "-o", "out"]) == 0
    told = capsys.readouterr().err
    assert "\nRows drawn before that have another prompt now, and keep their picture: 1. New ids have them drawn.\n" in told
    assert "owl" not in told
    assert main(["batch", "p.csv", "-o", "out", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_how_far_it_is_and_what_is_left(monkeypatch, terminal):
    class Stderr(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    Path("p.csv").write_text("id,prompt\na,a cat\nb,a dog\nc,\n")
    monkeypatch.setattr(batch, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(sys, "stderr", Stderr())
    assert main(["batch", "p.csv", "-o", "out", "--chunk-size", "1"]) == 1
    shown = sys.stderr.getvalue()
    assert "3 rows: 1 refused, 2 to draw\n" in shown
    if terminal:
        assert re.search(r"2/3 \[00:\d\d<00:\d\d, .*1 failed\]", shown)
        assert "3/3" in shown
        assert "\nhart-mini draws" in shown  # on a line of its own
    else:
        assert re.search(r"\n2 of 3 rows, 1 failed; 00:\d\d left\n", shown)
        assert "row/s" not in shown


def test_var_draws_classes(whole_var_tiny, capsys):
    Path("p.csv").write_text("label,top_k,num_inference_steps\n3,,\n4,5,\n77,,\n1,,4\n")
    assert main(["batch", "p.csv", "-o", "out", "-m", str(whole_var_tiny), "--format", "webdataset", "--quiet"]) == 1
    drawn, small, unknown, steps = lines()
    assert (drawn["error"], small["error"]) == (None, None)
    assert json.loads(small["settings"])["top_k"] == 5
    assert "a class must be a whole number from 0 to 9, not 77" in unknown["error"]
    assert "does not take num_inference_steps" in steps["error"]
    assert drawn["model"] == whole_var_tiny.name
    assert len(list(Path("out/shards").iterdir())) == 1


def test_vila_u_draws_prompts(tmp_path):
    model = write_checkpoint(tmp_path / "vila-u")
    Path("p.jsonl").write_text('{"prompt": "a cat", "id": 1}\n{"prompt": "a dog", "id": 2, "negative_prompt": "a sofa"}\n')
    assert main(["batch", "p.jsonl", "-o", "out", "-m", str(model), "--quiet"]) == 0
    assert sorted(path.name for path in Path("out/images").iterdir()) == ["1.png", "2.png"]


def test_a_folder_takes_no_pictures_of_other_weights(capsys, tmp_path):
    """Two checkpoints of one name, and one in two dtypes."""
    Path("p.txt").write_text("a cat\n")
    Path("q.txt").write_text("a cat\na dog\n")
    pipe = HartPipeline.from_pretrained("hart-mini", device="cpu")
    pipe.save_pretrained(tmp_path / "one" / "model")
    pipe.transformer.load_state_dict({name: -each for name, each in pipe.transformer.state_dict().items()})
    pipe.save_pretrained(tmp_path / "two" / "model")
    assert main(["batch", "p.txt", "-o", "out", "-m", "one/model", "--quiet"]) == 0
    for other in (["-m", "two/model"], ["-m", "one/model", "--dtype", "fp32"]):
        assert main(["batch", "q.txt", "-o", "out", "--quiet", *other]) == 1
    told = capsys.readouterr().err
    assert "was begun with other weights" in told
    assert 'was begun with dtype left out, not "fp32"' in told
    assert len(lines()) == 1


def test_a_row_may_change_what_the_command_line_sets():
    assert {*SETTINGS, *SPEED_OPTIONS, "preset"} == set(SamplingOptions.__dataclass_fields__)


def test_speed_is_a_setting_of_the_run(capsys):
    Path("p.csv").write_text("id,prompt,num_inference_steps\na,a cat,\nb,a cat,2\n")
    command = ["batch", "p.csv", "-o", "out", "--quiet", "--prune"]
    assert main([*command, "10:0.5"]) == 0
    assert main([*command, "10:0.5"]) == 0
    first, second = (json.loads(line["settings"]) for line in lines())
    assert first["prune"] == second["prune"] == {"at": [10], "drop": [0.5], "cache_at": 6, "once": False}
    assert (first["num_inference_steps"], second["num_inference_steps"]) == (8, 2)
    assert main([*command, "10:0.25"]) == 1
    assert "was begun with prune" in capsys.readouterr().err
    assert main(["batch", "p.csv", "-o", "fast", "--quiet", "--speed", "fast"]) == 0
    assert ["speed" in json.loads(line["settings"]) for line in lines("fast")] == [True, False]
    assert main(["batch", "p.csv", "-o", "none", "--quiet", "--stop-after", "5000"]) == 1
    assert "hart-infer batch: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["p.txt"], 2, "the following arguments are required: -o/--out"),
        (["-o", "out"], 2, "the following arguments are required: FILE"),
        (["none.txt", "-o", "out"], 1, "none.txt cannot be read: no such file or directory"),
        (["p.doc", "-o", "out"], 1, "p.doc must end in .txt, .csv, .jsonl, .parquet"),
        (["p.txt", "-o", "out", "--workers", "2"], 2, "go with --ray, such as --ray local"),
        (["p.txt", "-o", "out", "--chunk-size", "0"], 2, "--chunk-size: must be a whole number of 1 or more"),
        (["p.txt", "-o", "out", "-m", "nowhere"], 1, "nowhere is neither an existing folder nor a Hub id"),
        (["p.txt", "-o", "out", "--preset", "fid"], 2, "hart-mini is a HART model, which does not take --preset"),
        (["p.txt", "-o", "out", "--size", "256"], 1, "--size 256 is not one that this checkpoint was trained for"),
        (["p.txt", "-o", "p.txt", "--quiet"], 1, "a part of its path is a file, not a folder"),
        (["p.txt", "-o", "ftp://x/y"], 1, "ftp://x/y is neither a folder nor a URL of an object store"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, code, told):
    Path("p.txt").write_text("a cat\n")
    assert main(["batch", *arguments]) == code
    assert told in capsys.readouterr().err
    assert not Path("out/images").exists()


@pytest.mark.parametrize(
    ("missing", "arguments"), [("ray", ["--ray", "local"]), ("pyarrow", [])], ids=["without-ray", "without-pyarrow"]
)
def test_what_is_not_installed_is_named_before_anything_is_done(capsys, monkeypatch, missing, arguments):
    Path("p.txt").write_text("a cat\n")
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["batch", "p.txt", "-o", "out", *arguments]) == 1
    assert "pip install 'hart-infer[batch]'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_ray_cluster_that_is_not_there(capsys):
    pytest.importorskip("ray")
    Path("p.txt").write_text("a cat\n")
    assert main(["batch", "p.txt", "-o", "out", "--ray", "nonsense"]) == 1
    assert "There is no Ray cluster at nonsense" in capsys.readouterr().err
