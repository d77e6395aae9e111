"""Images to hybrid tokens and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .data import golden
from .recorded import FED, HARD, load_model, relative

pytestmark = pytest.mark.golden

HYBRID = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln")
every_tokenizer = pytest.mark.parametrize("checkpoint", [*HYBRID, "hart-tiny-var"])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def load(checkpoint):
    return load_model(checkpoint).autoencoder, load_file(golden(checkpoint) / "trace-tokenizer.safetensors")


@every_tokenizer
def test_latent(checkpoint):
    autoencoder, trace = load(checkpoint)
    assert relative(autoencoder.encode_latent(trace["image"]), trace["latent"]) <= FED


@pytest.mark.parametrize(
    ("checkpoint", "kind"),
    [*((name, kind) for name in HYBRID for kind in ("discrete", "hybrid")), ("hart-tiny-var", "discrete")],
)
def test_indices(checkpoint, kind):
    autoencoder, trace = load(checkpoint)
    tokens = autoencoder.quantizer.encode(trace["latent"])
    for scale, indices in enumerate(tokens.indices):
        assert torch.equal(indices, trace[f"{kind}.indices{scale}"]), f"scale {scale}"


@every_tokenizer
def test_next_inputs_of_teacher_forcing(checkpoint):
    autoencoder, trace = load(checkpoint)
    quantizer = autoencoder.quantizer
    codes = [quantizer.embed(trace[f"discrete.indices{scale}"]) for scale in range(len(quantizer.patch_nums))]
    inputs = torch.cat([latent.flatten(2).transpose(1, 2) for latent in quantizer.inputs(codes)], dim=1)
    assert relative(inputs, trace["discrete.ar_input"]) <= FED


@pytest.mark.parametrize("checkpoint", HYBRID)
def test_residual(checkpoint):
    """The hybrid's continuous target: what remains before the last scale's code."""
    autoencoder, trace = load(checkpoint)
    residual = autoencoder.quantizer.encode(trace["latent"]).residual.flatten(2).transpose(1, 2)
    assert relative(residual, trace["hybrid.last_scale_continuous"]) <= FED


@every_tokenizer
def test_continuous_reconstruction(checkpoint):
    autoencoder, trace = load(checkpoint)
    assert relative(autoencoder.decode(trace["latent"]), trace["continuous.reconstruction"]) <= FED


@every_tokenizer
def test_discrete_reconstruction(checkpoint):
    """The sum of all scales' codes, with a residual convolution at the last scale too, in both tokenizers."""
    autoencoder, trace = load(checkpoint)
    quantizer = autoencoder.quantizer
    codes = [quantizer.embed(trace[f"discrete.indices{scale}"]) for scale in range(len(quantizer.patch_nums))]
    assert relative(autoencoder.decode(quantizer.discrete(codes)), trace["discrete.reconstruction"]) <= FED


@every_tokenizer
@pytest.mark.parametrize(("mode", "key"), [("hybrid", "continuous"), ("discrete", "discrete")])
def test_reconstruct(checkpoint, mode, key):
    """From the image alone; the encoder's rounding goes through the decoder here."""
    autoencoder, trace = load(checkpoint)
    assert relative(autoencoder.reconstruct(trace["image"], mode), trace[f"{key}.reconstruction"]) <= HARD
