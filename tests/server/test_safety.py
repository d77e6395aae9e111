"""The safety model: which prompts it is asked about, how, and what becomes of those that it objects to.

The released ShieldGemma is not here: the network is a small random one, and the chat template repeats the form of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hart_infer.errors import CheckpointNotFoundError, ConfigError
from hart_infer.server import safety
from hart_infer.server.drawing import answer, draw
from hart_infer.server.protocol import Ask, Draw, Drawn, Failed, FromWorker, Row, RowId, Settings
from hart_infer.server.safety import GUIDELINES, Judge, RefusedError
from tests.server import stand_in

TEMPLATE = (
    "{{ bos_token }} Question: {{ messages[-1]['content'] }} Principle: {{ guideline }} "
    "Does it violate the principle? Answer Yes or No."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 2, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in (*GUIDELINES.values(), TEMPLATE, "a cat a bomb") for word in text.split()} | {"Yes", "No"})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<bos>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    network = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            initializer_range=1.0,
        )
    )
    path = tmp_path_factory.mktemp("shield")
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_score_is_the_share_of_yes_after_the_template(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    judge = Judge.load(str(folder), device="cpu", local_files_only=True)
    found = judge.scores("a bomb")
    assert set(found) == set(GUIDELINES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    text = TEMPLATE.replace("{{ bos_token }}", "<bos>").replace("{{ messages[-1]['content'] }}", "a bomb")
    for policy, guideline in GUIDELINES.items():
        words = text.replace("{{ guideline }}", guideline).split()
        ids = torch.tensor([[tokenizer.get_vocab()[word] for word in words]])
        with torch.no_grad():
            logits = network(ids).logits[0, -1].float()
        yes, no = (logits[tokenizer.get_vocab()[answer]] for answer in ("Yes", "No"))
        assert found[policy] == pytest.approx(torch.sigmoid(yes - no).item(), abs=2e-2)
    assert found != judge.scores("a cat")


class Strict(Judge):
    """Finds a bomb dangerous."""

    def __init__(self) -> None:
        self._threshold = 0.5

    def scores(self, text: str) -> dict[str, float]:
        return {"dangerous content": 0.5 if "bomb" in text else 0.49, "harassment": 0.1}


def test_a_refusal_names_the_guideline_and_spares_the_neighbours() -> None:
    model = replace(stand_in.load(), judge=Strict())
    rows = tuple(Row(RowId(place, 0), prompt, place) for place, prompt in enumerate(("a cat", "a bomb")))
    messages: list[FromWorker] = []
    draw(model, Draw(rows, Settings(stand_in.SIDE)), messages.append, lambda row: False)
    refused, drawn = messages
    assert isinstance(drawn, Drawn) and drawn.row == RowId(0, 0)
    assert isinstance(refused, Failed) and refused.reason == "refused"
    expected = "it finds dangerous content in it (score 0.50, limit 0.5). Change the prompt."
    assert refused.message == f"The safety model refuses this prompt: {expected}"
    assert model.pipe.calls == [("a cat",)]


def test_negative_prompts_and_whole_conversations_are_judged() -> None:
    model = replace(stand_in.load(talks=True), judge=Strict())
    messages: list[FromWorker] = []
    settings = Settings(stand_in.SIDE, (("negative_prompt", "a bomb"),))
    draw(model, Draw((Row(RowId(0, 0), "a cat", 0),), settings), messages.append, lambda row: False)
    ask = Ask(RowId(1, 0), ("and then?",), ((("how?",), "First, a bomb"),))
    answer(model, ask, messages.append, lambda row: False)
    assert [each.reason for each in messages if isinstance(each, Failed)] == ["refused", "refused"]
    assert len(messages) == 2


def test_a_judge_that_fails_for_one_row_spares_the_neighbours() -> None:
    class Broken(Strict):
        def scores(self, text: str) -> dict[str, float]:
            if "bomb" in text:
                raise RuntimeError("It is too long.")
            return super().scores(text)

    model = replace(stand_in.load(), judge=Broken())
    rows = tuple(Row(RowId(place, 0), prompt, place) for place, prompt in enumerate(("a cat", "a bomb")))
    messages: list[FromWorker] = []
    draw(model, Draw(rows, Settings(stand_in.SIDE)), messages.append, lambda row: False)
    assert {type(each): each.row.job for each in messages if isinstance(each, Failed | Drawn)} == {Failed: 1, Drawn: 0}


def test_below_the_threshold_nothing_is_refused() -> None:
    Strict().check("a cat")
    with pytest.raises(RefusedError):
        Strict().check("a bomb")


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="takes no guideline"):
        Judge(None, tokenizer, "x")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="takes no guideline"):
        Judge(None, tokenizer, "x")
    with pytest.raises(CheckpointNotFoundError, match=r"The safety model .* can't be loaded"):
        Judge.load(str(tmp_path / "nowhere"), device="cpu", local_files_only=True)
    assert safety.ANSWERS == ("Yes", "No")
