"""Make hart-mini and var-mini from nothing, step by step. A finished step is skipped, a begun one resumes.

    python recipes/mini/make.py RUN [--share 0.02] [--start-from hart-mini]

RUN/data and RUN/run hold what the steps write; the models land in RUN/hart-mini and RUN/var-mini. `--share` shortens every
training: 0.02 takes about 10 minutes on two cores and shows that the steps fit together, not what they reach. `--start-from`
takes the tokenizer and the text encoder of a model that this recipe exported, and goes on from its transformer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from parts import MEANINGS, TEXT, TOKENIZER, take_over

HERE = Path(__file__).parent
HART = ("--lr", "6e-4", "--decay", "0.5", "--batch", "8")
# For glibc: it keeps freed memory, which takes long to get anew, and asks for large pages. Ignored elsewhere.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**34),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
VAR = ("--model", "var", "--lr", "1.2e-3")


@dataclass(frozen=True)
class Step:
    """A script, its options, and what is there when it is done, any of the files; `steps` is the length of a training."""

    script: str
    arguments: tuple[str, ...]
    done: tuple[Path, ...]
    steps: int | None = None

    def run(self, share: float) -> None:
        """Run it, `share` of its steps, unless its result is there. SystemExit where it fails."""
        if any(file.exists() for file in self.done):
            return
        shortened = [] if self.steps is None else ["--steps", str(max(round(share * self.steps), 4))]
        print(f"{self.script} {' '.join([*self.arguments, *shortened])}", flush=True)  # noqa: T201
        command = [sys.executable, str(HERE / self.script), *self.arguments, *shortened]
        found = subprocess.run(command, env=KEPT_MEMORY | os.environ)
        if found.returncode:
            raise SystemExit(f"{self.script} failed; mend what it says above and start again: finished steps are kept.")


def plan(out: Path, start_from: str | None = None) -> list[Step]:
    """All steps."""
    data, run, hart, var = (out / name for name in ("data", "run", "hart-mini", "var-mini"))
    both, made = (str(data), str(run)), "model_index.json"
    tokenizer, text = run / TOKENIZER, run / TEXT
    begun = ("--start-from", start_from) if start_from else ()
    return [
        Step("data.py", (str(data),), (data / "pictures.json",)),
        Step(
            "classifier.py", (*both, "--name", "features", "--seed", "1"), (run / "features.safetensors", tokenizer), steps=400
        ),
        Step("train_tokenizer.py", both, (tokenizer,), steps=3000),
        Step("associate.py", both, (run / MEANINGS,)),
        Step("train_text.py", both, (text,), steps=6500),
        Step("train_transformer.py", (*both, *HART, *begun), (hart / made,), steps=20000),
        Step("export.py", (str(run), str(hart)), (hart / made,)),
        Step("train_transformer.py", (*both, *VAR), (var / made,), steps=3000),
        Step("export.py", (str(run), str(var), "--model", "var"), (var / made,)),
    ]


def main() -> None:
    """Run the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every training")
    parser.add_argument("--start-from", metavar="MODEL", help="a model that this recipe exported")
    args = parser.parse_args()
    if args.start_from and not (args.out / "run" / TEXT).exists():
        (args.out / "run").mkdir(parents=True, exist_ok=True)
        take_over(args.start_from, args.out / "run")
    for step in plan(args.out, args.start_from):
        step.run(args.share)


if __name__ == "__main__":
    main()
