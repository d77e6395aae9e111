"""Write the figures that evaluate.py found into the tables of RESULTS.md, under "hart-mini".

    python recipes/mini/tables.py OUT/hart-results.json

What it takes are generation, prompts, fresh_prompts, plain, unseen and pairs. A row is known by its first cell; what stands
in the others is replaced. The record is kept as results/hart-mini.json, with which the tests compare the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, RECORD = HERE / "RESULTS.md", HERE / "results" / "hart-mini.json"
HEADING = "\n## hart-mini\n"
PARTS = ("generation", "prompts", "fresh_prompts", "plain", "unseen", "pairs")


def percent(share: float) -> str:
    """ "93.4 %"; 100 % has no decimal."""
    return "100 %" if share > 0.9995 else f"{100 * share:.1f} %"


def seen(scores: dict[str, float]) -> list[str]:
    """First guess, first five and style."""
    return [percent(scores[name]) for name in ("subject", "subject_in_five", "style")]


def recall(scores: dict[str, float]) -> list[str]:
    """Fréchet distance, first guess, style and the distance to the real picture, where there is one."""
    near = f"{scores['psnr_to_real']:.1f} dB" if "psnr_to_real" in scores else ""
    return [f"{scores['frechet']:.1f}", percent(scores["subject"]), percent(scores["style"]), near]


def rows(record: dict[str, Any]) -> dict[str, list[str]]:
    """The cells behind the first, by what the first begins with."""
    generation, five, eight = record["generation"], record["prompts"], record["fresh_prompts"]
    count, plain = str(generation["pictures"]), record["plain"]
    result = {
        "real pictures |": [count, *seen(generation["real"])],
        "real pictures through the tokenizer": [count, *seen(generation["tokenizer_hybrid"])],
        "drawn, training wordings": [count, *seen(generation["with_residual"])],
        "drawn, five new wordings": [str(five["pictures"]), *seen(five["drawn"])],
        "**drawn, eight more wordings": [str(eight["pictures"]), *seen(eight["drawn"])],
        "drawn, judged against another prompt": [str(eight["pictures"]), *seen(eight["drawn_for_others"])],
        "tokenizer, hybrid": recall(generation["tokenizer_hybrid"]),
        "tokenizer, discrete": recall(generation["tokenizer_discrete"]),
        "**drawn, with the residual": recall(generation["with_residual"]),
        "drawn, codes alone": recall(generation["without_residual"]),
        "the real pictures |": seen(record["unseen"]["real"]),
        "drawn |": seen(record["unseen"]["drawn"]),
    }
    named = {"training wordings": "training wordings", "a new wording": '"a cat, please"', "a keyword": "one keyword"}
    for name, label in named.items():
        result[f"plain: {label}"] = [str(plain[name]["pictures"]), *seen(plain[name])]
    for label, pairs in record["pairs"].items():
        if label != "settings":
            result[label] = [str(pairs["pictures"]), percent(pairs["right"]), percent(pairs["chance"])]
    return result


def filled(text: str, record: dict[str, Any]) -> str:
    """RESULTS.md's text with the record's figures. Raises SystemExit where a row is missing or there twice."""
    before, heading, part = text.partition(HEADING)
    lines = part.split("\n")
    for label, cells in rows(record).items():
        places = [i for i, line in enumerate(lines) if line.startswith(f"| {label}")]
        if len(places) != 1:
            raise SystemExit(f"RESULTS.md has {len(places)} rows that begin with {label!r}, not one.")
        first = lines[places[0]].split(" | ")[0]
        lines[places[0]] = " | ".join([first, *cells]).rstrip() + " |"
    return before + heading + "\n".join(lines)


def main() -> None:
    """Rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    args = parser.parse_args()
    found = json.loads(args.record.read_text(encoding="utf-8"))
    if missing := [part for part in PARTS if part not in found]:
        raise SystemExit(f"{args.record} has no {missing[0]}; draw it by evaluate.py --only {' '.join(missing)}.")
    record = {part: found[part] for part in PARTS}
    text = filled(RESULTS.read_text(encoding="utf-8"), record)
    RESULTS.write_text(text, encoding="utf-8")
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
