"""Train the hybrid tokenizer (paper section 3.1): one decoder for the continuous latent and for the codes.

    python recipes/mini/train_tokenizer.py DATA OUT

Needs OUT/features.safetensors (classifier.py) for the perceptual loss; a discriminator joins for the last part of the steps.
Half of every batch is decoded from the continuous latent, half from the codes (straight-through). The codebook follows the
vectors that it codes by exponential averages; codes that nothing uses begin anew. Resumes from OUT/tokenizer.pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import load_classifier
from codebook import Codebook
from model import AUTOENCODER
from parts import TOKENIZER
from perceptual import Discriminator, PerceptualLoss, balance
from torch import Tensor
from training import Average, Log, Muon, Pictures, learning_rate, psnr, save, shuffled, write_grid

from hart_infer import HartPipeline
from hart_infer.generation.residual import LATENT_SCALE
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.parts.quantizer import Quantizer, phi_index

CONTINUOUS_STEPS = 200  # before the codebook joins
COMMITMENT = 0.25
SCALE = 0.1  # pull of the latent's standard deviation towards 1: else it outruns the codes
CODES = "quantizer.codebook.weight"
REVIVE_EVERY = 50  # steps
PERCEPTUAL, ADVERSARIAL = 0.3, 0.1  # shares of the gradient at the last weight, beside the pixels'
SHIFT = 5  # pixels: the pictures' margin


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
    parser.add_argument("--adversarial-from", type=float, default=0.6, help="share of the steps before the discriminator joins")
    parser.add_argument("--start-from", metavar="MODEL", help="begin with a pipeline's autoencoder, such as hart-mini's")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, log = Pictures(args.data), Log(args.out / "tokenizer.jsonl")
    train, held_out = pictures.split("train"), pictures.tensor(pictures.split("style", "subject")[::3])

    torch.manual_seed(args.seed)
    autoencoder = Autoencoder(AUTOENCODER)
    codebook, average = Codebook(autoencoder.quantizer), Average(autoencoder, 0.998, copied=(CODES,))
    learned = [p for name, p in autoencoder.named_parameters() if name != CODES]
    between = [p for name, p in autoencoder.named_parameters() if "quant" in name and name != CODES]  # the codes follow these
    matrices = [p for p in learned if p.ndim > 1 and all(p is not other for other in between)]
    others = [p for p in learned if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, args.lr, weight_decay=0.01),
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    perceptual = PerceptualLoss(load_classifier(args.out / "features.safetensors", pictures))
    discriminator = Discriminator()
    critic = torch.optim.AdamW(discriminator.parameters(), args.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
    path, start = args.out / "tokenizer.pt", 0
    if args.start_from and not path.exists():
        begun = HartPipeline.from_pretrained(args.start_from, torch_dtype=torch.float32, device="cpu").autoencoder
        autoencoder.load_state_dict(begun.state_dict())
        average, codebook = Average(autoencoder, 0.998, copied=(CODES,)), Codebook(autoencoder.quantizer)
    if path.exists():
        state = torch.load(path, weights_only=True)
        autoencoder.load_state_dict(state["model"])
        discriminator.load_state_dict(state["discriminator"])
        for optimizer, saved in zip([*optimizers, critic], state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average.values, codebook.count, codebook.total, start = state["average"], state["count"], state["total"], state["step"]
    batches, joins = shuffled(train, args.batch, args.seed, start), 0 if args.start_from else CONTINUOUS_STEPS
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed + step)
        rate = learning_rate(step, peak=args.lr, warmup=100, steps=args.steps)
        for optimizer, factor in zip(optimizers, (1.0, 0.5), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
        images = augment(pictures.tensor(next(batches)), generator)
        with torch.autocast("cpu", torch.bfloat16):
            latent = autoencoder.quant_conv(autoencoder.encoder(images))
        latent = latent.float()
        coded, spread, missed = latent.new_zeros(()), latent.std(), latent.new_ones(())
        if step == joins:
            codebook.begin(latent, generator)
        if step >= joins:
            f_hat, coded, indices, inputs = quantize(autoencoder.quantizer, latent)
            missed = F.mse_loss(f_hat, latent) / latent.var()
            half = len(latent) // 2
            latent = torch.cat([latent[:half], latent[half:] + (f_hat - latent)[half:].detach()])
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = autoencoder.decoder(autoencoder.post_quant_conv(latent))
        rebuilt = rebuilt.float()
        pixels, last = F.mse_loss(rebuilt, images) + 0.2 * F.l1_loss(rebuilt, images), autoencoder.decoder.conv_out.weight
        with torch.autocast("cpu", torch.bfloat16):
            seen = perceptual(rebuilt, images)
        loss = pixels + PERCEPTUAL * balance(pixels, seen, last) * seen + coded + SCALE * spread.log().square()
        judged = pixels.new_zeros(())
        if step >= args.adversarial_from * args.steps:
            real = -discriminator(rebuilt).mean()
            loss = loss + ADVERSARIAL * balance(pixels, real, last) * real
        autoencoder.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step >= args.adversarial_from * args.steps:
            judged = discriminator.loss(images, rebuilt)
            critic.zero_grad()
            judged.backward()
            critic.step()
        revived = 0
        if step >= joins:
            codebook.update(indices, inputs)
            if step % REVIVE_EVERY == 0 and step < 0.8 * args.steps:
                revived = codebook.revive(inputs[-1], generator)
        average.update(step)
        if step % 25 == 0:
            scores = psnr(rebuilt.detach(), images)
            half = len(scores) // 2
            log(
                step=step, loss=loss.item(), seen=seen.item(), judged=judged.item(), coded=coded.item(), revived=revived,
                continuous=scores[:half].mean().item(), discrete=scores[half:].mean().item(),
                spread=spread.item(), missed=missed.item(),
            )  # fmt: skip
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"model": autoencoder.state_dict(), "average": average.values, "step": step + 1}
            save(
                path,
                state
                | {
                    "optimizers": [optimizer.state_dict() for optimizer in (*optimizers, critic)],
                    "discriminator": discriminator.state_dict(),
                    "count": codebook.count,
                    "total": codebook.total,
                },
            )
            average.swap()
            both, held_out_scores = evaluate(autoencoder, held_out)
            log(step=step + 1, held_out=held_out_scores)
            firsts = range(0, min(len(held_out), 36), 12)
            write_grid(args.out / "tokenizer.png", [rows[i : i + 12] for i in firsts for rows in (held_out, *both)])
            average.swap()
    average.swap()
    rescale(autoencoder, pictures.tensor(train[::20]))
    save(args.out / TOKENIZER, autoencoder.state_dict())


if __name__ == "__main__":
    main()
