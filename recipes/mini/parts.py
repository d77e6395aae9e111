"""The parts of a hart-mini in training, put together as the pipeline that will run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import AUTOENCODER, DEFAULTS, TRANSFORMER, VAR_DEFAULTS, var_config
from text_encoder import build_text_encoder
from torch import Tensor, nn
from training import Pictures, save
from transformers import PreTrainedTokenizerFast

from hart_infer import HartPipeline, VarPipeline
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.var import VarTransformer
from hart_infer.pipelines.labels import Labels

TOKENIZER, TEXT, WORDS, LATENTS = "tokenizer-final.pt", "text-final.pt", "text_tokenizer", "latents.pt"
MEANINGS = "words.json"  # associate.py's: which subject a word means
PARTS = {"hart": (TOKENIZER, TEXT), "var": (TOKENIZER,)}  # what a transformer's training begins with
STATE = {"hart": "transformer.pt", "var": "var.pt"}  # of a training, to go on from


def load_autoencoder(out: Path) -> Autoencoder:
    """The trained tokenizer in `out`, fp32."""
    autoencoder = Autoencoder(AUTOENCODER)
    autoencoder.load_state_dict(torch.load(out / TOKENIZER, weights_only=True))
    return autoencoder.eval().requires_grad_(False)


def hash_of(pixels: Any, shown: Sequence[int]) -> str:
    """Tells pictures from others: by which they are, and the pixels of every 16th."""
    digest = hashlib.sha256(repr((pixels.shape, list(shown))).encode())
    for index in shown[::16]:
        digest.update(pixels[index].tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def latents_of(out: Path, pictures: Pictures) -> tuple[dict[int, int], Tensor]:
    """The latents of all pictures to learn from: picture -> row, and [N, C, P, P]; kept in OUT/latents.pt."""
    shown = [i for i, about in enumerate(pictures.about) if about.split in ("train", "composed")]
    path, key = out / LATENTS, [parts_hash(out, "var"), hash_of(pictures.pixels, shown)]
    kept = torch.load(path, weights_only=True) if path.exists() else {}
    if kept.get("key") != key:
        autoencoder, parts = load_autoencoder(out), []
        for first in range(0, len(shown), 32):
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(autoencoder.encode_latent(pictures.tensor(shown[first : first + 32])).float())
        kept = {"key": key, "latents": torch.cat(parts)}
        save(path, kept)
    return {picture: row for row, picture in enumerate(shown)}, kept["latents"]


class Meant(NamedTuple):
    """The subject that a word means, the word's share of English text, and how like the two are in meaning, at most 1."""

    name: str
    frequency: float
    likeness: float


def meanings_of(out: Path) -> dict[str, Meant]:
    """What words mean, by associate.py. SystemExit where it has not run."""
    if not (out / MEANINGS).exists():
        raise SystemExit(f"{out} has no {MEANINGS}: run associate.py first.")
    read: dict[str, Any] = json.loads((out / MEANINGS).read_text(encoding="utf-8"))
    if not all(isinstance(meant, list) and len(meant) == len(Meant._fields) for meant in read.values()):
        raise SystemExit(
            f"{out / MEANINGS} lacks frequency or likeness, as an older associate.py's: delete it, and run associate.py again."
        )
    return {word: Meant(*meant) for word, meant in read.items()}


def assemble(out: Path) -> HartPipeline:
    """The trained tokenizer and text encoder in `out` with a transformer of random weights, fp32."""
    transformer = HartTransformer(TRANSFORMER, vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    text_encoder = build_text_encoder(PreTrainedTokenizerFast.from_pretrained(out / WORDS))
    text_encoder.model.load_state_dict(torch.load(out / TEXT, weights_only=True))
    pipe = HartPipeline(transformer, load_autoencoder(out), text_encoder, name="hart-mini", defaults=DEFAULTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble_var(out: Path, names: Sequence[str]) -> VarPipeline:
    """The trained tokenizer in `out` with a transformer of random weights and a class for each name, fp32."""
    transformer = VarTransformer(var_config(len(names)), vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    labels = Labels(len(names), tuple((name,) for name in names))
    pipe = VarPipeline(transformer, load_autoencoder(out), name="var-mini", labels=labels, defaults=VAR_DEFAULTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def learning(pipe: HartPipeline | VarPipeline) -> nn.ModuleDict:
    """What train_transformer.py trains: the transformer, and hart-mini's text encoder with it."""
    encoder = pipe.text_encoder if isinstance(pipe, HartPipeline) else None
    return nn.ModuleDict({"transformer": pipe.transformer} | ({"text": encoder.model} if encoder else {}))


def parts_hash(out: Path, model: str) -> str:
    """Tells what the training of a transformer in `out` began with, the tokenizer and hart-mini's text encoder, from others."""
    return hashlib.sha256(b"".join((out / name).read_bytes() for name in PARTS[model])).hexdigest()[:12]


def trained(out: Path, model: str) -> dict[str, Any]:
    """What train_transformer.py wrote to `out`; SystemExit where it began with other parts."""
    path = out / STATE[model]
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["parts"] != parts_hash(out, model):
        raise SystemExit(f"{path} began with another {' or '.join(PARTS[model])} than is there: give each its own folder.")
    if not all(name.startswith(("transformer.", "text.")) for name in state["average"]):
        raise SystemExit(f"{path} is of an earlier version of this recipe, which can't be gone on from.")
    return state


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts have the same tensors, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take_over(model: str, out: Path) -> HartPipeline:
    """Load a pipeline that `export.py` wrote, and write its tokenizer and text encoder to `out`, for `assemble`.

    SystemExit, and nothing is written, where it is of other sizes.
    """
    pipe = HartPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
    if (pipe.transformer.config, pipe.autoencoder.config) != (TRANSFORMER, AUTOENCODER):
        raise SystemExit(f"{model} has other sizes than model.py: --start-from takes a pipeline that this recipe exported.")
    assert pipe.text_encoder is not None
    for name, state in ((TOKENIZER, pipe.autoencoder.state_dict()), (TEXT, pipe.text_encoder.model.state_dict())):
        if (out / name).exists() and not same(torch.load(out / name, weights_only=True), state):
            raise SystemExit(f"{out} has a {name} already, which {model}'s would take the place of: give an empty folder.")
        save(out / name, state)
    pipe.text_encoder.tokenizer.save_pretrained(out / WORDS)
    return pipe


def finished(out: Path, model: str) -> HartPipeline | VarPipeline:
    """The pipeline of the averaged weights that the training in `out` reached."""
    state = trained(out, model)
    pipe = assemble(out) if model == "hart" else assemble_var(out, state["classes"])
    learning(pipe).load_state_dict(state["average"])
    return pipe
