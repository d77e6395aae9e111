"""Measure a hart-mini: reconstruction, generation with and without the residual, prompts of all kinds, unseen combinations.
Or a var-mini: its classes.

    python recipes/mini/evaluate.py DATA OUT [--model var-mini] [--only prompts ...]

The judge is classifier.py's. Writes OUT/hart-results.json or OUT/var-results.json and, for the eye, OUT/*.png.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from captions import FRESH_TEMPLATES, HELD_OUT_TEMPLATES, PLAIN, STYLED_TEMPLATES, Wanted, fill, spoken
from classifier import STYLE_NAMES, Classifier, load_classifier, subjects_of
from model import VAR_STYLES
from PIL import Image, ImageDraw
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity
from torch import Tensor
from training import Pictures, psnr, write_grid

from hart_infer import HartPipeline, VarPipeline
from hart_infer.checkpoints.families import Family, find_family
from hart_infer.pipelines.describe import weights_digest

BATCH = 16


class Evaluation:
    """A pipeline, the pictures, and the judge."""

    pipe: HartPipeline | VarPipeline

    def __init__(self, pictures: Pictures, out: Path, model: str, judge: Path, *, count: int, seed: int) -> None:
        """`count`: how many pictures are generated for a score."""
        self.pictures, self.out, self.count, self.seed = pictures, out, count, seed
        pipeline = VarPipeline if find_family(model) == "VAR" else HartPipeline
        self.pipe = pipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier: Classifier = load_classifier(judge, pictures)
        self.subjects = {name: i for i, name in enumerate(subjects_of(pictures))}

    def draw(self, prompts: Sequence[str], **options: Any) -> Tensor:
        """One picture per prompt, [N, 3, side, side] in -1..1; prompt i has seed `seed` + i."""
        parts = []
        for first in range(0, len(prompts), BATCH):
            seed = self.seed + first
            parts.append(self.pipe(list(prompts[first : first + BATCH]), seed=seed, output_type="pt", **options).images)
        return torch.cat(parts) * 2 - 1

    def some(self, split: str, count: int | None = None) -> list[int]:
        """A fixed choice of pictures of a split."""
        indices = self.pictures.split(split)
        return Random(self.seed).sample(indices, min(count or self.count, len(indices)))

    def judge(self, drawn: Tensor, indices: Sequence[int], missed: list[str] | None = None) -> dict[str, float]:
        """How often the classifier sees the subject (first guess, first five) and the style of `indices` in `drawn`.

        Those whose subject it doesn't see at the first guess are added to `missed`.
        """
        with torch.no_grad():
            by_subject, by_style = self.classifier(drawn)
        about = [self.pictures.about[i] for i in indices]
        subject = torch.tensor([self.subjects[a.name] for a in about])
        style = torch.tensor([STYLE_NAMES.index(a.style) for a in about])
        five = by_subject.topk(5, dim=1).indices
        if missed is not None:
            missed += [f"{a.name}, {a.style}" for a, right in zip(about, five[:, 0] == subject, strict=True) if not right]
        return {
            "subject": (five[:, 0] == subject).float().mean().item(),
            "subject_in_five": (five == subject[:, None]).any(dim=1).float().mean().item(),
            "style": (by_style.argmax(dim=1) == style).float().mean().item(),
        }

    def frechet(self, a: Tensor, b: Tensor) -> float:
        """Fréchet distance of the classifier's features: our own judge's, so to be compared with no published FID."""
        with torch.no_grad():
            first, second = (self.classifier.features(x).double().numpy() for x in (a, b))
        covariances = [np.cov(x, rowvar=False) for x in (first, second)]
        root = sqrtm(covariances[0] @ covariances[1]).real
        gap = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
        return float(gap + np.trace(covariances[0] + covariances[1] - 2 * root))


def reconstruction(e: Evaluation) -> dict[str, Any]:
    """Held-out pictures through the tokenizer: hybrid against the codes alone (the paper's first claim)."""
    indices = [i for i, about in enumerate(e.pictures.about) if about.split in ("style", "subject")]
    pixels, scores, shown = e.pictures.tensor(indices), {"pictures": len(indices)}, []
    for mode in ("hybrid", "discrete"):
        rebuilt = e.pipe.reconstruct(pixels / 2 + 0.5, mode) * 2 - 1
        pairs = zip(pixels.permute(0, 2, 3, 1).numpy(), rebuilt.permute(0, 2, 3, 1).numpy(), strict=True)
        similarity = [structural_similarity(a, b, channel_axis=2, data_range=2.0) for a, b in pairs]
        values = psnr(rebuilt, pixels)
        scores[mode] = {
            "psnr": values.mean().item(),
            "psnr_of_mean_error": psnr(rebuilt.flatten()[None, None, None], pixels.flatten()[None, None, None]).item(),
            "ssim": float(np.mean(similarity)),
            "frechet": e.frechet(rebuilt, pixels),
        }
        shown.append(rebuilt)
    chosen = Random(e.seed).sample(range(len(indices)), 12)
    write_grid(e.out / "reconstruction.png", [pixels[chosen], *(rows[chosen] for rows in shown)])
    return scores


def _captions(e: Evaluation, indices: Sequence[int], templates: Sequence[str]) -> list[str]:
    """A caption for each picture, the templates in turn."""
    about = [e.pictures.about[i] for i in indices]
    wanted = [Wanted(spoken(a.name), a.style, a.colour if a.made else None, a.number) for a in about]
    return [fill(templates[i % len(templates)], w) for i, w in enumerate(wanted)]


def generation(e: Evaluation) -> dict[str, Any]:
    """Generated pictures against the real ones of the same captions, with and without the residual (the second claim).

    What the tokenizer makes of the real ones is the best that a transformer could do.
    """
    indices = e.some("train")
    real, captions = e.pictures.tensor(indices), _captions(e, indices, STYLED_TEMPLATES)
    scores: dict[str, Any] = {"pictures": len(indices), "real": e.judge(real, indices)}
    for mode in ("hybrid", "discrete"):
        rebuilt = e.pipe.reconstruct(real / 2 + 0.5, mode) * 2 - 1
        scores[f"tokenizer_{mode}"] = {"frechet": e.frechet(rebuilt, real)} | e.judge(rebuilt, indices)
    shown = []
    for name, options in (("with_residual", {}), ("without_residual", {"num_inference_steps": 0})):
        drawn = e.draw(captions, **options)
        scores[name] = {"frechet": e.frechet(drawn, real), "psnr_to_real": psnr(drawn, real).mean().item()}
        missed: list[str] = []
        scores[name] |= e.judge(drawn, indices, missed) | {"missed": missed}
        shown.append(drawn)
    write_grid(e.out / "generation.png", [real[:12], *(rows[:12] for rows in shown)])
    return scores


def guidance(e: Evaluation) -> dict[str, Any]:
    """Scores over the strength of guidance."""
    indices = e.some("train", min(e.count, 128))
    captions, scores = _captions(e, indices, STYLED_TEMPLATES), {}
    for scale in (0.0, 1.0, 2.0, 3.0, 4.5):
        drawn = e.draw(captions, guidance_scale=scale)
        scores[str(scale)] = e.judge(drawn, indices) | {"psnr_to_real": psnr(drawn, e.pictures.tensor(indices)).mean().item()}
    return scores


def prompts(e: Evaluation) -> dict[str, Any]:
    """Known subjects in wordings that no training caption has."""
    return _worded(e, HELD_OUT_TEMPLATES)


def fresh_prompts(e: Evaluation) -> dict[str, Any]:
    """The same in eight others, by which the text encoder's training was judged too."""
    return _worded(e, FRESH_TEMPLATES)


def _worded(e: Evaluation, templates: Sequence[str]) -> dict[str, Any]:
    indices, missed = e.some("train"), []
    drawn = e.draw(_captions(e, indices, templates))
    scores = {
        "pictures": len(indices),
        "drawn": e.judge(drawn, indices, missed),
        "real": e.judge(e.pictures.tensor(indices), indices),
        "drawn_for_others": e.judge(drawn, indices[1:] + indices[:1]),
        "chance": {"subject": 1 / len(e.subjects), "subject_in_five": 5 / len(e.subjects), "style": 1 / len(STYLE_NAMES)},
        "missed": missed,
    }
    for number, template in enumerate(templates):
        chosen = [place for place, i in enumerate(indices) if i % len(templates) == number]
        if chosen:
            scores[template] = e.judge(drawn[chosen], [indices[place] for place in chosen])
    return scores


def plain(e: Evaluation) -> dict[str, Any]:
    """Known subjects without a style: by name, in a new wording, and by one keyword that isn't in the name."""
    indices = [i for i in e.some("train", 10**6) if e.pictures.about[i].plain][: e.count]
    meant = Counter(
        word for a in e.pictures.about if a.style == STYLE_NAMES[0] and not a.made for word in {*a.keywords, a.name}
    )
    keywords = {i: [w for w in a.keywords if w not in a.name and meant[w] == 1] for i in indices if (a := e.pictures.about[i])}
    telling = [i for i in indices if keywords[i]]
    cases = {
        "training wordings": (indices, _captions(e, indices, PLAIN)),
        "a new wording": (indices, _captions(e, indices, ("{a}, please",))),
        "a keyword": (telling, [keywords[i][0] for i in telling]),
    }
    scores: dict[str, Any] = {}
    for name, (chosen, captions) in cases.items():
        missed: list[str] = []
        scores[name] = {"pictures": len(chosen), **e.judge(e.draw(captions), chosen, missed), "missed": missed}
    return scores


def unseen(e: Evaluation) -> dict[str, Any]:
    """Known subjects in a style that they were held out in."""
    known = {a.name for a in e.pictures.about if a.split == "train"}
    indices = [i for i in e.some("style", 10**6) if e.pictures.about[i].name in known][: e.count]
    drawn, real = e.draw(_captions(e, indices, STYLED_TEMPLATES)), e.pictures.tensor(indices)
    write_grid(e.out / "unseen.png", [rows[i : i + 12] for i in (0, 12) for rows in (real, drawn)])
    listed = [f"{e.pictures.about[i].name}, {e.pictures.about[i].style}" for i in indices[:24]]
    return {"pictures": len(indices), "drawn": e.judge(drawn, indices), "real": e.judge(real, indices), "first": listed}


def pairs(e: Evaluation) -> dict[str, Any]:
    """Colours and numbers of subjects that were never shown so: whose picture is nearest to the one that was drawn?

    The composed picture that was held out competes with the same subject in every other colour and number there is of it in
    this style, its own colour among them; by the mean squared error. Chance is one over their number.
    """
    scores: dict[str, Any] = {}
    of_thing: dict[tuple[str, str], list[int]] = {}
    for i, a in enumerate(e.pictures.about):
        of_thing.setdefault((a.name, a.style), []).append(i)
    for kind, wanted in (("colour", lambda a: a.number == 1), ("number", lambda a: a.number > 1)):
        for split in ("composed", "pair"):
            indices = [i for i in e.some(split, 10**6) if wanted(e.pictures.about[i])][: e.count]
            drawn, right, chance = e.draw(_captions(e, indices, STYLED_TEMPLATES)), 0, 0.0
            for picture, i in zip(drawn, indices, strict=True):
                rivals = of_thing[e.pictures.about[i].name, e.pictures.about[i].style]
                errors = (e.pictures.tensor(rivals) - picture).square().mean(dim=(1, 2, 3))
                right += rivals[int(errors.argmin())] == i
                chance += 1 / len(rivals)
            scores[f"{kind}, {'held out' if split == 'pair' else 'trained'}"] = {
                "pictures": len(indices), "right": right / len(indices), "chance": chance / len(indices)
            }  # fmt: skip
            real = e.pictures.tensor(indices[:12])
            write_grid(e.out / f"pairs-{kind}-{split}.png", [real, drawn[:12]])
    return scores


def blind(e: Evaluation) -> dict[str, Any]:
    """A numbered sheet of names at random, to be named by someone who has not seen them; what they are is in the results."""
    known = sorted({a.name for a in e.pictures.about if a.split == "train"} & e.pictures.names)
    names = Random(e.seed).sample(known, min(48, len(known)))
    pictures = [
        Image.fromarray(x.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()) for x in e.draw(names)
    ]
    side, label = pictures[0].width, 14
    sheet = Image.new("RGB", (8 * (side + 8), -(-len(names) // 8) * (side + label + 8)), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, 8)
        corner = column * (side + 8), row * (side + label + 8)
        ImageDraw.Draw(sheet).text(corner, str(place + 1), fill="black")
        sheet.paste(picture, (corner[0], corner[1] + label))
    sheet.save(e.out / "blind.png")
    return {"names": names}


def classes(e: Evaluation) -> dict[str, Any]:
    """var-mini: every class once, against the real pictures, and what the tokenizer makes of those."""
    named = [names[0] for names in e.pipe.labels.names]
    of_name = {e.pictures.about[i].name: i for i in e.pictures.split("train") if e.pictures.about[i].style in VAR_STYLES}
    indices = [of_name[name] for name in named]
    real, missed = e.pictures.tensor(indices), []
    scores: dict[str, Any] = {"pictures": len(indices), "real": e.judge(real, indices)}
    rows = {"tokenizer": e.pipe.reconstruct(real / 2 + 0.5) * 2 - 1, "drawn": e.draw(named)}
    for name, pictures in rows.items():
        scores[name] = e.judge(pictures, indices, missed if name == "drawn" else None) | {
            "frechet": e.frechet(pictures, real), "psnr_to_real": psnr(pictures, real).mean().item()
        }  # fmt: skip
    chosen = Random(e.seed).sample(range(len(indices)), 24)
    halves = chosen[:12], chosen[12:]
    write_grid(e.out / "classes.png", [shown[half] for half in halves for shown in (real, rows["drawn"])])
    return scores | {"missed": missed, "shown": [named[i] for i in chosen]}


Part = Callable[[Evaluation], dict[str, Any]]
PARTS: dict[Family, tuple[Part, ...]] = {
    "HART": (reconstruction, generation, guidance, prompts, fresh_prompts, plain, unseen, pairs, blind),
    "VAR": (classes,),
}


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="hart-mini")
    parser.add_argument("--judge", type=Path, default=Path(__file__).parent / "judge.safetensors")
    parser.add_argument("--subjects", type=Path, help="what the model has learned, one name per line (all of them)")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for parts in PARTS.values() for part in parts])
    parser.add_argument("--count", type=int, default=384, help="pictures generated for a score, 24 or more")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    family = find_family(args.model)
    parts = {part.__name__: part for part in PARTS[family]}
    if others := [name for name in args.only or () if name not in parts]:
        raise SystemExit(f"{args.model} is a {family} model, which has no part {others[0]}; it has {', '.join(parts)}.")
    pictures = Pictures(args.data, args.subjects)
    evaluation = Evaluation(pictures, args.out, args.model, args.judge, count=args.count, seed=args.seed)
    path, results = args.out / f"{family.lower()}-results.json", {}
    if path.exists():
        results = json.loads(path.read_text())
    settings = {"model": args.model, "count": args.count, "seed": args.seed, **asdict(evaluation.pipe.defaults)}
    settings |= {"weights": weights_digest(evaluation.pipe.components), "subjects": args.subjects and args.subjects.name}
    for name in args.only or parts:
        results[name] = parts[name](evaluation) | {"settings": settings}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
