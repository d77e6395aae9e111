"""Tokenizers run from tokenizer.json alone say what transformers' say, and others are left to transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hart_infer
from hart_infer.checkpoints.text_encoder import load_text_encoder, save_text_encoder
from hart_infer.checkpoints.tokenizer import FileTokenizer, load_tokenizer

MINI = Path(hart_infer.__file__).parent / "assets" / "hart-mini" / "text_encoder"
TEXTS = (
    "", " ", "a cat", "A CAT,  in\tFluent style!", "two cats\n", "ein Hase im Schnee, naïve café", "\u65e5\u672c \U0001f431",
    "a<|pad|>cat", "<|endoftext|>", "x" * 300, "don't 1234", "e\u0301",
)  # fmt: skip
Folder = Callable[..., Path]


@pytest.fixture
def folder(text_tiny: Path, tmp_path: Path) -> Folder:
    """A copy of a tokenizer's folder with other values in tokenizer_config.json."""

    def copy(**changes: object) -> Path:
        target = tmp_path / "text"
        target.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(text_tiny / name, target / name)
        config = json.loads((target / "tokenizer_config.json").read_text()) | changes
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        return target

    return copy


@pytest.mark.parametrize("limit", [None, 1, 2, 7])
@pytest.mark.parametrize("which", ["mini", "tiny"])
def test_it_says_what_transformers_says(text_tiny: Path, which: str, limit: int | None) -> None:
    path = MINI if which == "mini" else text_tiny
    ours, theirs = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    assert isinstance(ours, FileTokenizer)
    for text in TEXTS:
        options = {"truncation": limit is not None, "max_length": limit, "return_offsets_mapping": True}
        expected = theirs(text, **options)
        assert ours(text, **options) == {name: expected[name] for name in ("input_ids", "offset_mapping")}
        assert set(ours(text)) == {"input_ids"} and ours(text)["input_ids"] == theirs(text)["input_ids"], "no limit stays"
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.pad_token_id, ours.padding_side) == (theirs.pad_token_id, theirs.padding_side)


def test_saved_it_is_transformers_too(folder: Folder, tmp_path: Path) -> None:
    ours = load_tokenizer(folder())
    ours.padding_side = "left"
    ours.save_pretrained(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert isinstance(again, FileTokenizer)
    assert again.padding_side == theirs.padding_side == "left"
    assert again.get_vocab() == theirs.get_vocab() == ours.get_vocab()
    assert again("a cat")["input_ids"] == theirs("a cat")["input_ids"] == ours("a cat")["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},  # has rules of its own
        {"add_bos_token": True},
        {"pad_token": "<|new|>"},  # which transformers adds
        {"truncation_side": "left"},
    ],
)
def test_what_is_not_in_the_file_alone_is_left_to_transformers(folder: Folder, changes: dict[str, object]) -> None:
    assert not isinstance(load_tokenizer(folder(**changes)), FileTokenizer)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("special_tokens_map.json", {"pad_token": "<|endoftext|>"}),
        ("added_tokens.json", {"cat": 900}),
        ("tokenizer.json", {"truncation": {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Left"}}),
    ],
)
def test_other_files_and_settings_are_left_to_transformers(folder: Folder, name: str, values: dict[str, object]) -> None:
    file = folder() / name
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(kept | values))
    assert not isinstance(load_tokenizer(file.parent), FileTokenizer)


def test_a_prompt_by_transformers_tokenizer_is_encoded_alike(folder: Folder, text_tiny: Path, tmp_path: Path) -> None:
    whole = load_text_encoder(text_tiny)
    source = folder(truncation_side="right")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(text_tiny / name, source / name)
    theirs = load_text_encoder(source)
    assert isinstance(whole.tokenizer, FileTokenizer) and not isinstance(theirs.tokenizer, FileTokenizer)
    prompts = ["a cat", "a very long prompt"]
    with pytest.warns(UserWarning, match="was cut"):
        ours, other = (e.encode(prompts, context_tokens=6, max_sequence_length=3) for e in (whole, theirs))
    assert torch.equal(ours.context, other.context) and torch.equal(ours.mask, other.mask)
    save_text_encoder(theirs, tmp_path / "saved", max_shard_size="1GB")
    again, expected = (e.encode(["a cat"], context_tokens=6).context for e in (load_text_encoder(tmp_path / "saved"), whole))
    assert torch.equal(again, expected)


def test_drawing_by_hart_mini_imports_no_transformers() -> None:
    loading = "import sys, hart_infer; hart_infer.HartPipeline.from_pretrained('hart-mini')('a cat')"
    code = f"{loading}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
