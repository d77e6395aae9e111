"""Train the transformer and its residual diffusion (paper sections 3.2, 3.3) on a trained tokenizer and text encoder.

    python recipes/mini/train_transformer.py DATA OUT

Teacher forcing: every scale sees the codes of the scales before, and all are predicted in one step, scale by scale through the
modules that generate. A tenth of the captions is dropped for guidance. The last scale, more than half of all tokens, takes part
in every third step (--full-every): nothing before depends on it. A fifth of the pictures are composed ones. Resumes from
OUT/transformer.pt; without one, --start-from continues a saved pipeline's weights, such as hart-mini's own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from captions import caption, wanted_of
from model import AUTOENCODER, CONTEXT_TOKENS, TRANSFORMER
from parts import TRANSFORMER_STATE, assemble, parts_hash, take_over, trained
from residual import diffusion_loss
from torch import Tensor, nn
from training import Average, Entry, Log, Muon, Pictures, learning_rate, save, shuffled, write_grid

from hart_infer import HartPipeline
from hart_infer.generation.schedule import Stage, hart_schedule
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.parts.modulation import Modulation
from hart_infer.models.parts.quantizer import Quantizer
from hart_infer.models.text import TextEncoder

DROPPED = 0.1  # share of captions replaced by the unconditional context
LOGITS_AT_ONCE = 1500  # rows of 4096
CORRUPTED = 0.05  # share of input codes replaced by random ones, as sampling errs too
COMPOSED = 5  # every so many-th batch is of composed pictures
SAMPLES = (
    "a cat, noto style", "a cat, fluent style", "a cat, twemoji style", "pizza", "a rocket in fluent style", "red heart",
    "a dog face, twemoji style", "noto bicycle", "a house with garden", "grinning face, fluent style", "sun with face",
    "an octopus", "strawberry, noto style", "fluent hot beverage", "a car", "soccer ball", "a kitten", "a blue rocket",
    "two cats", "three bananas", "a green dress, noto style", "a saxophone", "lobster", "a castle in fluent style",
)  # fmt: skip


class TeacherCache:
    """Keys and values of all scales so far, kept for the backward pass; a `KVCache` writes over its memory instead."""

    def __init__(self, rows: int) -> None:
        """Empty; `rows` of the batch."""
        self.rows = rows
        self.stored: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def at(self, stage: Stage) -> TeacherPlace:
        """The place of a stage, behind all that were asked for before."""
        return TeacherPlace(self, stage.length)


class TeacherPlace:
    """As a `Place`: where a scale's keys and values go, and what it attends to."""

    def __init__(self, cache: TeacherCache, length: int) -> None:
        """Of a scale of `length` tokens."""
        self.cache, self.length = cache, length

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Fresh memory for the scale's keys and values of a block."""
        shape = (self.cache.rows, TRANSFORMER.num_heads, self.length, TRANSFORMER.head_dim)
        pair = torch.empty(shape), torch.empty(shape)
        self.cache.stored.setdefault(layer, []).append(pair)
        return pair

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """All scales' until and with this one."""
        keys, values = zip(*self.cache.stored[layer], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def forward(
    transformer: HartTransformer, stages: Sequence[Stage], context: Tensor, mask: Tensor, position_ids: Tensor,
    inputs: list[Tensor],
) -> tuple[list[Tensor], Modulation]:  # fmt: skip
    """Hidden states [B, p * p, D] of the given `stages`, the first ones, from the teacher-forced inputs [B, C, p, p] of all
    but the first."""
    cache = TeacherCache(len(context))
    condition = transformer.condition(context, mask, position_ids)
    assert condition.copies == 1, "a batch has rows enough"
    place: Any = cache.at(stages[0])
    hidden = [transformer(condition.inputs, condition.modulation, condition.table, place)[:, -1:]]
    for stage, latent in zip(stages[1:], inputs, strict=True):
        (table,), place = transformer.image_tables([stage.side], condition.last_position), cache.at(stage)
        hidden.append(transformer(transformer.embed_tokens(latent, stage.index), condition.modulation, table, place))
    return hidden, condition.modulation


def losses(
    transformer: HartTransformer, quantizer: Quantizer, stages: Sequence[Stage], context: Tensor, mask: Tensor,
    codes: list[Tensor], latent: Tensor, generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss, and its parts: the codes' cross-entropy by scale and, where the last scale takes part, the residual's.

    Half of the loss weighs tokens alike, half weighs scales alike: the first ones have few tokens and decide what is drawn.
    """
    dropped = torch.rand(len(context), generator=generator) < DROPPED
    position_ids = torch.where(dropped[:, None], 0, mask.long().cumsum(dim=1) - 1)
    context = torch.where(dropped[:, None, None], 0.0, context)
    mask = torch.where(dropped[:, None], torch.arange(mask.shape[1]) == 0, mask)
    with torch.no_grad():
        embeddings = [quantizer.embed(c) for c in codes]
        inputs = quantizer.inputs([quantizer.embed(corrupt(c, generator)) for c in codes])[: len(stages) - 1]
    with torch.autocast("cpu", torch.bfloat16):
        hidden, modulation = forward(transformer, stages, context, mask, position_ids, inputs)
    entropy = [code_entropy(transformer, h, modulation.head, c) for h, c in zip(hidden, codes, strict=False)]
    found = {f"scale {stage.side}": value.mean() for stage, value in zip(stages, entropy, strict=True)}
    found["loss"] = 0.5 * torch.cat(entropy, dim=1).mean() + 0.5 * torch.stack(list(found.values())).mean()
    if stages[-1].num_inference_steps:
        with torch.no_grad():
            residual = latent - sum(quantizer.contribution(e, s.phi) for e, s in zip(embeddings, stages, strict=True))
        condition = transformer.residual_condition(hidden[-1], _tokens(embeddings[-1]))
        found["diffusion"] = diffusion_loss(
            transformer.diffusion, _tokens(residual).flatten(0, 1), condition.flatten(0, 1), generator
        )
        found["loss"] = found["loss"] + found["diffusion"]
    return found


def code_entropy(transformer: HartTransformer, hidden: Tensor, modulation: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy [B, p * p] of one scale's codes, few pictures at a time, so that logits take little memory."""
    at_once = max(1, LOGITS_AT_ONCE // codes.shape[1])
    parts = zip(*(x.split(at_once) for x in (hidden, modulation, codes)), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        flat = [F.cross_entropy(transformer.head(h, m).flatten(0, 1), c.flatten(), reduction="none") for h, m, c in parts]
    return torch.cat(flat).view(codes.shape)


def corrupt(codes: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a share of the codes by random ones."""
    others = torch.randint(AUTOENCODER.vocab_size, codes.shape, generator=generator)
    return torch.where(torch.rand(codes.shape, generator=generator) < CORRUPTED, others, codes)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@torch.no_grad()
def tokenize(autoencoder: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """All codes [N, tokens] int16 and latents [N, C, P, P] of pictures."""
    codes, latents = [], []
    for part in pixels.split(16):
        latent = autoencoder.encode_latent(part)
        codes.append(torch.cat(autoencoder.quantizer.encode(latent).indices, dim=1).short())
        latents.append(latent)
    return torch.cat(codes), torch.cat(latents)


def initialise(transformer: HartTransformer) -> None:
    """Modulations start at none, queries and keys larger than PyTorch's: the softmax scale is a quarter of the usual one."""
    for module in (
        transformer.head.modulation,
        transformer.diffusion.out_modulation,
        *(b.modulation for b in transformer.diffusion.blocks),
    ):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.diffusion.out_proj.weight)
    # The variance hardly shows in a loss over 1000 steps, but decides how noisy 8 steps end: begin at the smallest.
    transformer.diffusion.out_proj.bias.data[transformer.diffusion.channels :] = -1.0
    for block in transformer.blocks:
        width = TRANSFORMER.embed_dim
        block.attn.qkv.weight.data[: 2 * width] *= 2.5
        block.attn.qkv.bias.data.zero_()
        for last in (block.attn.proj, block.mlp.down):
            last.weight.data *= TRANSFORMER.depth**-0.5
    nn.init.normal_(transformer.head.linear.weight, std=0.02)


def optimizers(modules: Sequence[nn.Module], embeddings: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest: embeddings, the code head, biases and norms."""
    apart = {id(p) for p in embeddings}
    parameters = [p for module in modules for p in module.parameters()]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in apart]
    others = [p for p in parameters if p.ndim != 2 or id(p) in apart]
    return [
        Muon(matrices, rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]


def fitting(encoder: TextEncoder, about: Entry, random: Random) -> str:
    """A caption of a picture that fits the context."""
    while True:
        text = caption(wanted_of(about, random), random)
        if len(encoder.tokenizer(text)["input_ids"]) <= CONTEXT_TOKENS:
            return text


def batches(pictures: Pictures, batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Batches of pictures, every COMPOSED-th of composed ones, from step `start` on."""
    single = shuffled(pictures.split("train"), batch, seed, start - start // COMPOSED)
    several = shuffled(pictures.split("composed"), batch, seed, start // COMPOSED)
    for step in itertools.count(start):
        yield next(several if step % COMPOSED == COMPOSED - 1 else single)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("data", type=Path)
    result.add_argument("out", type=Path, help="has what train_tokenizer.py wrote")
    result.add_argument("--steps", type=int, default=8000)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--lr", type=float, default=8e-4)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--every", type=int, default=250, help="steps between checkpoints and grids")
    result.add_argument("--full-every", type=int, default=3, help="steps: the others leave the last scale and its residual out")
    result.add_argument("--subjects", type=Path, help="learn these alone, one name per line (all of them)")
    result.add_argument(
        "--start-from", metavar="MODEL", help="begin with a pipeline's weights and tokenizers, such as hart-mini's"
    )
    return result


def begin(out: Path, start_from: str | None) -> HartPipeline:
    """The pipeline to train: new, on the tokenizer and the text encoder in `out`, or as a saved one is."""
    begun = take_over(start_from, out) if start_from and not (out / TRANSFORMER_STATE).exists() else None
    pipe = assemble(out)
    initialise(pipe.transformer)
    if begun is not None:
        pipe.transformer.load_state_dict(begun.transformer.state_dict())
    return pipe


def main() -> None:
    """Train, with a checkpoint and a grid of samples every so often."""
    args = parser().parse_args()
    pictures, log = Pictures(args.data, args.subjects), Log(args.out / "transformer.jsonl")
    train = pictures.split("train", "composed")
    torch.manual_seed(args.seed)
    pipe = begin(args.out, args.start_from)
    transformer, text_encoder, quantizer = pipe.transformer.requires_grad_(True), pipe.text_encoder, pipe.autoencoder.quantizer
    both = optimizers([transformer], [transformer.head.linear.weight], args.lr)
    average = Average(transformer, 0.998)
    path, start = args.out / TRANSFORMER_STATE, 0
    if path.exists():
        state = trained(args.out)
        transformer.load_state_dict(state["model"])
        average.values, start = state["average"], state["step"]
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    log(step=start, options={name: str(value) for name, value in vars(args).items() if value is not None})
    codes, latents = tokenize(pipe.autoencoder, pictures.tensor(train))
    place = {picture: row for row, picture in enumerate(train)}
    stages = hart_schedule(
        TRANSFORMER.patch_nums, context_tokens=CONTEXT_TOKENS, share_quant_resi=AUTOENCODER.share_quant_resi
    ).stages
    drawn_from = batches(pictures, args.batch, args.seed, start)
    for step in range(start, args.steps):
        rate = learning_rate(step, peak=args.lr, warmup=150, steps=args.steps)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
        chosen, random, generator = next(drawn_from), Random(args.seed + step), torch.Generator().manual_seed(args.seed + step)
        captions = [fitting(text_encoder, pictures.about[i], random) for i in chosen]
        rows = torch.tensor([place[i] for i in chosen])
        part = stages if step % args.full_every == 0 else stages[:-1]
        split = list(codes[rows].long().split([s.tokens for s in stages], dim=1))
        with torch.no_grad():
            tokens, mask = text_encoder.tokenize(captions, context_tokens=CONTEXT_TOKENS)
            context = text_encoder.hidden_states(tokens, mask)
        found = losses(transformer, quantizer, part, context, mask, split, latents[rows], generator)
        transformer.zero_grad()
        found["loss"].backward()
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        average.update(step)
        if step % 20 == 0:
            log(step=step, norm=norm.item(), rate=rate, **{name: value.item() for name, value in found.items()})
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"model": transformer.state_dict(), "average": average.values, "step": step + 1}
            state["parts"] = parts_hash(args.out)
            save(path, state | {"optimizers": [optimizer.state_dict() for optimizer in both]})
            average.swap()
            drawn = pipe(list(SAMPLES), seed=0, output_type="pt").images * 2 - 1
            write_grid(args.out / f"samples-{step + 1:05d}.png", list(drawn.split(6)))
            average.swap()


if __name__ == "__main__":
    main()
