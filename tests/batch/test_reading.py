"""Rows from files: ids, seeds, settings, and what is wrong with those that can't be drawn."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hart_infer.batch.reading import read_table
from hart_infer.batch.rows import Row
from hart_infer.errors import InputError

pyarrow = pytest.importorskip("pyarrow")


def rows_of(path: Path, content: str | bytes, seed: int = 0) -> list[Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(str(path), seed).rows


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def test_every_format_reads_the_same_rows(tmp_path):
    values = [
        {"id": "a", "prompt": "a cat", "seed": 7, "top_k": 50},
        {"id": "b", "prompt": 'a "dog", barking', "top_p": 0.5},
        {"prompt": "ein Büffel", "more_smooth": False, "guidance_scale": 3.0},
    ]
    names = list(dict.fromkeys(name for value in values for name in value))
    lines = [",".join(names)]
    lines += [
        ",".join('"' + str(value[name]).replace('"', '""') + '"' if name in value else "" for name in names) for value in values
    ]
    write_parquet(tmp_path / "p.parquet", {name: [value.get(name) for value in values] for name in names})
    csv = rows_of(tmp_path / "p.csv", "\n".join(lines))
    jsonl = rows_of(tmp_path / "p.jsonl", "\n".join(json.dumps(value) for value in values))
    parquet = read_table(str(tmp_path / "p.parquet")).rows
    assert [(row.id, row.prompt, row.seed) for row in csv[:1]] == [("a", "a cat", 7)]
    assert csv[1].settings == (("top_p", 0.5),)
    assert csv[2].settings == (("guidance_scale", 3.0), ("more_smooth", False))
    assert csv[:2] == jsonl[:2] == parquet[:2]
    assert [row.settings for row in csv] == [row.settings for row in jsonl] == [row.settings for row in parquet]
    assert [row.prompt for row in csv] == [row.prompt for row in jsonl] == [row.prompt for row in parquet]


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    rows = rows_of(tmp_path / "p.txt", "\ufeff# a comment\r\na cat\r\n\r\n  a dog  \nan owl")
    assert [row.prompt for row in rows] == ["a cat", "a dog", "an owl"]
    assert len({row.id for row in rows}) == len({row.seed for row in rows}) == 3


def test_ids_and_seeds_do_not_depend_on_where_a_row_stands(tmp_path):
    first = rows_of(tmp_path / "p.txt", "a cat\na dog\na cat\n")
    other = rows_of(tmp_path / "p.txt", "an owl\na cat\na cat\na dog\n")
    assert len({row.id for row in first}) == 3
    assert {(row.id, row.seed, row.prompt) for row in first} < {(row.id, row.seed, row.prompt) for row in other}


def test_the_base_seed_changes_seeds_and_no_ids(tmp_path):
    first, other = (rows_of(tmp_path / "p.csv", "prompt,seed\na cat,\na dog,5\n", seed) for seed in (0, 1))
    assert [row.id for row in first] == [row.id for row in other]
    assert first[0].seed != other[0].seed
    assert first[1].seed == other[1].seed == 5


def test_labels_are_prompts_and_numbers_are_texts(tmp_path):
    assert [row.prompt for row in rows_of(tmp_path / "p.jsonl", '{"label": 207}\n{"label": "tench"}\n')] == ["207", "tench"]
    write_parquet(tmp_path / "p.parquet", {"label": [0, 1]})
    assert [row.prompt for row in read_table(str(tmp_path / "p.parquet")).rows] == ["0", "1"]


def test_whole_numbers_that_a_table_writes_as_floats(tmp_path):
    text = "id,prompt,seed,top_k,size\nx,7.0,7.0,50.0,256.0\ny,b,,,\n"
    first, second = rows_of(tmp_path / "p.csv", text)
    assert (first.error, first.prompt, first.seed, first.settings) == (None, "7.0", 7, (("size", 256), ("top_k", 50)))
    assert second.error is None
    assert [row.prompt for row in rows_of(tmp_path / "p.csv", "label\n207.0\ntench\n007\n1e3\n")] == [
        "207",
        "tench",
        "007",
        "1e3",
    ]
    (row,) = rows_of(tmp_path / "p.jsonl", '{"label": 207.0, "id": 7.0}\n')
    assert (row.error, row.prompt, row.id) == (None, "207", "7")


def test_a_header_that_is_no_csv(tmp_path):
    with pytest.raises(InputError, match="is not CSV"):
        rows_of(tmp_path / "p.csv", '"prompt\n' + "a cat\n" * 30_000)


def test_a_name_that_begins_like_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~prompts.txt").write_text("a cat\n")
    assert [row.prompt for row in read_table("~prompts.txt").rows] == ["a cat"]
    with pytest.raises(InputError, match="no such file"):
        read_table("~nobody-of-that-name/prompts.txt")


def test_cells_that_a_table_of_floats_fills_up_are_empty(tmp_path):
    write_parquet(tmp_path / "p.parquet", {"prompt": ["a", "b"], "seed": [7.0, float("nan")], "top_k": [None, 3.0]})
    first, second = read_table(str(tmp_path / "p.parquet")).rows
    assert (first.seed, first.settings) == (7, ())
    assert second.error is None
    assert second.settings == (("top_k", 3),)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", None),
        ('{"id": "x"}', "line 2: there is no prompt"),
        ('{"prompt": "  "}', "line 2: there is no prompt"),
        ('{"prompt": ["a"]}', r"prompt\[0\] must be a string"),
        ('{"prompt": true}', "must be a string"),
        ('{"prompt": "a \\ud800"}', "not valid Unicode"),
        ('{"prompt": "a", "seed": -1}', "seed must be a whole number"),
        ('{"prompt": "a", "seed": 1.5}', "seed must be a whole number"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "seed must be a whole number"),
        ('{"prompt": "a", "top_p": "much"}', "top_p must be a number from 0 to 1, not 'much'"),
        ('{"prompt": "a", "more_smooth": "maybe"}', "more_smooth must be True or False"),
        ('{"prompt": "a", "id": "good"}', "id 'good' is that of an earlier row"),
        ('{"prompt": "a", "id": [1]}', "id must be a text or a whole number"),
        ('{"prompt": "a"', "line 2: it is not a JSON object"),
        ("[" * 100_000, "line 2: it is not a JSON object"),
        ("7", "line 2: it is not a JSON object"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, line, told):
    rows = rows_of(tmp_path / "p.jsonl", f'{{"id": "good", "prompt": "a cat"}}\n{line}\n{{"prompt": "a dog"}}\n')
    bad = [row for row in rows if row.error is not None]
    assert [row.prompt for row in rows if row.error is None] == ["a cat", "a dog"]
    assert len({row.id for row in rows}) == len(rows)
    assert len(bad) == (told is not None)
    if told is not None:
        assert re.search(told, bad[0].error or "")


def test_csv_rows_of_another_length(tmp_path):
    rows = rows_of(tmp_path / "p.csv", "id,prompt\n1,a cat,more\n2\n3,a dog\n\n")
    assert [row.error for row in rows] == [
        "line 2: it has 3 cells for 2 columns.",
        "line 3: there is no prompt",
        None,
    ]


@pytest.mark.parametrize(
    "row_id", ["../../etc/passwd", "/root", "a b", "a.b", "", "-rf", "ü" * 300, "x" * 300, "NUL\0", "A", "a"]
)
def test_a_file_s_name_is_plain_whatever_the_id(tmp_path, row_id):
    lines = [json.dumps({"id": name, "prompt": "a cat"}) for name in ("a", row_id)]
    rows = rows_of(tmp_path / "p.jsonl", "\n".join(lines))
    stems = [row.stem for row in rows]
    assert all(0 < len(stem) <= 100 and stem.replace("-", "").replace("_", "").isalnum() and stem.isascii() for stem in stems)
    assert not any(stem.startswith("-") for stem in stems)
    assert len({stem.casefold() for stem in stems}) == 2


def test_a_plain_id_is_the_file_s_name(tmp_path):
    rows = rows_of(tmp_path / "p.jsonl", '{"id": "coco_0001", "prompt": "a"}\n{"id": 12, "prompt": "a"}')
    assert [(row.id, row.stem) for row in rows] == [("coco_0001", "coco_0001"), ("12", "12")]


def test_an_id_without_a_plain_character_gives_no_other_id_s_name(tmp_path):
    hashed = hashlib.sha256("日本".encode()).hexdigest()[:16]
    rows = rows_of(tmp_path / "p.jsonl", "\n".join(json.dumps({"id": each, "prompt": "a"}) for each in ("日本", hashed)))
    assert [row.stem for row in rows] == [f"row-{hashed}", hashed]


def test_a_file_s_name_follows_from_the_id_alone(tmp_path):
    stems = []
    for ids in (["Cat"], ["cat"], ["cat", "Cat"], ["Cat", "cat"]):
        rows = rows_of(tmp_path / "p.jsonl", "\n".join(json.dumps({"id": each, "prompt": "a"}) for each in ids))
        stems.append({row.id: row.stem for row in rows})
    assert {**stems[0], **stems[1]} == stems[2] == stems[3]
    hashed = stems[2]["Cat"].lower()
    (row,) = rows_of(tmp_path / "p.jsonl", json.dumps({"id": hashed, "prompt": "a"}))
    assert row.stem != hashed


def test_unknown_columns_are_named(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,width,author\na cat,3,me\n")
    assert read_table(str(tmp_path / "p.csv")).ignored == ("width", "author")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.tsv", b"prompt\na", "must end in .txt, .csv, .jsonl, .parquet"),
        ("p.txt", b"\n# nothing\n", "holds no row"),
        ("p.jsonl", b"", "holds no row"),
        ("p.csv", b"", "has no column prompt"),
        ("p.csv", b"text,n\na,1\n", "has no column prompt .*; it has 'text', 'n'"),
        ("p.txt", b"\xff\xfe", "not UTF-8 text"),
        ("p.csv", b"prompt\n\xff", "not UTF-8 text"),
        ("p.parquet", b"PAR1", "not a Parquet file"),
        ("p.parquet", b"", "not a Parquet file"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_table(str(tmp_path / name))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read: no such file"):
        read_table(str(tmp_path / "p.txt"))
    with pytest.raises(InputError, match="neither a folder nor a URL"):
        read_table("https://example.org/p.txt")


def test_equal_rows_are_numbered(tmp_path):
    rows = rows_of(tmp_path / "p.txt", "a cat\n" * 3)
    assert [row.id.partition("-")[2] for row in rows] == ["", "2", "3"]
