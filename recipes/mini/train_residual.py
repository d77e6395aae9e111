"""Train the residual diffusion alone (paper section 3.3), on what the trained transformer knows of the last scale.

    python recipes/mini/train_residual.py DATA OUT --subjects recipes/mini/vocabulary.txt

It is small beside the transformer, whose training gives it few of the steps that it can use. The transformer's averaged weights
stay as they are: each picture's conditions are computed once for some captions and once without one, for guidance. Changes the
averaged weights in OUT/transformer.pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch
from captions import caption
from model import AUTOENCODER, CONTEXT_TOKENS, TRANSFORMER
from parts import TRANSFORMER_STATE, assemble, learned
from residual import diffusion_loss
from torch import Tensor
from train_transformer import optimizers, residual_of, teach, tokenize
from training import Average, Log, Pictures, learning_rate, save

from hart_infer import HartPipeline
from hart_infer.schedule import build_schedule

CAPTIONS = 3  # of each picture; the last is left out, as guidance's other half has none


@torch.no_grad()
def conditions(pipe: HartPipeline, pictures: Pictures, chosen: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Conditions [N, D] and residuals [N, C] of every token of the last scale, CAPTIONS times each."""
    stages = build_schedule(
        TRANSFORMER.patch_nums, context_tokens=CONTEXT_TOKENS, share_quant_resi=AUTOENCODER.share_quant_resi
    )
    codes, latents = tokenize(pipe.autoencoder, pictures.tensor(chosen))
    random, generator, found = Random(seed), torch.Generator().manual_seed(seed), []
    for variant in range(CAPTIONS):
        for rows in torch.arange(len(chosen)).split(16):
            captions = [caption(pictures.about[chosen[row]], random) for row in rows]
            tokens, mask = pipe.text_encoder.tokenize(captions, context_tokens=CONTEXT_TOKENS)
            dropped = torch.full((len(rows),), variant == CAPTIONS - 1)
            split = list(codes[rows].long().split([stage.tokens for stage in stages], dim=1))
            context = pipe.text_encoder.hidden(tokens, mask)
            parts = pipe.transformer, pipe.autoencoder.quantizer, stages
            hidden, _ = teach(*parts, context, mask, dropped, split, generator)
            condition, residual = residual_of(*parts, hidden[-1], split, latents[rows])
            found.append((condition.flatten(0, 1), residual.flatten(0, 1)))
    condition, residual = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return condition, residual


def main() -> None:
    """Train, and put the result where export.py takes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="has what train_transformer.py wrote")
    parser.add_argument("--subjects", type=Path, help="as train_transformer.py's")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4096, help="tokens")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures, log = Pictures(args.data, args.subjects), Log(args.out / "residual.jsonl")
    pipe, path = assemble(args.out), args.out / TRANSFORMER_STATE
    state = torch.load(path, weights_only=True)
    learned(pipe).load_state_dict(state["average"])
    condition, residual = conditions(pipe, pictures, pictures.split("train"), args.seed)
    diffusion = pipe.transformer.diffusion.requires_grad_(True)
    both = optimizers([diffusion], [], args.lr)
    average = Average(diffusion, 0.99)
    for step in range(args.steps):
        rate = learning_rate(step, peak=args.lr, warmup=20, steps=args.steps, decay=0.6)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
        generator = torch.Generator().manual_seed(args.seed + step)
        rows = torch.randint(len(condition), (args.batch,), generator=generator)
        loss = diffusion_loss(diffusion, residual[rows], condition[rows], generator)
        diffusion.zero_grad()
        loss.backward()
        for optimizer in both:
            optimizer.step()
        average.update(step)
        if step % 20 == 0:
            log(step=step, rate=rate, loss=loss.item())
    average.swap()
    state["average"] |= {f"transformer.diffusion.{name}": value for name, value in diffusion.state_dict().items()}
    save(path, state)


if __name__ == "__main__":
    main()
