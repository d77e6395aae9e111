"""Write the checkpoints that come with the package, from what the trainings left.

python recipes/mini/export.py OUT hart_infer/assets/hart-mini
python recipes/mini/export.py OUT hart_infer/assets/var-mini --model var
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from parts import STATE, finished


def main() -> None:
    """Assemble the averaged weights, cast, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what the trainings wrote")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", choices=STATE, default="hart")
    args = parser.parse_args()
    pipe = finished(args.out, args.model)
    path = pipe.to(torch.bfloat16).save_pretrained(args.checkpoint, max_shard_size="24MB")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(pipe.describe(), f"\n{size / 1e6:.1f} MB in {args.checkpoint}")


if __name__ == "__main__":
    main()
