"""The comparison of a quantised model with the exact one: whose contexts it draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def test_contexts_are_those_of_the_prompts_or_random_ones(script: Any, tmp_path: Path) -> None:
    config = SimpleNamespace(context_token=8, context_dim=4)
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=config), encode_prompt=str.upper)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    assert script.contexts(pipe, prompts, 8) == ["A CAT", "A DOG"] and script.contexts(pipe, prompts, 1) == ["A CAT"]
    one, other = script.contexts(pipe, None, 2)
    assert one.context.shape == (1, 8, 4) and not one.context.equal(other.context)
    prompts.write_text("\n")
    with pytest.raises(SystemExit, match="has no prompts"):
        script.contexts(pipe, prompts, 1)
