"""Train the text encoder to say what a caption means, and to foresee the picture that it means.

    python recipes/mini/train_text.py DATA OUT

Needs OUT/words.json (associate.py) and the tokenizer. Captions cost little, so this comes before the transformer, which then
need not learn by heart what the encoder foresees; the encoder learns on with it. Linear maps read subject, style, colour and
number from the hidden states of a caption's last token and of the last position, and the picture from their mean
(foreseen.py); the maps are thrown away. Resumes from OUT/text.pt; writes OUT/text-final.pt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from captions import (
    FRESH_TEMPLATES,
    HELD_OUT_TEMPLATES,
    PLAIN,
    STYLED_TEMPLATES,
    Wanted,
    any_wanted,
    beside,
    caption,
    fill,
    other_words,
    spoken,
    wanted_of,
)
from classifier import STYLE_NAMES, subjects_of
from compose import COLOURS
from foreseen import BLOCK, PLACES, Foreseen, Thing, principal
from model import CONTEXT_TOKENS
from parts import TEXT, WORDS, Meant, latents_of, meanings_of
from teacher import encode
from text_encoder import WIDTH, build_text_encoder, build_tokenizer
from torch import Tensor, nn
from training import Average, Entry, Log, Muon, Pictures, learning_rate, save
from transformers import PreTrainedTokenizerFast

from hart_infer.models.hart import masked_average
from hart_infer.models.text import TextEncoder

OF_PICTURES, OF_WORDS, OF_ANY = 0.45, 0.3, 0.15  # shares of captions; the rest has another thing beside the wanted one
COLOUR_NAMES = [None, *COLOURS]
LABELS = ("subject", "style", "colour", "number")
PICTURE = 8.0  # weight of the share of the picture that is missed


@dataclass(frozen=True)
class Labelled:
    """A caption and what it means."""

    text: str
    subject: str
    wanted: Wanted
    style: str
    made: bool = False  # of a composed picture: `wanted.colour` is not just the colour that it has anyway

    @property
    def thing(self) -> Thing:
        """Which picture it means, if there is one."""
        return self.subject, self.style, self.wanted.colour if self.made else None, self.wanted.number


class Captions:
    """Draws labelled captions that fit the context."""

    def __init__(self, pictures: Pictures, words: dict[str, Meant], tokenizer: PreTrainedTokenizerFast) -> None:
        """`words`: associate.py's."""
        self.pictures, self.tokenizer = pictures, tokenizer
        self.shown = pictures.split("train", "composed")
        self.style = {a.name: a.style for a in pictures.about if a.plain and not a.made}
        self.words = sorted((word, meant.name) for word, meant in words.items() if meant.name in self.style)
        self.names = sorted(self.style)
        self.others = other_words(words, map(spoken, self.names))

    def draw(self, random: Random) -> Labelled:
        """One caption."""
        while True:
            found = self._draw(random)
            if len(self.tokenizer(found.text)["input_ids"]) <= CONTEXT_TOKENS:
                return found

    def _draw(self, random: Random) -> Labelled:
        kind = random.random()
        if kind < OF_PICTURES:
            about = self.pictures.about[random.choice(self.shown)]
            wanted = wanted_of(about, random)
            return Labelled(caption(wanted, random, self.others), about.name, wanted, about.style, about.made)
        if kind < OF_PICTURES + OF_WORDS:
            word, name = random.choice(self.words)
            plain = Wanted(word, random.choice((None, None, *STYLE_NAMES)))
            wanted = plain if random.random() < 0.7 else any_wanted(word, random, STYLE_NAMES)
            text = word if wanted == Wanted(word) and random.random() < 0.5 else caption(wanted, random)
            return Labelled(text, name, wanted, wanted.style or self.style[name], wanted.colour is not None)
        name = random.choice(self.names)
        wanted = any_wanted(spoken(name), random, STYLE_NAMES)
        if kind < OF_PICTURES + OF_WORDS + OF_ANY:
            text = caption(wanted, random, self.others)
        else:
            text = beside(wanted, random.choice(self.words)[0], random)
        return Labelled(text, name, wanted, wanted.style or self.style[name], wanted.colour is not None)


class Reader(nn.Module):
    """Linear maps from hidden states to labels, and to the picture's coordinates."""

    def __init__(self, subjects: Sequence[str]) -> None:
        super().__init__()
        self.names = {name: i for i, name in enumerate(subjects)}
        sizes = (len(subjects), len(STYLE_NAMES), len(COLOUR_NAMES), 3)
        self.maps = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, BLOCK) for _ in range(PLACES))

    def labels(self, captions: Sequence[Labelled]) -> list[Tensor]:
        """Subject, style, colour and number, [N] int64 each."""
        rows = [
            (self.names[c.subject], STYLE_NAMES.index(c.style), COLOUR_NAMES.index(c.wanted.colour), c.wanted.number - 1)
            for c in captions
        ]
        return list(torch.tensor(rows).unbind(1))

    def forward(self, hidden: Tensor, mask: Tensor) -> list[Tensor]:
        """hidden [N, T, WIDTH], mask [N, T] -> logits [2 N, ...] a label: of the last tokens, and of the last positions."""
        last = hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]
        both = torch.cat([last, hidden[:, -1]])
        return [linear(both) for linear in self.maps]

    def picture(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [N, T, WIDTH], mask [N, T] -> coordinates [N, PLACES * BLOCK].

        The first ones are read from the mean over the caption's tokens, which modulates the transformer's blocks.
        """
        places = (masked_average(hidden, mask), hidden[:, -1])
        return torch.cat([read(x) for read, x in zip(self.blocks, places, strict=True)], dim=1)


def _thing(about: Entry) -> Thing:
    return about.name, about.style, about.colour if about.made else None, about.number


@torch.no_grad()
def score(encoder: TextEncoder, reader: Reader, captions: Sequence[Labelled], foreseen: Foreseen) -> list[float]:
    """How often the last position tells subject, style, colour and number; and the share of the picture that is missed."""
    right, missed = [], []
    for first in range(0, len(captions), 256):
        part = captions[first : first + 256]
        hidden, mask = encode(encoder, [c.text for c in part])
        logits, labels = reader(hidden, mask), reader.labels(part)
        right.append(torch.stack([(x[len(part) :].argmax(1) == y).float() for x, y in zip(logits, labels, strict=True)], dim=1))
        missed.append(foreseen.missed(reader.picture(hidden, mask), [c.thing for c in part]))
    return [round(x, 4) for x in (*torch.cat(right).mean(dim=0).tolist(), torch.stack(missed).mean().item())]


def held_out(pictures: Pictures, templates: Sequence[str]) -> list[Labelled]:
    """Every training picture in one of the templates."""
    chosen = [pictures.about[i] for i in pictures.split("train")]
    wanted = [Wanted(spoken(a.name), a.style) for a in chosen]
    return [
        Labelled(fill(templates[i % len(templates)], w), a.name, w, a.style)
        for i, (a, w) in enumerate(zip(chosen, wanted, strict=True))
    ]


def main() -> None:
    """Train, with scores in new wordings every so often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints and scores")
    args = parser.parse_args()
    pictures, log = Pictures(args.data), Log(args.out / "text.jsonl")
    words = meanings_of(args.out)
    if not (args.out / WORDS).exists():
        texts = [*words, *words] + [spoken(a.name) for a in pictures.about]
        wanted = [Wanted(spoken(a.name), a.style, a.colour, a.number) for a in pictures.about[::7]]
        build_tokenizer([*texts, *(fill(t, w) for w in wanted for t in (*PLAIN, *STYLED_TEMPLATES))]).save_pretrained(
            args.out / WORDS
        )
    torch.manual_seed(args.seed)
    encoder = build_text_encoder(PreTrainedTokenizerFast.from_pretrained(args.out / WORDS))
    reader, captions = Reader(subjects_of(pictures)), Captions(pictures, words, encoder.tokenizer)
    rows, latents = latents_of(args.out, pictures)
    foreseen = Foreseen(principal(latents), {_thing(pictures.about[i]): row for i, row in rows.items()})
    whole = nn.ModuleDict({"encoder": encoder.model.requires_grad_(True), "reader": reader})
    inside = [p for p in encoder.model.layers.parameters() if p.ndim == 2]
    others = [p for p in whole.parameters() if all(p is not q for q in inside)]
    both = [Muon(inside, args.lr, weight_decay=0.02), torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    average, path, start = Average(whole, 0.998), args.out / "text.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        whole.load_state_dict(state["model"])
        average.values, start = state["average"], state["step"]
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    for step in range(start, args.steps):
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = learning_rate(step, peak=args.lr, warmup=100, steps=args.steps, decay=0.5)
        random = Random(args.seed + step)
        drawn = [captions.draw(random) for _ in range(args.batch)]
        hidden, mask = encode(encoder, [c.text for c in drawn])
        logits, labels = reader(hidden, mask), reader.labels(drawn)
        losses = [F.cross_entropy(x, y.repeat(2)) for x, y in zip(logits, labels, strict=True)]
        missed = foreseen.missed(reader.picture(hidden, mask), [c.thing for c in drawn])
        losses.append(PICTURE * missed)
        whole.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        average.update(step)
        if step % 50 == 0:
            log(step=step, missed=missed.item(), **{name: x.item() for name, x in zip(LABELS, losses[:4], strict=True)})
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"model": whole.state_dict(), "average": average.values, "step": step + 1}
            save(path, state | {"optimizers": [optimizer.state_dict() for optimizer in both]})
            average.swap()
            fixed = Random(args.seed - 1)
            cases = {
                "trained": [captions.draw(fixed) for _ in range(1024)],
                "held out": held_out(pictures, HELD_OUT_TEMPLATES),
                "fresh": held_out(pictures, FRESH_TEMPLATES),
            }
            log(step=step + 1, **{name: score(encoder, reader, case, foreseen) for name, case in cases.items()})
            average.swap()
    average.swap()
    save(args.out / TEXT, encoder.model.state_dict())


if __name__ == "__main__":
    main()
