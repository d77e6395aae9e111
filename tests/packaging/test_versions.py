"""What other libraries say of our calls, and the bounds on them: `make newest` and `make oldest` run this too.

huggingface_hub and transformers warn of a deprecated argument from wrappers of their own, where pytest's filters by module
don't know the call as ours; of others transformers tells in its log, which loading and saving silence.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from hart_infer import HartPipeline
from hart_infer.checkpoints import tokenizer

DEPRECATED = ("deprecated", "will be removed", "no longer supported")


class Log(logging.Handler):
    """Keeps what is logged at warning level or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def deprecations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is said meanwhile to be deprecated: by warnings, wherever they point, and in transformers' log, unsilenced."""
    found: list[str] = []
    log, logger, verbosity = Log(), logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers' own: each message once in a process
    monkeypatch.setattr(tokenizer, "quiet_transformers", nullcontext)
    transformers.logging.set_verbosity_warning()
    logger.addHandler(log)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        logger.removeHandler(log)
        transformers.logging.set_verbosity(verbosity)
    kinds = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    found += [f"{one.filename}:{one.lineno}: {one.message}" for one in caught if issubclass(one.category, kinds)]
    found += [line for line in log.lines if any(word in line for word in DEPRECATED)]


def test_nothing_that_we_call_is_deprecated(
    hart_tiny: Path, text_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    shutil.copytree(text_tiny, text, copy_function=shutil.copyfile)
    config = json.loads((text / "tokenizer_config.json").read_text())
    (text / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "right"}))  # left to transformers
    with deprecations(monkeypatch) as found:
        pipe = HartPipeline.from_pretrained(hart_tiny, text_encoder=text, torch_dtype=torch.float32, device="cpu")
        pipe(["a cat", "a dog"], negative_prompt="ugly", seed=0)
        pipe.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
        HartPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16, device="cpu")
    assert found == []


def test_a_silenced_line_of_the_log_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = transformers.logging.get_logger("transformers.modeling_utils")
    for _ in range(2):
        with deprecations(monkeypatch) as found, tokenizer.quiet_transformers():
            logger.warning_once("`torch_dtype` is deprecated! Use `dtype` instead!")
            logger.warning("2 prompts were padded.")
        assert found == ["`torch_dtype` is deprecated! Use `dtype` instead!"]


def test_users_get_lower_bounds_only() -> None:
    bounds = [Requirement(line) for line in requires("hart-infer") or [] if "extra ==" not in line]
    assert {bound.name for bound in bounds} >= {"torch", "transformers", "huggingface_hub", "numpy", "safetensors", "pillow"}
    assert all([part.operator for part in bound.specifier] == [">="] for bound in bounds)
