"""Make hart-mini and var-mini from nothing, step by step. A finished step is skipped, a begun one resumes.

    python recipes/mini/make.py RUN [--share 0.02] [--tokenizer recipes/mini/tokenizer.safetensors]

RUN/data and RUN/run hold what the steps write; the models land in RUN/hart-mini and RUN/var-mini. `--share` shortens every
training: 0.02 takes about 10 minutes on two cores and shows that the steps fit together, not what they reach. `--tokenizer`
takes a trained one, such as the recipe's own, in place of the first trainings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from parts import TEXT, TOKENIZER
from safetensors.torch import load_file
from training import save

HERE = Path(__file__).parent


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
        found = subprocess.run([sys.executable, str(HERE / self.script), *self.arguments, *shortened])
        if found.returncode:
            raise SystemExit(f"{self.script} failed; mend what it says above and start again: finished steps are kept.")


def plan(out: Path) -> list[Step]:
    """All steps."""
    data, run, hart, var = (out / name for name in ("data", "run", "hart-mini", "var-mini"))
    both, made = (str(data), str(run)), "model_index.json"
    tokenizer = run / TOKENIZER
    return [
        Step("data.py", (str(data),), (data / "pictures.json",)),
        Step("classifier.py", (*both, "--name", "features", "--seed", "1"), (run / "features.pt", tokenizer), steps=400),
        Step("train_tokenizer.py", both, (tokenizer,), steps=3000),
        Step("associate.py", both, (run / "words.json",)),
        Step("train_text.py", both, (run / TEXT,), steps=5000),
        Step("train_transformer.py", both, (hart / made,), steps=30000),
        Step("export.py", (str(run), str(hart)), (hart / made,)),
        Step("train_transformer.py", (*both, "--model", "var"), (var / made,), steps=15000),
        Step("export.py", (str(run), str(var), "--model", "var"), (var / made,)),
        Step("classifier.py", (*both, "--name", "judge"), (run / "judge.pt",), steps=1500),
    ]


def main() -> None:
    """Run the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every training")
    parser.add_argument("--tokenizer", type=Path, help="take this one, a safetensors file, in place of training one")
    args = parser.parse_args()
    run = args.out / "run"
    if args.tokenizer is not None and not (run / TOKENIZER).exists():
        run.mkdir(parents=True, exist_ok=True)
        save(run / TOKENIZER, {name: value.float() for name, value in load_file(args.tokenizer).items()})
    for step in plan(args.out):
        step.run(args.share)


if __name__ == "__main__":
    main()
