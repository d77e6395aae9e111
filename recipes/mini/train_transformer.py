"""Train a transformer on a trained tokenizer: hart-mini's, with its residual diffusion, or var-mini's.

    python recipes/mini/train_transformer.py DATA OUT [--model var]

hart-mini (paper sections 3.2, 3.3) takes captions through the text encoder in OUT, var-mini (arXiv:2404.02905) the number of a
subject. hart-mini's text encoder learns on with it. A twentieth of the conditions is dropped for guidance. The last scale, more
than half of all tokens, has nearly all of the details; --full-every 3 leaves it out of two steps of three, to begin with.
Beside the loss the log has that of the averaged weights on the first batch with no condition dropped and no code replaced
("known"). Resumes from OUT/transformer.pt (OUT/var.pt); without one, --start-from goes on from the weights of a pipeline
that this recipe exported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
import torch
from captions import caption, other_words, spoken, wanted_of
from foreseen import principal
from model import AUTOENCODER, CONTEXT_TOKENS, TRANSFORMER, VAR_GROUPS, VAR_STYLES
from parts import STATE, Meant, assemble, assemble_var, latents_of, learning, meanings_of, parts_hash, take_over, trained
from teacher import CORRUPTED, encode, losses
from torch import Tensor, nn
from training import Average, Entry, Log, Muon, Pictures, learning_rate, mixed_pictures, save, shuffled, write_grid

from hart_infer import HartPipeline, VarPipeline
from hart_infer.generation.schedule import Schedule, Settings, Stage, hart_schedule, var_schedule
from hart_infer.models.hart import HartTransformer
from hart_infer.models.next_scale import Condition, NextScaleTransformer
from hart_infer.models.parts.layers import SteadyLinear, SwiGLU
from hart_infer.models.text import TextEncoder
from hart_infer.models.var import VarTransformer

DROPPED = 0.05  # share of conditions replaced by the unconditional one
WORDED = 0.3  # share of captions that name the subject by one of its words in words.json, where there are some
LIKENESS = 10.0  # a word whose likeness to its subject is 0.1 higher is drawn e times as often
RARE = 1e-8  # a word's least share of English text: many keywords were never counted
SAMPLES = (
    "a cat, noto style", "a cat, fluent style", "a cat, twemoji style", "pizza", "a rocket in fluent style", "red heart",
    "a dog face, twemoji style", "noto bicycle", "a house with garden", "grinning face, fluent style", "sun with face",
    "an octopus", "strawberry, noto style", "fluent hot beverage", "a car", "soccer ball", "a kitten", "a blue rocket",
    "two cats", "three bananas", "a green dress, noto style", "a saxophone", "lobster", "a castle in fluent style",
)  # fmt: skip


class Learned(Protocol):
    """What is learned: a pipeline, and what says which picture is meant."""

    pipe: HartPipeline | VarPipeline
    schedule: Schedule
    classes: list[str]  # var-mini's names

    def batches(self, batch: int, seed: int, start: int) -> Iterator[list[int]]:
        """Endless batches of pictures from step `start` on."""
        ...

    def condition(self, chosen: Sequence[int], random: Random, generator: torch.Generator, dropped: float) -> Condition:
        """The condition of these pictures, a share of them dropped."""
        ...

    def draw(self) -> Tensor:
        """Samples to look at, [N, 3, h, w] in -1..1."""
        ...


class Prompts:
    """hart-mini: pictures by captions."""

    def __init__(self, pictures: Pictures, out: Path, start_from: str | None, mixed: Sequence[float]) -> None:
        """New, on the tokenizer and the text encoder in `out`, or as a saved pipeline is; `mixed`: the option."""
        meanings = meanings_of(out)
        begun = take_over(start_from, out) if start_from and not (out / STATE["hart"]).exists() else None
        self.about, self.pipe = pictures.about, assemble(out)
        self.mixed = list(zip(mixed_pictures(pictures), mixed, strict=True))
        self.words = weights_of(meanings)
        self.others = other_words(meanings, [spoken(a.name) for a in self.about])
        self.classes: list[str] = []
        self.schedule = hart_schedule(
            TRANSFORMER.patch_nums, context_tokens=CONTEXT_TOKENS, share_quant_resi=AUTOENCODER.share_quant_resi
        )
        initialise(self.pipe.transformer)
        if begun is not None:
            self.pipe.transformer.load_state_dict(begun.transformer.state_dict())

    def batches(self, batch: int, seed: int, start: int) -> Iterator[list[int]]:
        """As `Learned`."""
        pictures, shares = zip(*self.mixed, strict=True)
        if not math.isclose(sum(shares), 1):
            raise SystemExit(f"The shares of --mixed make {sum(shares):g}, not 1.")
        random = np.random.default_rng(seed)
        before = random.multinomial(batch, shares, size=start).sum(axis=0).tolist()
        parts = [shuffled(indices, 1, seed, first) for indices, first in zip(pictures, before, strict=True)]
        while True:
            counts = random.multinomial(batch, shares).tolist()
            yield [next(part)[0] for part, count in zip(parts, counts, strict=True) for _ in range(count)]

    def condition(self, chosen: Sequence[int], random: Random, generator: torch.Generator, dropped: float) -> Condition:
        """As `Learned`."""
        encoder = self.pipe.text_encoder
        assert encoder is not None
        context, mask = encode(encoder, [self.caption(encoder, self.about[i], random) for i in chosen])
        without = torch.rand(len(context), generator=generator) < dropped
        position_ids = torch.where(without[:, None], 0, mask.long().cumsum(dim=1) - 1)
        context = torch.where(without[:, None, None], 0.0, context)
        mask = torch.where(without[:, None], torch.arange(mask.shape[1]) == 0, mask)
        return self.pipe.transformer.condition(context, mask, position_ids)

    def caption(self, encoder: TextEncoder, about: Entry, random: Random) -> str:
        """A caption of a picture, by its name or a word that means it, that fits the context."""
        while True:
            words = self.words.get(about.name)
            word = random.choices([*words], [*words.values()])[0] if words and random.random() < WORDED else None
            others = () if word else self.others  # of two words either might be meant
            text = caption(wanted_of(about, random, word), random, others)
            if len(encoder.tokenizer(text)["input_ids"]) <= CONTEXT_TOKENS:
                return text

    def draw(self) -> Tensor:
        """As `Learned`."""
        return self.pipe(list(SAMPLES), seed=0, output_type="pt").images * 2 - 1


class Classes:
    """var-mini: pictures of some groups in some styles, by the number of their subject."""

    def __init__(self, pictures: Pictures, out: Path, start_from: str | None) -> None:
        """New, on the tokenizer in `out`, or as a saved pipeline is."""
        if start_from:
            raise SystemExit("--start-from goes with hart-mini alone.")
        about = pictures.about
        train = pictures.split("train")
        self.pictures = [i for i in train if about[i].style in VAR_STYLES and about[i].group in VAR_GROUPS]
        self.classes = sorted({about[i].name for i in self.pictures})
        number = {name: place for place, name in enumerate(self.classes)}
        self.number = {i: number[about[i].name] for i in self.pictures}
        self.pipe = assemble_var(out, self.classes)
        self.schedule = var_schedule(
            TRANSFORMER.patch_nums, share_quant_resi=AUTOENCODER.share_quant_resi, settings=Settings(guidance_scale=0.0)
        )
        initialise(self.pipe.transformer)
        self.foresee(out, pictures)

    @torch.no_grad()
    def foresee(self, out: Path, pictures: Pictures) -> None:
        """Begin the embedding of every class with the first principal coordinates of its pictures, a part for each style."""
        rows, latents = latents_of(out, pictures)
        embedding = self.pipe.transformer.class_embed.weight
        part = embedding.shape[1] // len(VAR_STYLES)
        coordinates = principal(latents)[:, :part]
        coordinates *= embedding.std() / coordinates.std()
        for picture, number in self.number.items():
            first = VAR_STYLES.index(pictures.about[picture].style) * part
            embedding[number, first : first + part] = coordinates[rows[picture]]

    def batches(self, batch: int, seed: int, start: int) -> Iterator[list[int]]:
        """As `Learned`."""
        return shuffled(self.pictures, batch, seed, start)

    def condition(self, chosen: Sequence[int], random: Random, generator: torch.Generator, dropped: float) -> Condition:
        """As `Learned`."""
        classes = torch.tensor([self.number[i] for i in chosen])
        without = torch.rand(len(classes), generator=generator) < dropped
        return self.pipe.transformer.condition(torch.where(without, self.pipe.transformer.config.num_classes, classes))

    def draw(self) -> Tensor:
        """As `Learned`."""
        some = Random(0).sample(range(self.pipe.transformer.config.num_classes), 24)
        return self.pipe(some, seed=0, output_type="pt").images * 2 - 1


def weights_of(meanings: dict[str, Meant]) -> dict[str, dict[str, float]]:
    """The words of each name but itself, with how often to draw each: more often if common, and if like the name."""
    words: dict[str, dict[str, float]] = {}
    for word, (name, frequency, likeness) in sorted(meanings.items()):
        if word != spoken(name).lower():
            words.setdefault(name, {})[word] = max(frequency, RARE) ** 0.5 * math.exp(LIKENESS * likeness)
    return words


def in_one_product(transformer: NextScaleTransformer) -> None:
    """Map all rows of a modulation at once. Generation maps two at a time, which rounds as the released code does."""
    for module in transformer.modules():
        if isinstance(module, SteadyLinear):
            module.halves = False


def initialise(transformer: NextScaleTransformer) -> None:
    """Modulations start at none, the sublayers' outputs small; the rest depends on the family."""
    nn.init.zeros_(transformer.head.modulation.weight)
    nn.init.zeros_(transformer.head.modulation.bias)
    nn.init.normal_(transformer.head.linear.weight, std=0.02)
    for block in transformer.blocks:
        block.attn.qkv.bias.data.zero_()
        for last in (block.attn.proj, block.mlp.down if isinstance(block.mlp, SwiGLU) else block.mlp.fc2):
            last.weight.data *= transformer.depth**-0.5
    if isinstance(transformer, HartTransformer):
        _initialise_hart(transformer)
    elif isinstance(transformer, VarTransformer):
        _initialise_var(transformer)


def _initialise_hart(transformer: HartTransformer) -> None:
    """Queries and keys larger than PyTorch's: the softmax scale is a quarter of the usual one."""
    diffusion = transformer.diffusion
    for module in (diffusion.out_modulation, *(block.modulation for block in diffusion.blocks)):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(diffusion.out_proj.weight)
    # The variance hardly shows in a loss over 1000 steps, but decides how noisy 8 steps end: begin at the smallest.
    diffusion.out_proj.bias.data[diffusion.channels :] = -1.0
    for block in transformer.blocks:
        block.attn.qkv.weight.data[: 2 * transformer.width] *= 2.5
        nn.init.normal_(block.modulation.weight, std=0.01)
        nn.init.zeros_(block.modulation.bias)
        block.modulation.bias.data[: 2 * transformer.width] = 1.0  # gates start open


def _initialise_var(transformer: VarTransformer) -> None:
    """Gates start open, and classes far apart."""
    nn.init.normal_(transformer.shared_modulation.weight, std=0.01)
    nn.init.zeros_(transformer.shared_modulation.bias)
    for embedding, std in ((transformer.class_embed, 0.3), (transformer.position_embed, 0.1), (transformer.level_embed, 0.1)):
        nn.init.normal_(embedding.weight, std=std)
    for block in transformer.blocks:
        block.modulation.table.data[:2] = 1.0
        nn.init.constant_(block.attn.log_scale, math.log(4))


def optimizers(learned: nn.Module, head: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest: embeddings, the code `head`, biases and norms."""
    matrices = [m.weight for m in learned.modules() if isinstance(m, nn.Linear) and m is not head]
    apart = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in learned.parameters() if id(parameter) not in apart]
    return [
        Muon(matrices, rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("data", type=Path)
    result.add_argument("out", type=Path, help="has what train_tokenizer.py, associate.py and train_text.py wrote")
    result.add_argument("--model", choices=("hart", "var"), default="hart")
    result.add_argument("--steps", type=int, default=30000)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--lr", type=float, default=8e-4)
    result.add_argument("--decay", type=float, default=0.25, help="share of the steps in which the rate falls, the last ones")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--every", type=int, default=250, help="steps between checkpoints and grids")
    result.add_argument("--full-every", type=int, default=1, help="steps: the others leave the last scale and its residual out")
    result.add_argument(
        "--mixed", type=float, nargs=3, default=(0.45, 0.5, 0.05), metavar=("PLAIN", "STYLED", "COMPOSED"),
        help="hart-mini: shares of pictures that a caption without a style means, of other ones, and of composed ones",
    )  # fmt: skip
    result.add_argument("--subjects", type=Path, help="learn these alone, one name per line (all of them)")
    result.add_argument(
        "--start-from", metavar="MODEL", help="begin with the weights and tokenizers of a pipeline that this recipe exported"
    )
    return result


def main() -> None:
    """Train, with a checkpoint and a grid of samples every so often."""
    args = parser().parse_args()
    pictures, log = Pictures(args.data, args.subjects), Log(args.out / f"{args.model}.jsonl")
    torch.manual_seed(args.seed)
    learned: Learned
    if args.model == "var":
        learned = Classes(pictures, args.out, args.start_from)
    else:
        learned = Prompts(pictures, args.out, args.start_from, args.mixed)
    transformer, quantizer = learned.pipe.transformer, learned.pipe.autoencoder.quantizer
    whole = learning(learned.pipe).requires_grad_(True)
    in_one_product(transformer)
    both = optimizers(whole, transformer.head.linear, args.lr)
    average = Average(whole, 0.99)
    path, start = args.out / STATE[args.model], 0
    if path.exists():
        state = trained(args.out, args.model)
        whole.load_state_dict(state["model"])
        average.values, start = state["average"], state["step"]
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    log(step=start, options={name: str(value) for name, value in vars(args).items() if value is not None})
    place, latents = latents_of(args.out, pictures)
    codes = torch.cat([torch.cat(quantizer.encode(part).indices, dim=1).short() for part in latents.split(64)])
    stages, drawn_from = learned.schedule.stages, learned.batches(args.batch, args.seed, start)

    def lost(chosen: list[int], some: Sequence[Stage], seed: int, dropped: float, corrupted: float) -> dict[str, Tensor]:
        rows, generator = torch.tensor([place[i] for i in chosen]), torch.Generator().manual_seed(seed)
        split = list(codes[rows].long().split([s.tokens for s in stages], dim=1))
        with torch.autocast("cpu", torch.bfloat16):
            condition = learned.condition(chosen, Random(seed), generator, dropped)
        return losses(transformer, quantizer, some, condition, split, latents[rows], generator, corrupted)

    for step in range(start, args.steps):
        rate = learning_rate(step, peak=args.lr, warmup=50, steps=args.steps, decay=args.decay)
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
        part = stages if step % args.full_every == 0 else stages[:-1]
        found = lost(next(drawn_from), part, args.seed + step, DROPPED, CORRUPTED)
        whole.zero_grad()
        found["loss"].backward()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        average.update(step)
        if step % 20 == 0:
            log(step=step, norm=norm.item(), rate=rate, **{name: value.item() for name, value in found.items()})
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"average": average.values, "step": step + 1, "parts": parts_hash(args.out, args.model)}
            state["classes"] = learned.classes
            optimizing = [optimizer.state_dict() for optimizer in both]
            save(path, state | {"model": whole.state_dict(), "optimizers": optimizing})
            average.swap()
            with torch.no_grad():
                known = lost(next(learned.batches(args.batch, args.seed, 0)), stages, args.seed, 0.0, 0.0)
            log(step=step + 1, **{f"known {name}": value.item() for name, value in known.items()})
            write_grid(args.out / f"{args.model}-{step + 1:05d}.png", list(learned.draw().split(6)))
            average.swap()


if __name__ == "__main__":
    main()
