"""VILA-U's Llama, depth transformer and loops against what the released code computed: every code and token from the seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hart_infer.generation.next_token import (
    AnswerSettings,
    AnswerState,
    KeptPrefix,
    Networks,
    answer,
    finish,
    run_position,
    run_token,
    splice_images,
    start,
    token_limit,
)
from hart_infer.generation.sampling import (
    CodeRule,
    GeneratorTokenSampler,
    GreedySampler,
    TextRule,
    TokenRule,
)
from hart_infer.models.llama import Llama, LlamaConfig, linear_rope_factor
from hart_infer.models.vila_u.depth import DepthConfig, DepthTransformer
from hart_infer.models.vila_u.projector import Projector
from hart_infer.ops.logits import blend

from .data import golden
from .recorded import FED, relative

pytestmark = pytest.mark.golden
TINY, WIDE = "vila-u-tiny", "vila-u-tiny-384"
DRAWN = [(TINY, "image"), (TINY, "image-cfg1"), (TINY, "video"), (WIDE, "image")]
ANSWERED = [(TINY, name) for name in ("image", "sampled", "eos", "two", "video")] + [(WIDE, "image")]
RENAMES = {
    r"(?:model\.)?(embed_tokens|norm|lm_head)\.(.*)": r"\1.\2",
    r"model\.layers\.(\d+)\.input_layernorm\.(.*)": r"layers.\1.attn_norm.\2",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.(.*)": r"layers.\1.mlp_norm.\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(.*)": r"layers.\1.attn.proj.\2",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)": r"layers.\1.attn.\2.\3",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(.*)": r"layers.\1.mlp.\2.\3",
    r"in_mlp_1\.(.*)": r"code_embed.\1",
    r"in_mlp_2\.(.*)": r"hidden_embed.\1",
    r"pos_emb_d": r"slot_embed",
    r"head_transformer\.blocks\.(\d+)\.ln1\.(.*)": r"blocks.\1.attn_norm.\2",
    r"head_transformer\.blocks\.(\d+)\.ln2\.(.*)": r"blocks.\1.mlp_norm.\2",
    r"head_transformer\.blocks\.(\d+)\.attn\.proj\.(.*)": r"blocks.\1.attn.proj.\2",
    r"head_transformer\.blocks\.(\d+)\.attn\.(q|k|v)(?:uery|ey|alue)\.(.*)": r"blocks.\1.attn.\2.\3",
    r"head_transformer\.blocks\.(\d+)\.mlp\.0\.(.*)": r"blocks.\1.fc1.\2",
    r"head_transformer\.blocks\.(\d+)\.mlp\.2\.(.*)": r"blocks.\1.fc2.\2",
    r"classifier_mlp\.layer_norm\.(.*)": r"norm.\1",
    r"classifier_mlp\.linear\.(.*)": r"classifier.\1",
    r"layers\.0\.(weight|bias)": r"layers.0.\1",
    r"layers\.2\.(weight|bias)": r"layers.1.\1",
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def renamed(name: str) -> str:
    (found,) = (match.expand(ours) for theirs, ours in RENAMES.items() if (match := re.fullmatch(theirs, name)))
    return found


def read(file: Path, prefix: str, *, merged: bool) -> dict[str, Tensor]:
    """Tensors below `prefix` in fp32 under our names; q, k and v in one, if `merged`."""
    stored = {renamed(n.removeprefix(prefix)): t.float() for n, t in load_file(file).items() if n.startswith(prefix)}
    if not merged:
        return stored
    state = {name: tensor for name, tensor in stored.items() if not re.search(r"attn\.[qkv]\.", name)}
    for name in stored:
        if ".attn.q." in name:
            parts = [stored[name.replace(".q.", f".{part}.")] for part in "qkv"]
            state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


@cache
@torch.inference_mode(False)
def load_networks(checkpoint: str) -> Networks:
    folder = golden(checkpoint)
    said = json.loads((folder / "llm" / "config.json").read_text())
    fields = {name: said[name] for name in LlamaConfig.__dataclass_fields__ if name in said}
    config = LlamaConfig(**fields, rope_factor=linear_rope_factor(said["rope_scaling"]))
    llama = Llama(config)
    llama.load_state_dict(read(folder / "llm" / "model.safetensors", "", merged=config.is_merged))
    said = json.loads((folder / "vision_tower" / "config.json").read_text())["rqtransformer"]
    depth = DepthTransformer(
        DepthConfig(
            num_slots=said["block_size"][2],
            code_dim=said["input_embed_dim_1"],
            hidden_size=said["input_embed_dim_2"],
            embed_dim=said["embed_dim"],
            num_layers=said["head"]["n_layer"],
            num_heads=said["head"]["block"]["n_head"],
            vocab_size=said["vocab_size"],
        )
    )
    tower = folder / "vision_tower" / "model.safetensors"
    weights = read(tower, "rqtransformer.", merged=True)
    depth.load_state_dict(weights | {"slot_embed": weights["slot_embed"][0]})
    kind = json.loads((folder / "mm_projector" / "config.json").read_text())["mm_projector_type"]
    projector = Projector(kind, code_dim=said["input_embed_dim_1"], hidden_size=said["input_embed_dim_2"])
    projector.load_state_dict(read(folder / "mm_projector" / "model.safetensors", "", merged=False))
    name = "rqvaesiglip.quantizer.codebooks.{}.weight"
    tensors = load_file(tower)
    codebooks = [tensors.get(name.format(d), tensors[name.format(0)]).float() for d in range(depth.config.num_slots)]
    modules = [module.eval().requires_grad_(False) for module in (llama, depth, projector)]
    return Networks(*modules, lambda codes, slot: F.embedding(codes, codebooks[slot]))


@dataclass(frozen=True)
class Trace:
    tensors: dict[str, Tensor]
    said: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def prompts(self) -> tuple[list[int], list[int]]:
        """The ids of the prompt and of the unconditional one, without padding."""
        ids, mask = self["input_ids"], self["attention_mask"]
        assert all(torch.equal(ids[0], row) for row in ids[: len(ids) // 2])
        return ids[0][mask[0]].tolist(), ids[-1][mask[-1]].tolist()

    def rule(self) -> CodeRule:
        rule = CodeRule(guidance_scale=float(self.said["cfg"]))
        assert (rule.top_k, rule.top_p, self.said["temperature"]) == (int(self.said["top_k"]), float(self.said["top_p"]), "1.0")
        return rule

    def settings(self, *, max_new_tokens: int | None = None) -> AnswerSettings:
        return AnswerSettings(
            max_new_tokens=max_new_tokens or int(self.said["max_new_tokens"]),
            eos_token_ids=(int(self.said["eos_token_id"]),),
            temperature=float(self.said["temperature"]),
            rule=TextRule(top_k=int(self.said["top_k"]), top_p=float(self.said["top_p"])),
        )


@cache
def load_trace(checkpoint: str, name: str) -> Trace:
    file = golden(checkpoint) / f"trace-{name}.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    return Trace(load_file(file), said)


class Listening(GeneratorTokenSampler):
    """Keeps the guided logits of every draw."""

    def __init__(self, seed: int, images: int) -> None:
        super().__init__([seed], images_per_seed=images)
        self.guided: list[Tensor] = []

    def draw(self, logits: Tensor, rule: TokenRule, step: int) -> Tensor:
        assert step == len(self.guided)
        guided = blend(logits, rule.guidance_scale) if len(logits) > self.batch_size else logits
        self.guided.append(guided.clone())
        return super().draw(logits, rule, step)


@pytest.mark.parametrize(("checkpoint", "name"), DRAWN)
def test_every_code_is_drawn_from_the_seed(checkpoint: str, name: str) -> None:
    networks, trace = load_networks(checkpoint), load_trace(checkpoint, name)
    images, recorded = int(trace.said["n"]), trace["codes"].long()
    conditional, unconditional = trace.prompts()
    sampler = Listening(int(trace.said["seed"]), images)
    prefix = KeptPrefix().get(networks.llama, unconditional)
    state = start(networks, [conditional], prefix, sampler, trace.rule(), num_positions=recorded.shape[1])
    places = trace["positions"].tolist()
    for position in range(recorded.shape[1]):
        run_position(state)
        assert torch.equal(state.codes[-1], recorded[:, position]), position
        if position not in places:
            continue
        at = places.index(position)
        rows = len(state.hidden_states)  # without guidance the conditional half alone
        assert relative(state.hidden_states, trace["hidden"][:rows, at]) < FED
        guided = torch.stack(sampler.guided[-recorded.shape[2] :], dim=1)
        assert relative(guided, trace["guided_logits"][:, at]) < FED
        assert relative(networks.projector(state.features[-1]), trace["projected"][:, at]) < FED
    codes, features = finish(state)
    assert torch.equal(codes, recorded)
    if "features" in trace.tensors:
        assert relative(features, trace["features"].flatten(1, 2)) < FED


@pytest.mark.parametrize("checkpoint", [TINY, WIDE])
def test_depth_logits_of_given_codes(checkpoint: str) -> None:
    networks, trace = load_networks(checkpoint), load_trace(checkpoint, "tokenizer")
    hidden, codes = trace["depth.hidden"].flatten(0, 1), trace["depth.codes"].long().flatten(0, 1)
    depth, cache = networks.depth, networks.depth.new_cache(len(hidden))
    logits, total = [depth.step(depth.embed_hidden(hidden), 0, cache)], torch.zeros(())
    for slot in range(1, depth.config.num_slots):
        total = total + networks.embed_code(codes[:, slot - 1], slot - 1)
        logits.append(depth.step(depth.embed_codes(total, slot), slot, cache))
    assert relative(torch.stack(logits, dim=1), trace["depth.logits"].flatten(0, 1)) < FED


def prompt_of(networks: Networks, trace: Trace) -> Tensor:
    """The question's input embeddings, its pictures given by their recorded codes."""
    codes = trace["codes"].long()  # [N, T, D]
    features = sum(networks.embed_code(codes[..., slot], slot) for slot in range(codes.shape[-1]))
    if "features" in trace.tensors:
        assert relative(features, trace["features"]) < FED
    return splice_images(networks.llama, trace["input_ids"].tolist(), networks.projector(features))


@pytest.mark.parametrize(("checkpoint", "name"), ANSWERED)
def test_every_token_of_an_answer(checkpoint: str, name: str) -> None:
    networks, trace = load_networks(checkpoint), load_trace(checkpoint, f"understand-{name}")
    prompt = prompt_of(networks, trace)
    if "inputs_embeds" in trace.tensors:
        assert relative(prompt[None], trace["inputs_embeds"]) < FED
    llama, length = networks.llama, len(prompt)
    positions = torch.arange(length)[None]
    hidden = llama(prompt[None], positions, llama.new_cache(rows=1, length=length).at(0, length))
    assert relative(llama.logits(hidden[:, -4:]), trace["logits_last"]) < FED
    seed = trace.said["seed"]
    sampler = GreedySampler() if seed == "none" else GeneratorTokenSampler([int(seed)])
    tokens = list(answer(llama, prompt, trace.settings(), sampler))
    assert tokens == trace["tokens"][1:].tolist()  # recorded behind a BOS that was never fed
    assert (tokens[-1] == int(trace.said["eos_token_id"])) == (name == "eos")


def test_an_explicit_limit_is_kept_and_overrides_max_length() -> None:
    networks, trace = load_networks(TINY), load_trace(TINY, "understand-image")
    prompt, recorded = prompt_of(networks, trace), trace["tokens"][1:].tolist()
    for limit in (1, 5):
        settings = trace.settings(max_new_tokens=token_limit(limit, 4096))
        assert list(answer(networks.llama, prompt, settings, GreedySampler())) == recorded[:limit]


def test_an_answer_can_be_stepped() -> None:
    networks, trace = load_networks(TINY), load_trace(TINY, "understand-image")
    state = AnswerState(networks.llama, prompt_of(networks, trace), trace.settings(), GreedySampler())
    tokens = []
    while not state.is_done:
        tokens.append(run_token(state))
    assert tokens == state.tokens == trace["tokens"][1:].tolist()
