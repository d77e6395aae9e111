"""The parts of a hart-mini in training, put together as the pipeline that will run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from model import AUTOENCODER, DEFAULTS, TRANSFORMER
from text_encoder import build_text_encoder
from torch import nn
from training import save
from transformers import PreTrainedTokenizerFast

from hart_infer import HartPipeline
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder

TOKENIZER, TRANSFORMER_STATE, WORDS = "tokenizer-final.pt", "transformer.pt", "text_tokenizer"


def assemble(out: Path) -> HartPipeline:
    """The trained tokenizer in `out` with a transformer and a text encoder of random weights, fp32."""
    autoencoder = Autoencoder(AUTOENCODER)
    autoencoder.load_state_dict(torch.load(out / TOKENIZER, weights_only=True))
    transformer = HartTransformer(TRANSFORMER, vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    text_encoder = build_text_encoder(PreTrainedTokenizerFast.from_pretrained(out / WORDS))
    pipe = HartPipeline(
        transformer, autoencoder.eval().requires_grad_(False), text_encoder, name="hart-mini", defaults=DEFAULTS
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer_hash(out: Path) -> str:
    """Tells one trained tokenizer in `out` from another: a transformer knows the codes of one."""
    return hashlib.sha256((out / TOKENIZER).read_bytes()).hexdigest()[:12]


def trained(out: Path) -> dict[str, Any]:
    """What train_transformer.py wrote to `out`; SystemExit where the tokenizer there is another one by now."""
    state: dict[str, Any] = torch.load(out / TRANSFORMER_STATE, weights_only=True)
    if state.get("tokenizer", tokenizer_hash(out)) != tokenizer_hash(out):
        raise SystemExit(
            f"{out / TRANSFORMER_STATE} was trained on another tokenizer than {TOKENIZER}: give each its own folder."
        )
    return state


def learned(pipe: HartPipeline) -> nn.ModuleDict:
    """What is trained on top of the tokenizer."""
    assert pipe.text_encoder is not None
    return nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder.model})


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take_over(model: str, out: Path) -> HartPipeline:
    """Load a saved pipeline, and write its tokenizers to `out`, from where `assemble` takes them."""
    pipe = HartPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
    assert pipe.text_encoder is not None
    state = pipe.autoencoder.state_dict()
    if (out / TOKENIZER).exists() and not _same(torch.load(out / TOKENIZER, weights_only=True), state):
        raise SystemExit(f"{out} has a tokenizer already, which {model}'s would take the place of: give an empty folder.")
    save(out / TOKENIZER, state)
    pipe.text_encoder.tokenizer.save_pretrained(out / WORDS)
    return pipe
