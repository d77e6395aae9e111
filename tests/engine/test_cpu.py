"""Threads of the CPU: one for a small model, and the caller's number again afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from hart_infer import HartPipeline, Step
from hart_infer.engine.cpu import SMALL_MODEL, cpu_threads, threads_for
from hart_infer.pipelines import networks
from tests.pipelines.test_hart import load


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own(hart_tiny: Path, text_tiny: Path) -> HartPipeline:
    return load(hart_tiny, text_tiny, torch.float32)


def threads_in(pipe: HartPipeline) -> set[int]:
    """How many threads a call's text encoder, transformer and decoder have."""
    seen: list[int] = []
    modules = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.decoder)
    hooks = [module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads())) for module in modules]
    pipe("a", callback_on_step_end=lambda step: seen.append(torch.get_num_threads()))
    pipe.encode_prompt("a")
    pipe.reconstruct(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return set(seen)


def test_a_small_model_takes_one(own: HartPipeline) -> None:
    assert own.num_threads == 1
    assert threads_in(own) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("asked", "taken"), [(None, 2), (2, 2), (3, 3)])
def test_the_number_can_be_set(own: HartPipeline, asked: int | None, taken: int) -> None:
    own.num_threads = asked
    assert threads_in(own) == {taken}
    assert torch.get_num_threads() == 2


def test_a_large_model_takes_pytorch_s_number() -> None:
    with torch.device("meta"):
        assert threads_for(nn.Linear(SMALL_MODEL // 1000, 1000)) is None
        assert threads_for(nn.Linear(SMALL_MODEL // 1000 - 2, 1000)) == 1


def test_the_caller_s_number_is_back_after_an_error(own: HartPipeline) -> None:
    def fail(step: Step) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        own("a", callback_on_step_end=fail)
    assert torch.get_num_threads() == 2


def test_other_threads_keep_theirs() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2  # from now on its own
        with cpu_threads(1):
            assert pool.submit(torch.get_num_threads).result() == 2


def test_a_large_model_leaves_the_memory_s_keeping_alone(
    hart_tiny: Path, text_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(networks, "keep_freed_memory", lambda: kept.append(True))
    load(hart_tiny, text_tiny, torch.float32)
    assert kept == [True]
    monkeypatch.setattr(networks, "threads_for", lambda _: None)
    load(hart_tiny, text_tiny, torch.float32)
    assert kept == [True]


PAGE_FAULTS = """
import resource
from hart_infer import HartPipeline

pipe = HartPipeline.from_pretrained("hart-mini", device="cpu")
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pipe("a cat")
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory by rules of their own")
def test_a_small_model_s_next_picture_takes_the_memory_of_the_last() -> None:
    """In a process of its own, as the tests before may have freed large blocks. Without it a later picture takes 3,300 pages
    and more anew; with it the second takes 1,000 to 3,600, and soon one takes none."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    found = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, env=settings)
    assert found.returncode == 0, found.stderr
    assert min(map(int, found.stdout.split()[1:])) < 2000, found.stdout
