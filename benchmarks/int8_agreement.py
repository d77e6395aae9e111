"""What `quantize` changes: how many codes are drawn alike, scale by scale, and how far the pictures are apart.

    python benchmarks/int8_agreement.py hart-mini --prompts recipes/mini/demo.txt --dtype bf16
    python benchmarks/int8_agreement.py ~/.cache/hart_infer/benchmarks/random-256px-bf16-text-none --dtype bf16

Without --prompts contexts are random. The quantised model and the exact one run side by side with the same draws. "fed": each
scale's input is the exact run's, so that the share of equal codes is what one scale changes; "free": each goes on from its own
codes, as in use, and differences add up.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def contexts(pipe: Any, prompts: Path | None, count: int) -> list[Any]:
    """The first `count` prompts of a file, encoded, or as many as there are; without a file `count` random contexts."""
    from hart_infer.models.text import PromptEmbeds

    if prompts is None:
        sizes = (pipe.transformer.config.context_token, pipe.transformer.config.context_dim)
        return [PromptEmbeds(*measure.random_context(*sizes, seed=seed)) for seed in range(count)]
    given = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not given:
        raise SystemExit(f"{prompts} has no prompts.")
    return [pipe.encode_prompt(prompt) for prompt in given[:count]]


class Recorder:
    """Keeps the indices of every scale of a pipeline's calls, and the latents between scales."""

    def __init__(self, pipe: Any, follow: Recorder | None) -> None:
        """Wrap the engine's steps, for good. `follow`: take each scale's input from that recorder's last call."""
        self.indices: list[Tensor] = []
        self.latents: list[Tensor] = []
        self._run, self._follow = pipe.engine.run_scale, follow
        pipe.engine.run_scale = self._step

    def _step(self, states: Any, stage: Any) -> None:
        (state,) = states
        if stage.index == 0:
            self.indices, self.latents = [], []
        self.latents.append(state.f_hat.clone())
        if self._follow is not None:
            state.f_hat.copy_(self._follow.latents[stage.index])
        self._run(states, stage)
        self.indices.append(state.indices[-1])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Draw every prompt exactly, fed and free; average over prompts."""
    from hart_infer import HartPipeline

    options = {"dtype": DTYPES[args.dtype], "device": "cpu", "text_encoder": None if args.prompts else False}
    pipes = [
        HartPipeline.from_pretrained(args.model, quantize=mode, **options) for mode in (None, args.quantize, args.quantize)
    ]
    exact, fed, free = pipes
    leader = Recorder(exact, None)
    recorders = {"fed": Recorder(fed, leader), "free": Recorder(free, None)}
    equal: dict[str, list[list[float]]] = {name: [] for name in recorders}
    distances = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    for seed, embeds in enumerate(contexts(exact, args.prompts, args.count)):
        call = {"prompt_embeds": embeds, "seed": seed, "output_type": "pt", "more_smooth": not args.hard}
        pictures = [pipe(**call).images for pipe in pipes]
        for name, recorder in recorders.items():
            pairs = zip(leader.indices, recorder.indices, strict=True)
            equal[name].append([(a == b).double().mean().item() for a, b in pairs])
        distances.append((pictures[0] - pictures[2]).square().mean().item())
    shares = {name: torch.tensor(rows).mean(dim=0).tolist() for name, rows in equal.items()}
    psnr = -10 * torch.tensor(distances).log10()
    return {"pictures": len(distances), "equal": shares, "psnr_free": measure.spread(psnr.tolist())}


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description="What quantising the blocks changes.")
    parser.add_argument("model", nargs="?", default="hart-mini")
    parser.add_argument("--quantize", choices=("int8", "int8_weight_only"), default="int8")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one a line; without it contexts are random")
    parser.add_argument("--count", type=int, default=8, help="pictures, where there are as many prompts")
    parser.add_argument("--hard", action="store_true", help="without more_smooth")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    measure.check_out(args.out)
    settings = {
        "model": Path(args.model).name,
        "prompts": args.prompts.name if args.prompts else None,
        **{name: getattr(args, name) for name in ("quantize", "dtype", "hard")},
    }
    result = {"benchmark": "int8_agreement", "machine": measure.machine(), "settings": settings, **compare(args)}
    if args.out:
        measure.write_json(args.out, result)
    for name, shares in result["equal"].items():
        print(f"{name:<5} equal codes by scale: " + " ".join(f"{share:.3f}" for share in shares))
    print(f"free PSNR {result['psnr_free']['median']:.1f} dB (median of {result['pictures']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
