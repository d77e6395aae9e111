"""Make hart-mini and var-mini from nothing, step by step. A finished step is skipped, a begun one resumes.

    python recipes/mini/make.py RUN [--share 0.02]

RUN/data and RUN/run hold what the steps write; the models land in RUN/hart-mini and RUN/var-mini. `--share` shortens every
training: 0.02 takes about 10 minutes on two cores and shows that the steps fit together, not what they reach.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """A script, what it writes when it is done, and its options; `steps` is the length of a training."""

    script: str
    arguments: tuple[str, ...]
    done: Path
    steps: int | None = None

    def run(self, share: float) -> None:
        """Run it, `share` of its steps, unless its result is there. SystemExit where it fails."""
        if self.done.exists():
            return
        shortened = [] if self.steps is None else ["--steps", str(max(round(share * self.steps), 4))]
        print(f"{self.script} {' '.join([*self.arguments, *shortened])}", flush=True)  # noqa: T201
        found = subprocess.run([sys.executable, str(HERE / self.script), *self.arguments, *shortened])
        if found.returncode:
            raise SystemExit(f"{self.script} failed; mend what it says above and start again: finished steps are kept.")


def plan(out: Path) -> list[Step]:
    """All steps."""
    data, run, hart, var = (out / name for name in ("data", "run", "hart-mini", "var-mini"))
    both, made = (str(data), str(run)), "model_index.json"
    return [
        Step("data.py", (str(data),), data / "pictures.json"),
        Step("classifier.py", (*both, "--name", "features", "--seed", "1"), run / "features.pt", steps=400),
        Step("train_tokenizer.py", both, run / "tokenizer-final.pt", steps=3000),
        Step("associate.py", both, run / "words.json"),
        Step("train_text.py", both, run / "text-final.pt", steps=2000),
        Step("train_transformer.py", both, hart / made, steps=30000),
        Step("export.py", (str(run), str(hart)), hart / made),
        Step("train_transformer.py", (*both, "--model", "var"), var / made, steps=8000),
        Step("export.py", (str(run), str(var), "--model", "var"), var / made),
        Step("classifier.py", (*both, "--name", "judge"), run / "judge.pt", steps=1500),
    ]


def main() -> None:
    """Run the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every training")
    args = parser.parse_args()
    for step in plan(args.out):
        step.run(args.share)


if __name__ == "__main__":
    main()
