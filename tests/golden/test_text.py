"""Prompts to contexts."""

from __future__ import annotations

import json
import warnings
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hart_infer.checkpoints.text_encoder import load_text_encoder
from hart_infer.models.text import system_prompt

from .data import TEXT_ENCODERS, golden, golden_root
from .recorded import FED, relative

pytestmark = pytest.mark.golden

every_case = pytest.mark.parametrize(
    ("name", "limit", "system"),
    [(name, limit, system) for name in TEXT_ENCODERS for limit in (12, 300) for system in (True, False)],
)


@cache
def load(name):
    path = golden(name) / "trace.safetensors"
    with safe_open(path, "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    return load_text_encoder(golden(name), dtype=torch.float32), prompts, load_file(path)


def key(limit, system, what):
    return f"{limit}.{'system' if system else 'plain'}.{what}"


@cache
def encode(name, limit, system):
    encoder, prompts, _ = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one prompt is longer than 12 tokens
        return encoder.encode(prompts, context_tokens=limit, use_system_prompt=system)


@every_case
def test_context(name, limit, system):
    """The system prompt is cut to the same limit, and default positions count the padding."""
    assert relative(encode(name, limit, system).context, load(name)[2][key(limit, system, "context")]) <= FED


@every_case
def test_mask_and_positions(name, limit, system):
    embeds, trace = encode(name, limit, system), load(name)[2]
    assert torch.equal(embeds.mask, trace[key(limit, system, "mask")])
    assert torch.equal(embeds.position_ids, trace[key(limit, system, "position_ids")])


@every_case
def test_tokens(name, limit, system):
    """What the model is run on behind the system prompt: padded on the tokenizer's side, truncated to the limit."""
    encoder, prompts, trace = load(name)
    seen = []
    hook = encoder.model.embed_tokens.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder.encode(prompts, context_tokens=limit, use_system_prompt=system)
    finally:
        hook.remove()
    assert torch.equal(seen[-1], trace[key(limit, system, "tokens")])


def test_system_prompt():
    recorded = golden_root() / "system_prompt.txt"
    if not recorded.exists():
        pytest.skip("the system prompt's original is only in the full golden set")
    assert system_prompt() == recorded.read_text(encoding="utf-8")
