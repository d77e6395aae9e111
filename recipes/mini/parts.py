"""The parts of a hart-mini in training, put together as the pipeline that will run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from model import AUTOENCODER, DEFAULTS, TRANSFORMER
from text_encoder import build_text_encoder
from training import save
from transformers import PreTrainedTokenizerFast

from hart_infer import HartPipeline
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder

TOKENIZER, TEXT, TRANSFORMER_STATE, WORDS = "tokenizer-final.pt", "text-final.pt", "transformer.pt", "text_tokenizer"


def assemble(out: Path) -> HartPipeline:
    """The trained tokenizer and text encoder in `out` with a transformer of random weights, fp32."""
    autoencoder = Autoencoder(AUTOENCODER)
    autoencoder.load_state_dict(torch.load(out / TOKENIZER, weights_only=True))
    transformer = HartTransformer(TRANSFORMER, vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    text_encoder = build_text_encoder(PreTrainedTokenizerFast.from_pretrained(out / WORDS))
    text_encoder.model.load_state_dict(torch.load(out / TEXT, weights_only=True))
    pipe = HartPipeline(
        transformer, autoencoder.eval().requires_grad_(False), text_encoder, name="hart-mini", defaults=DEFAULTS
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts_hash(out: Path) -> str:
    """Tells the trained tokenizer and text encoder in `out` from others: a transformer knows those of one pair alone."""
    return hashlib.sha256((out / TOKENIZER).read_bytes() + (out / TEXT).read_bytes()).hexdigest()[:12]


def trained(out: Path) -> dict[str, Any]:
    """What train_transformer.py wrote to `out`; SystemExit where the tokenizer or the text encoder there is another by now."""
    state: dict[str, Any] = torch.load(out / TRANSFORMER_STATE, weights_only=True)
    if state["parts"] != parts_hash(out):
        raise SystemExit(
            f"{out / TRANSFORMER_STATE} was trained on other parts than {TOKENIZER} and {TEXT}: give each its own folder."
        )
    return state


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take_over(model: str, out: Path) -> HartPipeline:
    """Load a saved pipeline, and write its tokenizer and text encoder to `out`, from where `assemble` takes them."""
    pipe = HartPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
    assert pipe.text_encoder is not None
    for name, state in ((TOKENIZER, pipe.autoencoder.state_dict()), (TEXT, pipe.text_encoder.model.state_dict())):
        if (out / name).exists() and not _same(torch.load(out / name, weights_only=True), state):
            raise SystemExit(f"{out} has a {name} already, which {model}'s would take the place of: give an empty folder.")
        save(out / name, state)
    pipe.text_encoder.tokenizer.save_pretrained(out / WORDS)
    return pipe
