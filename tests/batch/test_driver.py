"""A run in this process: what it writes, what it goes on with, what it records of rows that can't be drawn."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hart_infer.batch.driver import Progress, run_batch
from hart_infer.batch.reading import read_table
from hart_infer.batch.rows import Row
from hart_infer.batch.storage import open_storage
from hart_infer.batch.worker import BrokenWorkerError, WorkerOptions
from hart_infer.errors import HartError, InputError, OutputError
from hart_infer.images.files import read_metadata
from tests.batch import stand_in

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def calls() -> list[dict[str, Any]]:
    stand_in.CALLS.clear()
    return stand_in.CALLS


def make_rows(tmp_path: Path, *rows: str | dict[str, Any]) -> list[Row]:
    """Rows with ids "0", "1", ..., of prompts or of columns."""
    found = [{"id": str(i), **({"prompt": row} if isinstance(row, str) else row)} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))
    return read_table(str(tmp_path / "rows.jsonl")).rows


def run(rows: list[Row], out: Path | str, chunk_size: int = 2, described: Any = None, **options: Any) -> Progress:
    asked = WorkerOptions(stand_in.load, str(out), **options)
    return run_batch(rows, asked, chunk_size=chunk_size, described=described or {})


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    lines = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def files(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_every_row_has_its_picture_and_its_line(tmp_path):
    rows = make_rows(tmp_path, "a cat", "a dog", {"prompt": "an owl", "seed": 7, "guidance_scale": 3})
    end = run(rows, tmp_path / "out")
    assert (end.drawn, end.failed, end.left, end.before) == (3, 0, 0, 0)
    assert files(tmp_path / "out") == ["batch.json", "images/0.png", "images/1.png", "images/2.png", "manifest.parquet"]
    for row, line in zip(rows, manifest(tmp_path / "out").values(), strict=True):
        picture = tmp_path / "out" / line["file"]
        assert hashlib.sha256(picture.read_bytes()).hexdigest() == line["sha256"]
        assert Image.open(picture).tobytes() == stand_in.colour(line["seed"]).tobytes()
        assert (line["id"], line["prompt"], line["seed"]) == (row.id, row.prompt, row.seed)
        assert (line["model"], line["error"]) == ("stand-in", None)
        assert line["seconds"] >= 0
        scale = 3.0 if row.id == "2" else 2.0
        assert json.loads(line["settings"]) == {"guidance_scale": scale, "dtype": "float32"}
        facts = {"prompt": row.prompt, "seed": row.seed, "size": stand_in.SIDE, "model": "stand-in"}
        assert read_metadata(picture) == {**facts, "guidance_scale": scale, "dtype": "float32"}


def test_rows_are_packed_by_settings(tmp_path, calls):
    scales = [None, 3, None, 3, None, None]
    rows = make_rows(tmp_path, *[{"prompt": f"p{i}", "guidance_scale": scale} for i, scale in enumerate(scales)])
    run(rows, tmp_path / "out", chunk_size=6, batch_size=3)
    assert [(call["prompts"], call["guidance_scale"]) for call in calls] == [
        (["p0", "p2", "p4"], 2.0),
        (["p5"], 2.0),
        (["p1", "p3"], 3.0),
    ]


def test_a_finished_row_is_never_drawn_again(tmp_path, calls):
    rows = make_rows(tmp_path, "a", "b", "c")
    run(rows, tmp_path / "out")
    before = manifest(tmp_path / "out")
    calls.clear()
    end = run([*rows, *make_rows(tmp_path, *"abcd")[3:]], tmp_path / "out")
    assert [call["prompts"] for call in calls] == [["d"]]
    assert (end.drawn, end.before) == (4, 3)
    assert {**before, "3": manifest(tmp_path / "out")["3"]} == manifest(tmp_path / "out")


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, calls):
    rows = make_rows(tmp_path, *"abcdefg")
    run(rows, tmp_path / "whole")
    interrupted = [replace(row, prompt="interrupt") if row.id == "5" else row for row in rows]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, tmp_path / "out")
    assert "manifest.parquet" not in files(tmp_path / "out")
    run(rows, tmp_path / "out")
    assert [call["prompts"][0] for call in calls] == [*"abcde", "interrupt", *"efg"]  # "e" was not finished
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    ended, whole = manifest(tmp_path / "out"), manifest(tmp_path / "whole")
    assert list(ended) == list(whole)
    assert all(replace_seconds(ended[i]) == replace_seconds(whole[i]) for i in whole)


def replace_seconds(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "seconds": 0}


def test_a_row_without_a_subject_leaves_its_batch_together(tmp_path, calls):
    rows = make_rows(tmp_path, "a", "nonsense", {"prompt": "b", "top_k": 3}, {"prompt": "c", "top_p": 0.5}, "d")
    run(rows, tmp_path / "out", chunk_size=5, batch_size=5)
    assert [call["prompts"] for call in calls] == [["a", "d"], ["b"]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bad_row_is_recorded_and_the_others_are_drawn(tmp_path, batch_size):
    rows = make_rows(
        tmp_path, "a", "nonsense", "fail", {"prompt": "b", "top_p": 0.5}, {"prompt": "c", "seed": -1}, "large", "d"
    )
    end = run(rows, tmp_path / "out", chunk_size=4, batch_size=batch_size)
    assert (end.drawn, end.failed) == (3, 4)
    lines = manifest(tmp_path / "out")
    assert {i: line["error"] for i, line in lines.items() if line["error"] is not None} == {
        "1": "nonsense is no class.",
        "2": "ValueError: no such thing",
        "3": "stand-in does not take top_p; leave the cell empty.",
        "4": "line 5: seed must be a whole number from 0 to 18446744073709551615, not -1.",
    }
    assert [line["file"] for line in lines.values() if line["error"] is None] == [f"images/{i}.png" for i in (0, 5, 6)]
    assert list(lines) == [row.id for row in rows]


def test_rows_that_failed_are_tried_again(tmp_path):
    run(make_rows(tmp_path, "a", "nonsense", {"prompt": "b", "seed": "x"}), tmp_path / "out")
    end = run(make_rows(tmp_path, "a", "sense", {"prompt": "b", "seed": 3}), tmp_path / "out")
    assert (end.drawn, end.failed, end.before) == (3, 0, 1)
    assert [(line["prompt"], line["error"]) for line in manifest(tmp_path / "out").values()] == [
        ("a", None),
        ("sense", None),
        ("b", None),
    ]


def test_a_picture_stays_when_its_row_goes_bad(tmp_path):
    run(make_rows(tmp_path, "a"), tmp_path / "out")
    end = run(make_rows(tmp_path, {"prompt": "a", "seed": "x"}), tmp_path / "out")
    assert (end.drawn, end.failed) == (1, 0)
    assert manifest(tmp_path / "out")["0"]["error"] is None


def test_nothing_to_draw_loads_no_model(tmp_path):
    rows = make_rows(tmp_path, {"id": "x"}, {"id": "y", "prompt": ""})
    asked = WorkerOptions(lambda: pytest.fail("loaded"), str(tmp_path / "out"))
    end = run_batch(rows, asked, chunk_size=2, described={})
    assert (end.drawn, end.failed) == (0, 2)
    assert [line["error"] for line in manifest(tmp_path / "out").values()] == [
        "line 1: there is no prompt",
        "line 2: there is no prompt",
    ]


def test_shards_are_what_webdataset_reads(tmp_path):
    rows = make_rows(tmp_path, "a", "ß", "nonsense", "b", "nonsense")
    run(rows, tmp_path / "out", chunk_size=4, format="webdataset", with_metadata=False)
    (shard,) = (tmp_path / "out" / "shards").iterdir()  # the second chunk has no picture
    with tarfile.open(shard) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    assert list(contents) == [f"{i}.{kind}" for i in (0, 1, 3) for kind in ("png", "txt", "json")]
    assert contents["1.txt"].decode() == "ß"
    assert json.loads(contents["3.json"]) == {"id": "3", "seed": rows[3].seed}
    assert Image.open(io.BytesIO(contents["3.png"])).tobytes() == stand_in.colour(rows[3].seed).tobytes()
    line = manifest(tmp_path / "out")["3"]
    assert line["file"] == f"shards/{shard.name}/3.png"
    assert line["sha256"] == hashlib.sha256(contents["3.png"]).hexdigest()


def test_shards_of_two_runs_are_equal_to_the_byte(tmp_path):
    rows = make_rows(tmp_path, *"abc")
    for out in ("one", "two"):
        run(rows, tmp_path / out, format="webdataset")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out / "shards").iterdir()} for out in ("one", "two"))
    assert len(one) == 2
    assert one == two


def test_contact_sheets(tmp_path):
    run(make_rows(tmp_path, *"abcde"), tmp_path / "out", chunk_size=4, sheets=True)
    first, second = sorted((tmp_path / "out" / "sheets").iterdir())
    assert Image.open(first).size == (2 * stand_in.SIDE + 4, 2 * stand_in.SIDE + 4)
    assert Image.open(second).size == (stand_in.SIDE, stand_in.SIDE)


def test_an_object_store(tmp_path):
    pytest.importorskip("fsspec")
    out = f"memory://bucket-{tmp_path.name}/run[1]/"
    rows = make_rows(tmp_path, *"abc", "nonsense")
    assert run(rows, out).failed == 1
    end = run(make_rows(tmp_path, *"abcd"), out, sheets=True)
    assert (end.drawn, end.before) == (4, 3)
    storage = open_storage(out)
    assert storage.names("images") == [f"images/{i}.png" for i in range(4)]
    assert storage.names("") == ["batch.json", "manifest.parquet"]
    assert storage.names("manifest") == []
    lines = parquet.read_table(io.BytesIO(storage.read(["manifest.parquet"])[0])).to_pylist()
    assert [line["error"] for line in lines] == [None] * 4
    assert hashlib.sha256(storage.read([lines[2]["file"]])[0]).hexdigest() == lines[2]["sha256"]


@pytest.mark.parametrize("out", ["s4://bucket/x", "http://example.org/x"])
def test_an_unknown_store_is_refused(tmp_path, out):
    with pytest.raises(InputError, match="neither a folder nor a URL of an object store"):
        run(make_rows(tmp_path, "a"), out)


def test_a_store_whose_library_is_missing_is_named(tmp_path, monkeypatch):
    import fsspec

    def missing(scheme: str) -> None:
        raise ImportError(f"Install {scheme}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match="gs:// needs gcsfs: pip install gcsfs."):
        run(make_rows(tmp_path, "a"), "gs://bucket/x")


def test_other_settings_are_refused(tmp_path):
    rows = make_rows(tmp_path, "a")
    run(rows, tmp_path / "out", described={"model": "m", "top_k": 3})
    run(rows, tmp_path / "out", described={"top_k": 3, "model": "m"})
    with pytest.raises(InputError, match=r"was begun with seed left out, not 1; top_k 3, not left out\. Give"):
        run(rows, tmp_path / "out", described={"model": "m", "seed": 1})


def test_other_weights_are_refused(tmp_path):
    rows = make_rows(tmp_path, "a", "b")
    run(rows[:1], tmp_path / "out")

    def other() -> Any:
        return replace(stand_in.load(), weights="4567")

    asked = WorkerOptions(other, str(tmp_path / "out"))
    with pytest.raises(InputError, match="was begun with other weights, or with the same in another dtype"):
        run_batch(rows, asked, chunk_size=2, described={})
    assert run(rows, tmp_path / "out").drawn == 2


def test_what_a_run_claimed_that_loaded_no_model_is_replaced(tmp_path):
    def refuse() -> Any:
        raise InputError("size must be 16, not 999.")

    rows = make_rows(tmp_path, "a")
    asked = WorkerOptions(refuse, str(tmp_path / "out"))
    with pytest.raises(InputError, match="999"):
        run_batch(rows, asked, chunk_size=2, described={"size": 999})
    assert run(rows, tmp_path / "out", described={"size": 16}).drawn == 1
    with pytest.raises(InputError, match="was begun with size 16, not 999"):
        run(rows, tmp_path / "out", described={"size": 999})


@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_files_of_others_stay(tmp_path, kind):
    out = tmp_path / "out"
    others = ["shards/my-dataset-000.tar", "shards/000000-0123abcd.tar/0.png", "sheets/budget.xlsx"]
    for name in others:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine")
    run(make_rows(tmp_path, "a"), out, format=kind, sheets=True)
    assert all((out / name).read_bytes() == b"mine" for name in others)


def test_a_batch_json_of_others_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "batch.json").write_text('{"jobs": [1]}')
    with pytest.raises(InputError, match=r"was begun with jobs \[1\], not left out"):
        run(make_rows(tmp_path, "a"), tmp_path / "out")
    assert (tmp_path / "out" / "batch.json").read_text() == '{"jobs": [1]}'


@pytest.mark.parametrize(("name", "content"), [("batch.json", b"[1]"), ("batch.json", b"x"), ("manifest.parquet", b"x")])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not"):
        run(make_rows(tmp_path, "a"), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == content
    assert "images/0.png" not in files(tmp_path / "out")


def test_a_full_disk_ends_the_run_and_records_nothing_false(tmp_path, monkeypatch):
    from hart_infer.batch import worker

    rows = make_rows(tmp_path, *"abcd")

    def full(*args: Any, **options: Any) -> None:
        raise OutputError("images/2.png cannot be written: the disk is full.")

    write = worker.write_part

    def write_one(storage: Any, name: str, records: Any) -> None:
        write(storage, name, records)
        monkeypatch.setattr(worker, "open_writer", full)

    monkeypatch.setattr(worker, "write_part", write_one)
    with pytest.raises(OutputError, match="the disk is full"):
        run(rows, tmp_path / "out")
    monkeypatch.undo()
    assert run(rows, tmp_path / "out").before == 2


def test_a_device_that_failed_ends_the_run_here(tmp_path):
    with pytest.raises(BrokenWorkerError, match="illegal memory access"):
        run(make_rows(tmp_path, "a", "break", "b"), tmp_path / "out")
    assert issubclass(BrokenWorkerError, HartError)


def test_what_killed_writers_left_is_tidied_away(tmp_path):
    left = tmp_path / "out" / "images" / ".hart-0123456789ab.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (left.parent / ".mine").write_bytes(b"")
    run(make_rows(tmp_path, "a"), tmp_path / "out")
    assert files(tmp_path / "out" / "images") == [".mine", "0.png"]


def test_progress_counts_every_row(tmp_path):
    rows = make_rows(tmp_path, *"abc", "nonsense", {"id": "x"})
    run(rows[:2], tmp_path / "out")
    seen: list[Progress] = []
    run_batch(rows, WorkerOptions(stand_in.load, str(tmp_path / "out")), chunk_size=2, described={}, on_progress=seen.append)
    assert [(each.drawn, each.failed, each.left) for each in seen] == [(2, 1, 2), (3, 2, 0)]
    assert {(each.total, each.before) for each in seen} == {(5, 2)}


def test_a_kill_between_writing_and_removing_loses_and_doubles_nothing(tmp_path, monkeypatch):
    """The whole manifest and its parts side by side say the same."""
    rows = make_rows(tmp_path, *"abcd")

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    from hart_infer.batch.storage import LocalStorage

    monkeypatch.setattr(LocalStorage, "remove", die)
    with pytest.raises(Killed):
        run(rows, tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "manifest").iterdir())) == 2
    end = run(rows, tmp_path / "out")
    assert (end.drawn, end.before) == (4, 4)
    assert len(manifest(tmp_path / "out")) == 4
    assert not list((tmp_path / "out" / "manifest").iterdir())


@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_a_shard_or_sheet_that_a_kill_left_without_its_part_is_removed(tmp_path, monkeypatch, kind):
    from hart_infer.batch import worker

    class Killed(BaseException):
        pass

    def die(*args: Any) -> None:
        raise Killed

    rows, out = make_rows(tmp_path, *"abcdef"), tmp_path / "out"
    folders = ["sheets"] if kind == "png" else ["sheets", "shards"]
    run(rows[:2], out, format=kind, sheets=True)
    kept = {folder: set((out / folder).iterdir()) for folder in folders}
    monkeypatch.setattr(worker, "write_part", die)
    with pytest.raises(Killed):
        run(rows, out, chunk_size=3, format=kind, sheets=True)
    monkeypatch.undo()
    left = {folder: set((out / folder).iterdir()) - kept[folder] for folder in folders}
    assert all(left.values())
    run(rows, out, format=kind, sheets=True)
    run(rows, out, format=kind, sheets=True)
    for folder in folders:
        there = set((out / folder).iterdir())
        assert len(there) == 3
        assert kept[folder] < there
        assert not left[folder] & there
    if kind == "webdataset":
        shards = {Path(line["file"]).parent.name for line in manifest(out).values()}
        assert {path.name for path in (out / "shards").iterdir()} == shards


def test_sheets_of_a_manifest_that_names_none_stay(tmp_path):
    rows, out = make_rows(tmp_path, *"abcd"), tmp_path / "out"
    run(rows[:2], out, sheets=True)
    parquet.write_table(parquet.read_table(out / "manifest.parquet").replace_schema_metadata(None), out / "manifest.parquet")
    run(rows, out, sheets=True)
    assert len(list((out / "sheets").iterdir())) == 2


def test_the_error_of_a_row_that_is_gone_goes_too_and_a_picture_stays(tmp_path):
    """A row without an id that is mended has another id."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "seed": "x"}\n{"prompt": "b"}\n')
    assert run(read_table(str(rows)).rows, tmp_path / "out").failed == 1
    rows.write_text('{"prompt": "a", "seed": 3}\n')
    assert run(read_table(str(rows)).rows, tmp_path / "out").failed == 0
    lines = list(manifest(tmp_path / "out").values())
    assert [(line["prompt"], line["error"]) for line in lines] == [("a", None), ("b", None)]


def test_a_disk_without_locks_is_written_unguarded(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(make_rows(tmp_path, "a"), tmp_path / "out").drawn == 1
