"""The compiled kernels' library where there is none, or one of another version, or for other GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hart_infer.errors import BackendError
from hart_infer.ops import cuda as extension
from hart_infer.ops.cuda import library
from hart_infer.ops.registry import Where

HOPPER = Where("cuda", torch.bfloat16, (9, 0))


@pytest.fixture(autouse=True)
def forgotten():
    """Loading is remembered."""
    forget = library.load.cache_clear  # a test may put something else in its place
    forget()
    yield
    forget()


def built_for(targets: str, trial: int = 0) -> library.Library:
    """A library without kernels, whose `trial` ends so."""
    made = object.__new__(library.Library)
    made.targets = targets
    made._c = SimpleNamespace(hart_infer_trial=lambda: trial, hart_infer_error=lambda code: f"error {code}".encode())
    return made


@pytest.mark.parametrize(
    ("targets", "runs", "fails"),
    [
        ("80 86 89 90+PTX", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("86 90", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("90+PTX", [(9, 0), (10, 0)], [(8, 9)]),
        ("100 120+PTX", [(10, 3), (12, 0)], [(9, 0), (11, 0)]),
    ],
)
def test_where_a_library_runs(targets, runs, fails):
    made = built_for(targets)
    assert all(made.runs_on(capability) for capability in runs)
    assert not any(made.runs_on(capability) for capability in fails)


def test_without_a_library(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FILE", tmp_path / "_kernels.so")
    monkeypatch.setattr(library, "REASON", tmp_path / "_kernels.absent")
    reason = extension.refusal(HOPPER)
    assert "absent (to build it: " in reason and "HART_INFER_BUILD_CUDA=1" in reason
    assert extension.describe() == reason
    with pytest.raises(BackendError, match="absent"):
        extension.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)


def test_without_a_library_the_build_said_why(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FILE", tmp_path / "_kernels.so")
    monkeypatch.setattr(library, "REASON", tmp_path / "_kernels.absent")
    library.REASON.write_text("nvcc was not found\n")
    assert "absent (when this package was built, nvcc was not found; to build it: " in extension.describe()


def test_what_is_no_library_says_so_but_not_where_it_lies(monkeypatch, tmp_path):
    file = tmp_path / "_kernels.so"
    file.write_text("not a library")
    monkeypatch.setattr(library, "FILE", file)
    assert "can't be used (_kernels.so: " in extension.describe()


def test_refusals(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: built_for("80 90"))
    assert extension.refusal(HOPPER) is None
    assert extension.describe() == "built for sm_80, sm_90"
    assert "float64 is not supported" in extension.refusal(Where("cuda", torch.float64, (9, 0)))
    assert "built for 80 90" in extension.refusal(Where("cuda", torch.float16, (12, 0)))
    assert "NVIDIA" in extension.refusal(Where("mps", torch.float16))
    monkeypatch.setattr(library, "load", lambda: built_for("host"))
    assert extension.refusal(Where("cpu", torch.float16)) is None
    assert "for tests" in extension.refusal(HOPPER)


def test_a_library_that_the_driver_does_not_take_is_left_alone(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: built_for("90+PTX", trial=35))
    assert extension.refusal(HOPPER) == "the compiled extension can't be used (error 35)"


def test_want_of_memory_at_the_first_launch_is_not_remembered(monkeypatch):
    full = built_for("90", trial=2)
    monkeypatch.setattr(library, "load", lambda: full)
    with pytest.raises(torch.OutOfMemoryError):
        extension.refusal(HOPPER)
    full._c.hart_infer_trial = lambda: 0
    assert extension.refusal(HOPPER) is None
