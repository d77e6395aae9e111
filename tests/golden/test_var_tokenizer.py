"""A picture to VAR's codes and back."""

from __future__ import annotations

import pytest
import torch

from hart_infer.generation.schedule import Settings

from .recorded import FED, HARD, relative
from .recorded_var import load_autoencoder, load_model, tokenizer_trace

pytestmark = pytest.mark.golden


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_latent():
    autoencoder, trace = load_autoencoder("var-tiny"), tokenizer_trace()
    assert relative(autoencoder.encode_latent(trace["image"]), trace["latent"]) <= FED


def test_indices():
    tokens = load_model("var-tiny").quantizer.encode(tokenizer_trace()["latent"])
    for scale, indices in enumerate(tokens.indices):
        assert torch.equal(indices, tokenizer_trace()[f"scale{scale}.indices"]), f"scale {scale}"


def test_indices_of_the_picture():
    """Through the encoder, whose rounding no code is near enough to a border for."""
    autoencoder, trace = load_autoencoder("var-tiny"), tokenizer_trace()
    for scale, indices in enumerate(autoencoder.encode(trace["image"]).indices):
        assert torch.equal(indices, trace[f"scale{scale}.indices"]), f"scale {scale}"


def test_reconstruction_of_the_codes():
    """The sum of all scales' codes, each refined, the last one too."""
    autoencoder, trace = load_autoencoder("var-tiny"), tokenizer_trace()
    codes = [autoencoder.quantizer.embed(trace[f"scale{scale}.indices"]) for scale in range(10)]
    assert relative(autoencoder.decode(autoencoder.quantizer.discrete(codes)), trace["reconstruction"]) <= FED


def test_reconstruct():
    autoencoder, trace = load_autoencoder("var-tiny"), tokenizer_trace()
    assert relative(autoencoder.reconstruct(trace["image"], "discrete"), trace["reconstruction"]) <= HARD


def test_the_sum_of_codes_is_what_generation_adds_up():
    """Given the recorded codes: one sum, of tokenizer and of generation; HART's differ in the last scale."""
    model, trace = load_model("var-tiny"), tokenizer_trace()
    codes = [model.quantizer.embed(trace[f"scale{scale}.indices"]) for scale in range(10)]
    added = sum(model.quantizer.contribution(codes[stage.index], stage.phi) for stage in model.schedule(Settings()))
    assert relative(added, model.quantizer.discrete(codes)) <= FED
