"""FIDELITY.md speaks of things that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "FIDELITY.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`([\w/.]+\.py::[\w.]+)`", TEXT)))


@cache
def symbols(file: Path) -> set[str]:
    """Functions, classes and assigned names of a module, and methods as Class.method."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def is_of_the_tests(path: Path) -> bool:
    return path.name.startswith("test_") or path.parts[0] == "golden"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name: str) -> None:
    path, symbol = name.split("::")
    root = REPOSITORY / ("tests" if is_of_the_tests(Path(path)) else "hart_infer")
    assert (root / path).is_file()
    assert symbol in symbols(root / path)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head and the rows that only group."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in cells] for cells in table if cells[-1].strip()]


@pytest.mark.parametrize("heading", ["Kept", "Not kept", "Where equal numbers end"])
def test_every_row_names_a_test(heading: str) -> None:
    """And every kept quirk the code that keeps it."""
    table = rows(heading)
    assert table
    for cells in table:
        assert len(cells) == 3, cells
        assert re.search(r"test_\w+\.py::test_\w+", cells[2]), cells
        assert heading != "Kept" or "::" in cells[1], cells
