"""Lay results beside each other, and refuse those that can't be compared.

    python recipes/evaluate/compare.py a.json b.json ...

Figures are comparable when they come from the same reference, network, resizing, seed and number of pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pictures import read_json
from score import guarded

from hart_infer import InputError

EQUAL = (  # by their place in results.json
    "reference.pixels", "reference.pictures", "reference.side", "reference.name", "features.network", "features.sha256",
    "features.size", "clip.sha256", "drawn.pictures", "drawn.formats", "seed", "score.kid.subset_size", "machine.torchmetrics",
)  # fmt: skip
SHOWN = {
    "FID": ("score.fid.value", 1, ""),
    "KID x 1000": ("score.kid.value", 1000, "score.kid.std"),
    "CLIP score": ("score.clip_score.value", 1, "score.clip_score.standard_error"),
}


def at(results: Mapping[str, Any], place: str) -> Any:
    """Return what stands at a place such as score.fid.value; None where nothing does."""
    value: Any = results
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_equal(all_results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError that names what differs."""
    (first, expected), *others = all_results.items()
    for name, results in others:
        differ = [
            f"{place} ({at(expected, place)}, {at(results, place)})"
            for place in EQUAL
            if at(expected, place) != at(results, place)
        ]
        if differ:
            raise InputError(f"{first} and {name} can't be compared; they differ in {'; '.join(differ)}.")


def table(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each file."""
    lines = ["".join([f"{'':32s}{'model':>20s}{'weights':>18s}", *(f"{name:>18s}" for name in SHOWN)])]
    for name, results in all_results.items():
        cells = [_cell(results, *how) for how in SHOWN.values()]
        lines.append(
            "".join(
                [f"{name[-32:]:32s}", *(f"{text!s:>{w}.{w - 1}s}" for text, w in _who(results)), *(f"{c:>18s}" for c in cells)]
            )
        )
    return "\n".join(lines)


def _who(results: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return (results.get("model") or "", 20), (results.get("weights") or "", 18)


def _cell(results: Mapping[str, Any], value: str, factor: float, spread: str) -> str:
    found, around = at(results, value), at(results, spread) if spread else None
    if found is None:
        return ""
    return f"{found * factor:.3f}" + (f" +- {around * factor:.3f}" if around is not None else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    args = parser.parse_args(arguments)

    def run() -> None:
        found = {str(path): read_json(path) for path in args.results}
        check_equal(found)
        print(table(found))

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
