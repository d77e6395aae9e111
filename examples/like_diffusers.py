"""Draw pictures with a script that is written as one for diffusers is, and runs as it stands: hart-mini needs no download.

python examples/like_diffusers.py "a cat" "a rocket" --out pictures
python examples/like_diffusers.py "a cat on a red sofa" --model mit-han-lab/hart-0.7b-1024px --device cuda --bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hart_infer import HartPipeline


def main() -> None:
    """Load, draw, show how far it is, save."""
    parser = argparse.ArgumentParser(description="Draw pictures of prompts.")
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--model", default="hart-mini")
    parser.add_argument("--device", default=None)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()

    pipe = HartPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16 if args.bf16 else None)
    if args.device:
        pipe = pipe.to(args.device)

    def after_step(pipe: HartPipeline, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        print(f"scale {step}: latents {tuple(kwargs['latents'].shape)}")
        return kwargs

    images = pipe(
        prompt=args.prompt,
        negative_prompt=None,
        num_images_per_prompt=1,
        generator=torch.Generator().manual_seed(args.seed),
        callback_on_step_end=after_step,
        output_type="pil",
    ).images

    args.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(args.out / f"{i}.png")
        print(args.out / f"{i}.png")


if __name__ == "__main__":
    main()
