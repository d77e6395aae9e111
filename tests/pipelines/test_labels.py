"""Labels of classes: numbers and names become indices, and what names no class, or several, is refused in one sentence."""

from __future__ import annotations

import array
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hart_infer.checkpoints import configs
from hart_infer.errors import CheckpointNotFoundError, ConfigError, InputError
from hart_infer.pipelines.labels import Labels
from tests.golden.data import REPOSITORY

IMAGENET = Labels.for_checkpoint(1000)
NUMBERS = Labels.for_checkpoint(10)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


def rejected(call: Any, *arguments: object, kind: type[Exception] = InputError) -> str:
    """The call raises an error of one line; return it."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    said = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert said.endswith((".", "?"))
    assert len(said.splitlines()) == 1
    assert len(said) < 500
    said.encode()
    return said


def write(folder: Path, values: Any) -> Path:
    file = folder / "classes.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return file


# ImageNet's names.

KNOWN = {
    0: "tench",
    1: "goldfish",
    2: "great white shark",
    9: "ostrich",
    65: "sea snake",
    76: "tarantula",
    88: "macaw",
    99: "goose",
    130: "flamingo",
    151: "Chihuahua",
    207: "golden retriever",
    250: "Siberian husky",
    263: "Pembroke",
    279: "Arctic fox",
    281: "tabby",
    285: "Egyptian cat",
    291: "lion",
    292: "tiger",
    309: "bee",
    323: "monarch",
    340: "zebra",
    386: "African elephant",
    388: "giant panda",
    404: "airliner",
    417: "balloon",
    466: "bullet train",
    504: "coffee mug",
    569: "garbage truck",
    671: "mountain bike",
    724: "pirate",
    817: "sports car",
    879: "umbrella",
    920: "traffic light",
    949: "strawberry",
    954: "banana",
    963: "pizza",
    980: "volcano",
    985: "daisy",
    999: "toilet tissue",
}
# Names that several classes have, and none or more than one of them as its usual name.
AMBIGUOUS = {
    "catamount": (286, 287),
    "crane": (134, 517),
    "crawfish": (123, 124),
    "grass snake": (55, 57),
    "horn": (513, 566),
    "maillot": (638, 639),
    "panda": (387, 388),
    "panther": (286, 290),
    "sand viper": (54, 66),
    "sus scrofa": (341, 342),
    "wagon": (436, 734),
}
# Names that several classes have, and one of them as its usual name.
USUAL = {"crayfish": 124, "gong": 577, "harp": 594, "missile": 657, "partridge": 86, "polecat": 358, "tub": 876}


def test_imagenet_has_a_thousand_classes_with_names() -> None:
    assert IMAGENET.names is not None
    assert len(IMAGENET.names) == IMAGENET.classes == 1000
    assert all(names and all(name == name.strip() != "" for name in names) for names in IMAGENET.names)
    assert IMAGENET.names[0] == ("tench", "Tinca tinca")
    assert IMAGENET.names[292] == ("tiger", "Panthera tigris")
    assert IMAGENET.names[999] == ("toilet tissue", "toilet paper", "bathroom tissue")


@pytest.mark.parametrize(("index", "name"), KNOWN.items())
def test_imagenet_is_in_the_usual_order(index: int, name: str) -> None:
    assert IMAGENET.name(index) == name
    assert IMAGENET.index(name) == index


def test_every_name_of_imagenet_leads_to_its_class_or_to_the_candidates() -> None:
    assert IMAGENET.names is not None
    for index, names in enumerate(IMAGENET.names):
        for name in names:
            if name.lower() in AMBIGUOUS:
                assert str(index) in rejected(IMAGENET.index, name)
            else:
                assert IMAGENET.index(name) == USUAL.get(name, index)


def test_the_file_says_where_its_names_come_from() -> None:
    values = json.loads((REPOSITORY / "hart_infer/assets/imagenet_classes.json").read_text(encoding="utf-8"))
    assert values.keys() == {"source", "classes"}
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in values["source"]


def test_labels_need_no_torch() -> None:
    code = "import sys; from hart_infer.pipelines.labels import Labels; Labels.for_checkpoint(1000); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "hart_infer.pipelines.labels" in loaded
    assert "torch" not in loaded


# Numbers.


@pytest.mark.parametrize("label", [207, np.int64(207), np.uint16(207), "207", " 207\n", "0207"])
def test_a_number_is_an_index(label: Any) -> None:
    index = IMAGENET.index(label)
    assert index == 207
    assert type(index) is int


@pytest.mark.parametrize("label", [0, 999, "0", "999"])
def test_the_first_and_the_last_class_exist(label: Any) -> None:
    assert IMAGENET.index(label) == int(label)


@pytest.mark.parametrize(
    "label",
    [
        -1,
        1000,
        2**64,
        -(10**30),
        pytest.param(10**6000, id="huge"),
        np.int64(1000),
        "1000",
        "-1",
        pytest.param("9" * 6000, id="digits"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(label: Any) -> None:
    assert rejected(IMAGENET.index, label).startswith("a class must be a whole number from 0 to 999, not ")


@pytest.mark.parametrize("label", [None, 1.0, np.float32(1), math.nan, True, np.True_, b"tiger", [1], DEEP, {}, object(), str])
def test_what_is_neither_a_number_nor_a_name_is_refused(label: Any) -> None:
    said = rejected(IMAGENET.index, label)
    assert said == f"a class must be a whole number from 0 to 999 or a name, not {type(label).__name__}."
    assert " or a name" not in rejected(NUMBERS.index, label)


# Names.


@pytest.mark.parametrize(
    "label",
    [
        "golden retriever",
        "Golden Retriever",
        "GOLDEN RETRIEVER",
        "golden_retriever",
        "golden-retriever",
        " golden \t\u00a0 retriever\n",
        "golden -_ retriever",
        "ｇｏｌｄｅｎ retriever",  # full width
    ],
)
def test_spelling_of_a_name_is_free(label: str) -> None:
    assert IMAGENET.index(label) == 207


@pytest.mark.parametrize(("label", "index"), [("Panthera tigris", 292), ("hot dog", 934), ("shih tzu", 155), ("u boat", 833)])
def test_a_synonym_is_a_name(label: str, index: int) -> None:
    assert IMAGENET.index(label) == index


@pytest.mark.parametrize(("label", "index"), USUAL.items())
def test_the_class_with_the_usual_name_wins_over_a_synonym(label: str, index: int) -> None:
    assert IMAGENET.index(label) == IMAGENET.index(label.upper()) == index


def test_the_exact_spelling_wins_over_another() -> None:
    assert IMAGENET.index("Cardigan") == 264  # the corgi
    assert IMAGENET.index("cardigan") == 474  # the garment
    said = rejected(IMAGENET.index, "CARDIGAN")
    assert said.endswith("give the number: 264 (Cardigan, Cardigan Welsh corgi) or 474 (cardigan).")


@pytest.mark.parametrize(("label", "candidates"), AMBIGUOUS.items())
def test_a_name_of_several_classes_lists_them(label: str, candidates: tuple[int, int]) -> None:
    assert IMAGENET.names is not None
    first, second = (f"{i} ({', '.join(IMAGENET.names[i])})" for i in candidates)
    assert rejected(IMAGENET.index, label) == f'"{label}" is the name of 2 classes; give the number: {first} or {second}.'


def test_a_list_of_candidates_is_short() -> None:
    said = rejected(Labels(1000, (("same",),) * 1000).index, "same")
    assert said.startswith('"same" is the name of 1000 classes; give the number: 0 (same), 1 (same), ')
    assert said.endswith("9 (same) or 990 others.")


@pytest.mark.parametrize(
    ("label", "suggestions"),
    [
        ("golden retreiver", "golden retriever (207)"),
        ("Tigr", "tiger (292)"),
        ("elephant", "Indian elephant (385) or African elephant (386)"),
        ("tigris", "Panthera tigris (292)"),
        ("a photo of a golden retriever asleep on a green sofa", "golden retriever (207)"),
        ("cranes", "crane (134), crane (517), crate (519), canoe (472) or cerastes (66)"),
        ("pnda", "lesser panda (387) or giant panda (388)"),  # what both are called would not help
    ],
)
def test_an_unknown_name_suggests_others(label: str, suggestions: str) -> None:
    assert rejected(IMAGENET.index, label) == f'"{label}" is not a class of this checkpoint; did you mean {suggestions}?'


@pytest.mark.parametrize("label", ["dog", "retriever", "snake", "a"])
def test_at_most_five_names_are_suggested(label: str) -> None:
    assert rejected(IMAGENET.index, label).count("(") == 5


@pytest.mark.parametrize(
    "label",
    [
        "",
        " ",
        "-",
        "__",
        "zzzzqq",
        "²",
        "١٢",
        "老虎",
        "🐯",
        "\ud83d",
        "a\nb\u2028c",
        pytest.param("x" * 10**6, id="long"),
        "1.0",
        "1e2",
    ],
)
def test_a_name_like_no_other_is_told_what_to_give(label: str) -> None:
    said = rejected(IMAGENET.index, label)
    assert said.endswith("is not a class of this checkpoint; give one of its names or a number from 0 to 999.")


def test_a_checkpoint_without_names_takes_numbers_only() -> None:
    assert Labels(10) == NUMBERS
    assert NUMBERS.index("7") == 7
    assert NUMBERS.name(7) is None
    assert rejected(NUMBERS.index, "cat") == '"cat" is a name, but this checkpoint has no names; give a number from 0 to 9.'


def test_letters_of_any_script_are_compared_without_case() -> None:
    names = Labels(3, (("Ébène",), ("Straße",), ("老虎",)))
    assert [names.index(label) for label in ("E\u0301BE\u0300NE", "STRASSE", "老虎")] == [0, 1, 2]


def test_name_refuses_what_is_no_index() -> None:
    for index in (-1, 1000, True, "tiger", None):
        assert rejected(IMAGENET.name, index).startswith("index must be a whole number from 0 to 999")


def test_labels_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NUMBERS.classes = 11  # type: ignore[misc]


# What a call takes.


@pytest.mark.parametrize(
    ("labels", "indices"),
    [
        (207, [207]),
        ("tiger", [292]),
        ([207, "tiger"], [207, 292]),
        (("3", np.int64(4)), [3, 4]),
        (range(3), [0, 1, 2]),
        (np.array([5, 6]), [5, 6]),
        (np.array(["tiger", "7"]), [292, 7]),
        (np.int32(5), [5]),
        (np.array(5), [5]),
        (torch.tensor([8, 9]), [8, 9]),
        (torch.tensor([8], dtype=torch.uint8), [8]),
        (torch.tensor(8), [8]),
        (array.array("q", [1, 2]), [1, 2]),
        ([7, 7], [7, 7]),
    ],
)
def test_one_or_many_classes_become_indices(labels: Any, indices: list[int]) -> None:
    found = IMAGENET.check(labels)
    assert found == indices
    assert all(type(index) is int for index in found)


@pytest.mark.parametrize("labels", [[], (), "", range(0), np.array([], dtype=int), torch.empty(0, dtype=torch.int64)])
def test_nothing_is_not_a_class(labels: Any) -> None:
    said = rejected(IMAGENET.check, labels)
    assert said == "label is an empty list; give at least one class." or said.startswith('label[0]: "" is not a class')


@pytest.mark.parametrize(
    "labels",
    [None, 1.5, math.nan, b"ab", bytearray(b"ab"), memoryview(b"ab"), {1, 2}, {0: 1}, iter([1]), object(), torch.Tensor]
    + [torch.empty(2, dtype=torch.int64, device="meta")],
)
def test_what_is_no_list_of_classes_is_refused(labels: Any) -> None:
    said = rejected(IMAGENET.check, labels)
    assert said == f"label must be a class's number or name, or a list of those, not {type(labels).__name__}."


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (True, "label[0]: a class must be a whole number from 0 to 999 or a name, not bool."),
        (1000, "label[0]: a class must be a whole number from 0 to 999, not 1000."),
        ([0, 1000], "label[1]: a class must be a whole number from 0 to 999, not 1000."),
        ([0, None], "label[1]: a class must be a whole number from 0 to 999 or a name, not NoneType."),
        ([0, 1.0], "label[1]: a class must be a whole number from 0 to 999 or a name, not float."),
        ([0, [1]], "label[1]: a class must be a whole number from 0 to 999 or a name, not list."),
        (DEEP, "label[0]: a class must be a whole number from 0 to 999 or a name, not list."),
        (range(10**30), "label[1000]: a class must be a whole number from 0 to 999, not 1000."),
        (torch.zeros(2), "label[0]: a class must be a whole number from 0 to 999 or a name, not float."),
        (torch.tensor(0.5), "label[0]: a class must be a whole number from 0 to 999 or a name, not float."),
        (torch.tensor([True]), "label[0]: a class must be a whole number from 0 to 999 or a name, not bool."),
        (torch.zeros(1, 2, dtype=torch.int64), "label[0]: a class must be a whole number from 0 to 999 or a name, not list."),
        (np.array([np.nan]), "label[0]: a class must be a whole number from 0 to 999 or a name, not float."),
        (["tiger", "tigr"], 'label[1]: "tigr" is not a class of this checkpoint; did you mean tiger (292)?'),
    ],
)
def test_an_error_says_which_label_is_wrong(labels: Any, message: str) -> None:
    assert rejected(IMAGENET.check, labels) == message


def test_an_error_uses_the_arguments_name() -> None:
    assert rejected(NUMBERS.check, [0, 10], "--classes").startswith("--classes[1]: a class must be")


# A checkpoint's own file.


@pytest.mark.parametrize(
    "values",
    [
        ["cat", "dog"],
        [["cat"], ["dog"]],
        ["cat", ["dog"]],
        {"0": "cat", "1": "dog"},
        {"1": ["dog"], "0": "cat"},
        {"source": "mine", "classes": ["cat", "dog"]},
        [" cat ", "dog\u00a0"],
    ],
)
def test_a_file_names_the_classes(tmp_path: Path, values: Any) -> None:
    names = Labels.for_checkpoint(2, write(tmp_path, values))
    assert names == Labels(2, (("cat",), ("dog",)))
    assert names.check(["Dog", 0]) == [1, 0]


def test_an_objects_keys_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, {str(i): f"name {i}" for i in sorted(range(12), key=str)})
    assert Labels.for_checkpoint(12, file).name(10) == "name 10"


def test_a_file_replaces_imagenets_names(tmp_path: Path) -> None:
    names = Labels.for_checkpoint(1000, write(tmp_path, [f"class {i}" for i in range(1000)]))
    assert names.name(207) == "class 207"
    rejected(names.index, "tiger")


def test_names_keep_their_synonyms(tmp_path: Path) -> None:
    names = Labels.for_checkpoint(2, write(tmp_path, [["cat", "Felis catus"], ["dog"]]))
    assert names.index("felis-catus") == 0
    assert names.name(0) == "cat"


BAD_FILES: list[tuple[Any, str]] = [
    ("", "is not readable JSON"),
    ("[", "is not readable JSON"),
    ("[" * 100_000, "is not readable JSON"),
    ("[" + "9" * 5000 + "]", "is not readable JSON"),
    ("null", "must hold a list of names or an object of names by number, not NoneType"),
    ("3", "not int"),
    ('"cat"', "not str"),
    ({"classes": "cat"}, "not str"),
    ({"classes": {"0": "cat"}}, "not dict"),
    ({"0": "cat", "2": "dog"}, 'must have the keys "0", "1", ... without a gap'),
    ({"1": "cat", "2": "dog"}, "without a gap"),
    ({"cat": 0, "dog": 1}, "without a gap"),
    ([], "names 0 classes, but the checkpoint has 2"),
    ({}, "names 0 classes, but the checkpoint has 2"),
    (["cat"], "names 1 classes, but the checkpoint has 2"),
    (["cat", "dog", "cow"], "names 3 classes, but the checkpoint has 2"),
    (["cat", ""], "class 1 must be a name or a list of names, none of them empty"),
    (["cat", "_"], "class 1 must be"),
    (["cat", []], "class 1 must be"),
    (["cat", [""]], "class 1 must be"),
    (["cat", None], "class 1 must be"),
    (["cat", 1], "class 1 must be"),
    ("[NaN, 1.0]", "class 0 must be"),
    (["cat", [["dog"]]], "class 1 must be"),
    (["cat", {"name": "dog"}], "class 1 must be"),
    (["cat", "do\ng"], "class 1 has a name with a control character"),
    (["cat", "do\u2028g"], "class 1 has a name with a control character"),
    ('["cat", "\\ud83d"]', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("values", "message"), BAD_FILES, ids=lambda value: str(value)[:40])
def test_a_malformed_file_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    file = write(tmp_path, values)
    said = rejected(Labels.for_checkpoint, 2, file, kind=ConfigError)
    assert message in said
    assert str(file) in said


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not readable JSON" in rejected(Labels.for_checkpoint, 2, file, kind=ConfigError)
    assert "is not a file" in rejected(Labels.for_checkpoint, 2, tmp_path, kind=ConfigError)
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        Labels.for_checkpoint(2, tmp_path / "missing.json")


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MAX_JSON_BYTES", 10)
    said = rejected(Labels.for_checkpoint, 2, write(tmp_path, ["cat", "dog"]), kind=ConfigError)
    assert "is too large for a configuration (14 bytes)" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes.json")
    assert "is not a file" in rejected(Labels.for_checkpoint, 2, tmp_path / "classes.json", kind=ConfigError)


def test_the_two_cranes_have_names_of_their_own() -> None:
    labels = Labels.for_checkpoint(1000)
    assert (labels.index("crane bird"), labels.index("construction crane")) == (134, 517)
    with pytest.raises(InputError, match=r"134 \(crane, crane bird\) or 517 \(crane, construction crane\)"):
        labels.index("crane")


def test_names_joined_by_commas_are_one_class() -> None:
    labels = Labels.for_checkpoint(1000)
    assert labels.index("tench, Tinca tinca") == 0
    assert labels.index("tiger, Panthera tigris") == 292
    with pytest.raises(InputError, match="is not a class"):
        labels.index("tiger, tench")
