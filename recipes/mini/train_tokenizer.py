"""Train the hybrid tokenizer (paper section 3.1): one decoder for the continuous latent and for the codes.

    python recipes/mini/train_tokenizer.py DATA OUT

Half of every batch is decoded from the continuous latent, half from the codes (straight-through). The codebook follows the
vectors that it codes by exponential averages; codes that nothing uses begin anew. Resumes from OUT/tokenizer.pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from model import AUTOENCODER
from parts import TOKENIZER
from torch import Tensor
from training import Average, Log, Muon, Pictures, learning_rate, psnr, save, shuffled, write_grid

from hart_infer.generation.residual import LATENT_SCALE
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.parts.quantizer import Quantizer, phi_index

CONTINUOUS_STEPS = 200  # before the codebook joins
COMMITMENT = 0.25
SCALE = 0.1  # pull of the latent's standard deviation towards 1: else it outruns the codes
CODES = "quantizer.codebook.weight"
REVIVE_EVERY, RARE = 50, 0.02  # steps; uses per step, on average
CODEBOOK_DECAY = 0.96
SHIFT = 4  # pixels: the pictures' margin


class Codebook:
    """Keeps a quantizer's codes at the running mean of the vectors that they stand for."""

    def __init__(self, quantizer: Quantizer) -> None:
        """All codes unused."""
        weight = quantizer.codebook.weight
        self.quantizer = quantizer
        self.count, self.total = torch.zeros(len(weight)), torch.zeros_like(weight)

    @torch.no_grad()
    def begin(self, latent: Tensor, generator: torch.Generator) -> None:
        """Take codes from the latents: of every scale, and of the differences between scales."""
        sides = self.quantizer.patch_nums
        fine = [
            latent - F.interpolate(F.interpolate(latent, (p, p), mode="area"), latent.shape[-2:], mode="bicubic")
            for p in sides[:-1]
        ]
        vectors = torch.cat([_vectors(F.interpolate(latent, (p, p), mode="area")) for p in sides] + [_vectors(x) for x in fine])
        self._replace(torch.arange(len(self.count)), vectors, generator)

    @torch.no_grad()
    def update(self, indices: list[Tensor], inputs: list[Tensor]) -> None:
        """Move the codes towards what they were used for."""
        flat, vectors = torch.cat([i.flatten() for i in indices]), torch.cat([_vectors(x) for x in inputs])
        count = torch.bincount(flat, minlength=len(self.count)).float()
        total = torch.zeros_like(self.total).index_add_(0, flat, vectors)
        self.count.lerp_(count, 1 - CODEBOOK_DECAY)
        self.total.lerp_(total, 1 - CODEBOOK_DECAY)
        used = self.count > 1e-4
        self.quantizer.codebook.weight[used] = self.total[used] / self.count[used, None]

    @torch.no_grad()
    def revive(self, vectors: Tensor, generator: torch.Generator) -> int:
        """Begin rarely used codes anew at vectors drawn from [B, C, h, w]."""
        rare = (self.count < RARE).nonzero()[:, 0]
        if len(rare):
            self._replace(rare, _vectors(vectors), generator)
        return len(rare)

    def _replace(self, codes: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        chosen = vectors[torch.randint(len(vectors), (len(codes),), generator=generator)]
        chosen = chosen + 0.01 * vectors.std() * torch.randn(chosen.shape, generator=generator)
        self.quantizer.codebook.weight[codes] = chosen
        self.count[codes], self.total[codes] = 1.0, chosen


def _vectors(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def quantize(quantizer: Quantizer, latent: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The sum of the codes [B, C, P, P], the losses of phi and of commitment, and per scale the codes and what they coded."""
    tokens = quantizer.encode(latent.detach())
    rest, f_hat = latent.detach(), torch.zeros_like(latent)
    inputs, fit, commitment = [], torch.zeros(()), torch.zeros(())
    for index, (embedding, side) in enumerate(zip(tokens.embeddings, quantizer.patch_nums, strict=True)):
        inputs.append(quantizer.next_input(rest - f_hat.detach(), side))
        phi = phi_index(index, len(quantizer.patch_nums), quantizer.share)
        f_hat = f_hat + quantizer.contribution(embedding.detach(), phi)
        fit = fit + F.mse_loss(f_hat, latent.detach())
        commitment = commitment + F.mse_loss(latent, f_hat.detach())  # of every scale: the first ones must mean something
    return f_hat, (fit + COMMITMENT * commitment) / len(inputs), tokens.indices, inputs


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to the margin, mirror half of them."""
    dx, dy, mirror = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist() + [
        torch.rand(len(pictures), generator=generator) < 0.5
    ]
    pictures = pictures.roll((dy, dx), dims=(2, 3))
    return torch.where(mirror[:, None, None, None], pictures.flip(3), pictures)


@torch.no_grad()
def evaluate(autoencoder: Autoencoder, pictures: Tensor) -> tuple[list[Tensor], dict[str, float]]:
    """Hybrid and discrete reconstructions, and their mean PSNR."""
    both, scores = [], {}
    for mode in ("hybrid", "discrete"):
        rebuilt = torch.cat([autoencoder.reconstruct(part, mode) for part in pictures.split(16)])
        both.append(rebuilt)
        scores[mode] = psnr(rebuilt, pictures).mean().item()
    return both, scores


@torch.no_grad()
def rescale(autoencoder: Autoencoder, pictures: Tensor) -> None:
    """Scale the latent so that the residual fills the range in which it is sampled; changes nothing else.

    The residual diffusion clips its sample to LATENT_SCALE; all but a thousandth of the residuals come to lie within.
    """
    quantizer, left = autoencoder.quantizer, []
    for part in pictures.split(16):
        tokens = autoencoder.encode(part)
        left.append((tokens.residual - tokens.embeddings[-1]).abs().flatten())
    factor = LATENT_SCALE / torch.cat(left).quantile(0.999)
    scaled = [autoencoder.quant_conv.weight, autoencoder.quant_conv.bias, quantizer.codebook.weight]
    for weight in (*scaled, *(phi.bias for phi in quantizer.phi)):
        weight *= factor
    autoencoder.post_quant_conv.weight /= factor


def main() -> None:
    """Train, with a checkpoint, scores and a grid every so often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints, scores and grids")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, log = Pictures(args.data), Log(args.out / "tokenizer.jsonl")
    train, held_out = pictures.split("train"), pictures.tensor(pictures.split("style", "subject")[::3])

    torch.manual_seed(args.seed)
    autoencoder = Autoencoder(AUTOENCODER).to(memory_format=torch.channels_last)
    codebook, average = Codebook(autoencoder.quantizer), Average(autoencoder, 0.998, copied=(CODES,))
    learned = [p for name, p in autoencoder.named_parameters() if name != CODES]
    between = [p for name, p in autoencoder.named_parameters() if "quant" in name and name != CODES]  # the codes follow these
    matrices = [p for p in learned if p.ndim > 1 and all(p is not other for other in between)]
    others = [p for p in learned if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, args.lr, weight_decay=0.01),
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    path, start = args.out / "tokenizer.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        autoencoder.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average.values, codebook.count, codebook.total, start = state["average"], state["count"], state["total"], state["step"]
    batches = shuffled(train, args.batch, args.seed, start)
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed + step)
        rate = learning_rate(step, peak=args.lr, warmup=100, steps=args.steps)
        for optimizer, factor in zip(optimizers, (1.0, 0.5), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
        images = augment(pictures.tensor(next(batches)), generator).contiguous(memory_format=torch.channels_last)
        latent = autoencoder.quant_conv(autoencoder.encoder(images))
        coded, spread, missed = latent.new_zeros(()), latent.std(), latent.new_ones(())
        if step == CONTINUOUS_STEPS:
            codebook.begin(latent, generator)
        if step >= CONTINUOUS_STEPS:
            f_hat, coded, indices, inputs = quantize(autoencoder.quantizer, latent)
            missed = F.mse_loss(f_hat, latent) / latent.var()
            half = len(latent) // 2
            latent = torch.cat([latent[:half], latent[half:] + (f_hat - latent)[half:].detach()])
        rebuilt = autoencoder.decoder(autoencoder.post_quant_conv(latent))
        loss = F.mse_loss(rebuilt, images) + 0.2 * F.l1_loss(rebuilt, images) + coded + SCALE * spread.log().square()
        autoencoder.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        revived = 0
        if step >= CONTINUOUS_STEPS:
            codebook.update(indices, inputs)
            if step % REVIVE_EVERY == 0 and step < 0.8 * args.steps:
                revived = codebook.revive(inputs[-1], generator)
        average.update(step)
        if step % 25 == 0:
            scores = psnr(rebuilt.detach(), images)
            half = len(scores) // 2
            log(step=step, loss=loss.item(), coded=coded.item(), continuous=scores[:half].mean().item(),
                discrete=scores[half:].mean().item(), revived=revived, spread=spread.item(), missed=missed.item())  # fmt: skip
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"model": autoencoder.state_dict(), "average": average.values, "step": step + 1}
            save(
                path,
                state
                | {
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "count": codebook.count,
                    "total": codebook.total,
                },
            )
            average.swap()
            both, held_out_scores = evaluate(autoencoder, held_out)
            log(step=step + 1, held_out=held_out_scores)
            write_grid(args.out / "tokenizer.png", [rows[i : i + 12] for i in (0, 12, 24) for rows in (held_out, *both)])
            average.swap()
    average.swap()
    rescale(autoencoder, pictures.tensor(train[::20]))
    save(args.out / TOKENIZER, autoencoder.state_dict())


if __name__ == "__main__":
    main()
