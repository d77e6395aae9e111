"""VAR from the seed alone: every index the recorded one, f_hat and picture within the tolerance of a whole run."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from .recorded import relative
from .recorded_var import RUNS, TIE, Run, error, generate_as_recorded, load_autoencoder, load_model, load_trace

pytestmark = pytest.mark.golden

every_run = pytest.mark.parametrize(("checkpoint", "name"), RUNS)
HARD_PICTURE, SMOOTH_PICTURE = 1 / 255, 1e-2  # of values in 0..1


@cache
def run(checkpoint: str, name: str) -> Run:
    return generate_as_recorded(load_model(checkpoint), load_trace(checkpoint, name), tie=TIE.get((checkpoint, name)))


@every_run
def test_indices(checkpoint, name):
    trace = load_trace(checkpoint, name)
    for scale, indices in enumerate(run(checkpoint, name).indices):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"


@every_run
def test_f_hat(checkpoint, name):
    """At scales 0, 3 and 6 all channels are recorded, else the first."""
    trace = load_trace(checkpoint, name)
    limit = error(checkpoint, trace)
    f_hats = run(checkpoint, name).f_hats
    assert relative(f_hats[-1], trace["f_hat"]) <= limit
    for scale, f_hat in enumerate(f_hats):
        recorded = trace.at(scale, "f_hat")
        assert recorded.shape[1] == (8 if scale in (0, 3, 6) else 1)
        assert relative(f_hat[:, : recorded.shape[1]], recorded) <= limit, f"scale {scale}"


@every_run
def test_image(checkpoint, name):
    """Of the mixtures of var-tiny-shared one pixel in a thousand may be further off, as its f_hat is: to three times."""
    trace, autoencoder = load_trace(checkpoint, name), load_autoencoder(checkpoint)
    with torch.inference_mode():
        image = (autoencoder.decode(run(checkpoint, name).f_hats[-1]) + 1) / 2
    errors = (image - trace["image"].float() / 65535).abs().flatten()
    if (checkpoint, name) == ("var-tiny-shared", "smooth"):
        assert (errors > SMOOTH_PICTURE).float().mean() <= 1e-3
        assert errors.max() <= 3 * SMOOTH_PICTURE
    else:
        assert errors.max() <= (SMOOTH_PICTURE if trace.settings.more_smooth else HARD_PICTURE)
