"""Whether Triton can launch at all: tried once per device and remembered, unless the device was only out of memory."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from hart_infer.ops.registry import Backend, Op, Where

kernels = pytest.importorskip("hart_infer.kernels")
launch = pytest.importorskip("hart_infer.kernels.launch")
HOPPER = Where("cuda", torch.bfloat16, (9, 0))
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]


@pytest.fixture
def trials(monkeypatch):
    """What the next trial launches raise, in order; after the last one they succeed. Nothing is launched."""
    errors: list[Exception] = []
    made: list[int] = []

    def trial(index):
        made.append(index)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(launch, "_trial", trial)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    launch._failure.cache_clear()
    yield types.SimpleNamespace(errors=errors, made=made)
    launch._failure.cache_clear()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_raised_and_not_remembered(error, trials):
    trials.errors.append(error)
    with pytest.raises(type(error)):
        kernels.refusal(HOPPER)
    assert kernels.refusal(HOPPER) is None, "there is memory now"
    assert len(trials.made) == 2


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([], None),
        ([RuntimeError("Failed to find C compiler.\nSet CC.")], "Triton can't launch a kernel (Failed to find C compiler.)"),
        ([OSError()], "Triton can't launch a kernel (OSError)"),
    ],
    ids=["works", "fails", "fails without a message"],
)
def test_every_other_answer_is_remembered(errors, reason, trials):
    trials.errors.extend(errors)
    assert [kernels.refusal(HOPPER) for _ in range(3)] == [reason] * 3
    assert len(trials.made) == 1


def test_an_operation_takes_its_kernel_once_there_is_memory(trials, monkeypatch):
    """The registry remembers a choice: it must not have made one when memory ran out."""
    called: list[torch.Tensor] = []
    module = types.ModuleType("fake_kernels")
    module.refusal = kernels.refusal
    module.double = lambda x: called.append(x) or x + x
    monkeypatch.setitem(sys.modules, "fake_kernels", module)
    monkeypatch.setattr(Where, "of", lambda x: HOPPER)

    def double(x):
        return x * 2

    operation = Op(double, {"triton": Backend("fake_kernels:double")})
    x = torch.ones(1, device="meta", dtype=torch.bfloat16)  # any device but the CPU, which has no choice
    trials.errors.append(OUT_OF_MEMORY[0])
    with pytest.raises(torch.OutOfMemoryError):
        operation(x)
    operation(x)
    assert len(called) == 1, "by the kernel"
