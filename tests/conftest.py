"""Hermetic environment and the checkpoints that most tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before huggingface_hub reads them: no cache, token or proxy of the machine takes part in a test.
_home = tempfile.mkdtemp(prefix="hart-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads wait for each other
os.environ.update(
    HF_HOME=_home,
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    no_proxy="localhost,127.0.0.1,::1",
    NO_PROXY="localhost,127.0.0.1,::1",
)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors

from tests.golden.data import golden  # noqa: E402

if TYPE_CHECKING:
    from hart_infer import HartPipeline


@pytest.fixture(scope="session")
def whole_var_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAR checkpoint in the released layout: 10 classes, 256 px."""
    from tests.released_var import var_tiny

    return var_tiny(tmp_path_factory.mktemp("whole") / "var-tiny")


@pytest.fixture(scope="session")
def hart_tiny() -> Path:
    """A checkpoint in the released layout: llm/ (with EMA weights), tokenizer/, trace-*.safetensors. Read only."""
    return golden("hart-tiny")


@pytest.fixture(scope="session")
def text_tiny() -> Path:
    """A text encoder that fits `hart_tiny`; pads on the right. Read only."""
    return golden("text-tiny-right")


@pytest.fixture(scope="session")
def _pipe(hart_tiny: Path, text_tiny: Path) -> HartPipeline:
    from hart_infer import HartPipeline

    return HartPipeline.from_pretrained(hart_tiny, text_encoder=text_tiny, torch_dtype=torch.float32, device="cpu")


@pytest.fixture
def pipe(_pipe: HartPipeline) -> Iterator[HartPipeline]:
    """`hart_tiny` (EMA weights) with `text_tiny`, fp32, CPU, no bar; loaded once, so leave dtype and weights alone."""
    _pipe.set_progress_bar_config(disable=True)
    _pipe.enable_decoder_tiling(None)
    yield _pipe
