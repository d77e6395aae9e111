"""Write the checkpoints that come with the package, from what the trainings left.

python recipes/mini/export.py OUT hart_infer/assets/hart-mini
python recipes/mini/export.py OUT hart_infer/assets/var-mini --model var

--mean-with writes the mean of these weights and of what an earlier part of the same training left. Both must have ended at a
rate of 0; what one forgot the other may still know.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from parts import STATE, finished, same

from hart_infer import HartPipeline


@torch.no_grad()
def average(pipe: HartPipeline, other: HartPipeline) -> None:
    """Make the transformer and the text encoder of `pipe`, which learn together, the mean of their own and of `other`'s.

    SystemExit where `other` is of other sizes or on another tokenizer.
    """
    states = [{name: x.bfloat16() for name, x in one.autoencoder.state_dict().items()} for one in (pipe, other)]
    if other.transformer.config != pipe.transformer.config or not same(*states):
        raise SystemExit(f"{other.name} is of other sizes or on another tokenizer: take an earlier export of this training.")
    assert pipe.text_encoder is not None and other.text_encoder is not None
    pairs = (pipe.transformer, other.transformer), (pipe.text_encoder.model, other.text_encoder.model)
    for module, earlier in pairs:
        for mine, yours in zip(module.parameters(), earlier.parameters(), strict=True):
            mine.lerp_(yours, 0.5)


def main() -> None:
    """Assemble the averaged weights, cast, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what the trainings wrote")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", choices=STATE, default="hart")
    parser.add_argument("--mean-with", metavar="MODEL", help="hart-mini: an earlier export of the same training")
    args = parser.parse_args()
    if args.mean_with and args.model != "hart":
        raise SystemExit("--mean-with goes with hart-mini alone.")
    pipe = finished(args.out, args.model)
    if args.mean_with:
        average(pipe, HartPipeline.from_pretrained(args.mean_with, dtype=torch.float32, device="cpu"))
    path = pipe.to(torch.bfloat16).save_pretrained(args.checkpoint, max_shard_size="24MB")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(pipe.describe(), f"\n{size / 1e6:.1f} MB in {args.checkpoint}")


if __name__ == "__main__":
    main()
