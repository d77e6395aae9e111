"""The house stands: imports point one way, from top to bottom, and form no circle; deferred ones count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hart_infer"

# From the top floor down, as CONTRIBUTING.md draws it.
FLOORS = (
    "__main__ cli server batch __init__ moved pipelines checkpoints engine generation models ops kernels images errors version"
).split()
LATE = ("MOVED", "_LAZY")  # tables of modules that are imported by name
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
SOURCES |= {f"hart_infer.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def module_named(name: str) -> str | None:
    """The module of a dotted name, which may be a package or something inside a module."""
    parts = name.split(".")
    while parts:
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in SOURCES:
                return candidate
        parts.pop()
    return None


def imports_of(module: str) -> set[str]:
    """The package's modules that a module imports: at its top, in functions, for type checkers, and by names in tables."""
    package = module.split(".")[:-1]
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module_named(alias.name) for alias in node.names if alias.name.split(".")[0] == "hart_infer"}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == "hart_infer":
                found |= {module_named(f"{base}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Backend":
            target = ast.literal_eval(node.args[0]).partition(":")[0]
            level = len(target) - len(target.lstrip("."))
            found.add(module_named(".".join([*package[: len(package) - level + 1], target.lstrip(".")])))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in LATE:
            targets = ast.literal_eval(node.value).values()
            found |= {module_named(f"hart_infer.{target}") for target in targets}
    return {name for name in found if name is not None} - {module}


GRAPH = {module: imports_of(module) for module in sorted(SOURCES)}


def test_every_module_is_on_a_floor() -> None:
    assert {module.split(".")[1] for module in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_below_knows_what_is_above_it(module: str) -> None:
    upward = {target for target in GRAPH[module] if floor(target) < floor(module)}
    assert not upward


def circles() -> list[list[str]]:
    """Strongly connected modules, two or more (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in GRAPH[module]:
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1:
                found.append(members)

    for module in GRAPH:
        if module not in order:
            visit(module)
    return found


def test_no_circle_stands() -> None:
    assert circles() == []


def test_the_graph_sees_every_kind_of_import() -> None:
    """A deferred one, one for type checkers, a kernel's name, a package's own."""
    assert "hart_infer.pipelines.hart" in GRAPH["hart_infer.cli.loading"]
    assert "hart_infer.pipelines.outputs" in GRAPH["hart_infer.cli.writing"]
    assert "hart_infer.kernels.attention" in GRAPH["hart_infer.ops.attention"]
    assert "hart_infer.ops.cuda.__init__" in GRAPH["hart_infer.ops.rms_norm"]
    assert "hart_infer.cli.generate" in GRAPH["hart_infer.cli.app"]


def test_kernels_import_nothing_of_the_package() -> None:
    for module, targets in GRAPH.items():
        if module.startswith("hart_infer.kernels."):
            assert all(target.startswith("hart_infer.kernels.") for target in targets), module
