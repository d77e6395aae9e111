"""What VILA-U's loops are compared with, each pair in one process and by turns: re-run depth slots, transformers' Llama.

`depth`: D cached steps of the depth transformer, against what the released loop does: for every slot embed all codes so far and
run all slots again, 1 + 2 + ... + D of them. Both use the same layers, so that only the loop differs.
`language`: a greedy answer of the package, against transformers' own `LlamaForCausalLM` with a static cache, driven by the
shortest loop there is. Both have the same weights; all but q, k and v, which ours has in one matrix, are the same tensors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from vila_u_checkpoint import DTYPES, released_sizes

from hart_infer.generation.next_token import AnswerSettings, AnswerState, embed_prompts, run_token
from hart_infer.generation.sampling import GreedySampler
from hart_infer.models.llama import Llama, LlamaConfig
from hart_infer.models.vila_u.depth import DepthTransformer

Sides = dict[str, Callable[[], Any]]


def by_turns(sides: Sides, repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Run each side once for nothing, then all of them `repeats` times in turn: what they returned last, and their times."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "processor": [], "returned": None} for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            measure.synchronize(device)
            start, processor = time.perf_counter(), time.process_time()
            found[name]["returned"] = run()
            measure.synchronize(device)
            if turn:
                found[name]["seconds"].append(time.perf_counter() - start)
                found[name]["processor"].append(time.process_time() - processor)
    return found


def median(values: list[float]) -> float:
    """The middle one, or the mean of the two."""
    return measure.spread(values)["median"]


# ---- the depth transformer


def cached_slots(depth: DepthTransformer, hidden: Tensor, codes: Tensor) -> Tensor:
    """Hidden states [R, H] and the codes' vectors [R, D, C] -> logits [R, D, K], one cached step a slot, as generation does."""
    cache = depth.new_cache(len(hidden))
    logits, total = [], torch.zeros((), dtype=codes.dtype, device=codes.device)
    for slot in range(depth.config.num_slots):
        x = depth.embed_codes(total, slot) if slot else depth.embed_hidden(hidden)
        logits.append(depth.step(x, slot, cache))
        total = total + codes[:, slot]
    return torch.stack(logits, dim=1)


def rerun_slots(depth: DepthTransformer, hidden: Tensor, codes: Tensor) -> Tensor:
    """The same logits without a cache: for each slot all inputs so far are embedded and run through all blocks."""
    logits = []
    for slot in range(depth.config.num_slots):
        first = depth.hidden_embed(hidden.to(depth.dtype))[:, None]
        later = depth.code_embed(codes[:, :slot].cumsum(dim=1).to(depth.dtype))
        x = torch.cat([first, later], dim=1) + depth.slot_embed[: slot + 1]  # [R, slot + 1, E]
        for block in depth.blocks:
            attention = block.attn
            qkv = attention.qkv(block.attn_norm(x)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
            x = x + attention.proj(attended.transpose(1, 2).flatten(2))
            x = x + block.fc2(F.gelu(block.fc1(block.mlp_norm(x))))
        logits.append(depth.classifier(depth.norm(x[:, -1])).float())
    return torch.stack(logits, dim=1)


def first_slots(depth: DepthTransformer, slots: int) -> DepthTransformer:
    """The depth transformer of fewer slots, with the same weights."""
    with torch.device("meta"):
        fewer = DepthTransformer(released_sizes(slots=slots).depth)
    fewer.load_state_dict(depth.state_dict() | {"slot_embed": depth.slot_embed[:slots]}, assign=True)
    return fewer.eval().requires_grad_(False)


def compare_depth(request: dict[str, Any]) -> dict[str, Any]:
    """In a worker: all dtypes, depths and numbers of rows."""
    torch.set_num_threads(request["threads"])
    device, results = torch.device(request["device"]), []
    torch.manual_seed(0)
    stored = DepthTransformer(released_sizes(slots=max(request["slots"])).depth).eval().requires_grad_(False)
    stored.slot_embed.normal_(std=0.5)
    for dtype in request["dtype"]:
        whole = stored.to(device, DTYPES[dtype]) if dtype == "fp32" else _cast(stored, device, DTYPES[dtype])
        for slots in request["slots"]:
            depth = first_slots(whole, slots)
            for rows in request["rows"]:
                results.append({"dtype": dtype, "slots": slots, "rows": rows, **_one_depth(depth, rows, request["repeats"])})
                print(f"  {depth_line(results[-1])}", file=sys.stderr, flush=True)
    return {"results": results}


def _cast(depth: DepthTransformer, device: torch.device, dtype: torch.dtype) -> DepthTransformer:
    with torch.device("meta"):
        copy = DepthTransformer(depth.config)
    copy.load_state_dict({name: tensor.to(device, dtype) for name, tensor in depth.state_dict().items()}, assign=True)
    return copy.eval().requires_grad_(False)


def _one_depth(depth: DepthTransformer, rows: int, repeats: int) -> dict[str, Any]:
    config, device = depth.config, depth.slot_embed.device
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, config.hidden_size, generator=random).to(device, depth.dtype)
    codes = torch.randn(rows, config.num_slots, config.code_dim, generator=random).to(device)
    sides: Sides = {
        "cached": lambda: cached_slots(depth, hidden, codes),
        "rerun": lambda: rerun_slots(depth, hidden, codes),
    }
    found = by_turns(sides, repeats, device)
    ours, theirs = found["cached"].pop("returned"), found["rerun"].pop("returned")
    return {
        **found,
        "ratio": median(found["cached"]["seconds"]) / median(found["rerun"]["seconds"]),
        "processor_ratio": median(found["cached"]["processor"]) / median(found["rerun"]["processor"]),
        "largest_difference": float((ours - theirs).abs().max()),
        "logits_std": float(theirs.std()),
    }


def depth_line(result: dict[str, Any]) -> str:
    """A result for people."""
    cached, rerun = (median(result[side]["seconds"]) for side in ("cached", "rerun"))
    return (
        f"{result['dtype']}  D {result['slots']:>2}  {result['rows']} rows: cached {cached:7.3f} s, re-run {rerun:7.3f} s, "
        f"ratio {result['ratio']:.3f} (processor time {result['processor_ratio']:.3f}); logits differ by up to "
        f"{result['largest_difference']:.1e}, their std is {result['logits_std']:.2f}"
    )


# ---- the language half


def compare_language(request: dict[str, Any]) -> dict[str, Any]:
    """In a worker: all dtypes."""
    torch.set_num_threads(request["threads"])
    results = [{"dtype": dtype, **_one_language(request, DTYPES[dtype])} for dtype in request["dtype"]]
    return {"results": results}


def _one_language(request: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    device, new = torch.device(request["device"]), request["new_tokens"]
    theirs = transformers_llama(request, dtype, device)
    ours = same_llama(theirs, llama_config(request))
    ids = torch.randint(3, ours.config.vocab_size, (1, request["prompt"]), generator=torch.Generator().manual_seed(0))
    sides: Sides = {
        "ours": lambda: our_answer(ours, ids, new),
        "transformers": lambda: their_answer(theirs, ids.to(device), new),
    }
    found = by_turns(sides, request["repeats"], device)
    answers = {name: side.pop("returned") for name, side in found.items()}
    for name, side in found.items():
        side["first_token_seconds"] = answers[name][1]  # of the last turn
        side["tokens_per_second"] = new / median(side["seconds"])
    pairs = list(zip(answers["ours"][0], answers["transformers"][0], strict=True))
    result = {
        **found,
        "ratio": median(found["ours"]["seconds"]) / median(found["transformers"]["seconds"]),
        "processor_ratio": median(found["ours"]["processor"]) / median(found["transformers"]["processor"]),
        "equal_tokens": next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)),
    }
    print(f"  {language_line({'dtype': str(dtype).removeprefix('torch.'), **result})}", file=sys.stderr, flush=True)
    return result


def llama_config(request: dict[str, Any]) -> LlamaConfig:
    """A Llama of the wanted width and depth, its MLP as much wider as Llama-2-7B's."""
    released = released_sizes().llama
    width = request["width"]
    return LlamaConfig(
        vocab_size=released.vocab_size,
        hidden_size=width,
        intermediate_size=released.intermediate_size * width // released.hidden_size,
        num_hidden_layers=request["layers"],
        num_attention_heads=width // released.head_dim,
        num_key_value_heads=width // released.head_dim,
        rms_norm_eps=released.rms_norm_eps,
    )


def transformers_llama(request: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with random weights, those of transformers' own initialisation."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = llama_config(request)
    known = {name: value for name, value in vars(config).items() if name not in ("rope_factor", "rope_theta")}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(Config(**known, max_position_embeddings=8192, tie_word_embeddings=False))
    finally:
        torch.set_default_dtype(before)
    return model.to(device=device).eval().requires_grad_(False)


def same_llama(theirs: Any, config: LlamaConfig) -> Llama:
    """Our model with the weights of transformers' one."""
    given = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {name: given[name] for name in ("embed_tokens.weight", "norm.weight", "lm_head.weight")}
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}"
        state |= {f"{at}.{name}.weight": given[f"{at}.{released}.weight"] for name, released in norms.items()}
        state |= {f"{at}.mlp.{x}.weight": given[f"{at}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down")}
        state[f"{at}.attn.qkv.weight"] = torch.cat([given[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv"])
        state[f"{at}.attn.proj.weight"] = given[f"{at}.self_attn.o_proj.weight"]
    with torch.device("meta"):
        ours = Llama(config)
    ours.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False)


def our_answer(llama: Llama, ids: Tensor, new: int) -> tuple[list[int], float]:
    """The likeliest tokens, whatever they are, and seconds to the first."""
    start = time.perf_counter()
    settings = AnswerSettings(max_new_tokens=new, eos_token_ids=())
    state = AnswerState(llama, embed_prompts(llama, ids.tolist())[0], settings, GreedySampler())
    run_token(state)
    first = time.perf_counter() - start
    while not state.is_done:
        run_token(state)
    return state.tokens, first


def their_answer(model: Any, ids: Tensor, new: int) -> tuple[list[int], float]:
    """The same of transformers' model; only the last position's logits are asked for."""
    from transformers import StaticCache

    start = time.perf_counter()
    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + new - 1)
    tokens: list[int] = []
    inputs, positions, first = ids, torch.arange(length, device=ids.device), 0.0
    for _ in range(new):
        at = {"position_ids": positions[None], "cache_position": positions}
        found = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **at)
        tokens.append(int(found.logits[:, -1].float().argmax(dim=-1)))
        first = first or time.perf_counter() - start
        inputs, positions = torch.tensor([[tokens[-1]]], device=ids.device), positions[-1:] + 1
    return tokens, first


def language_line(result: dict[str, Any]) -> str:
    """A result for people."""
    ours, theirs = result["ours"], result["transformers"]
    return (
        f"{result['dtype']}: ours {ours['tokens_per_second']:.2f} tokens/s (first after {ours['first_token_seconds']:.2f} s), "
        f"transformers {theirs['tokens_per_second']:.2f} ({theirs['first_token_seconds']:.2f} s), ratio of times "
        f"{result['ratio']:.3f} (processor time {result['processor_ratio']:.3f}), first {result['equal_tokens']} tokens equal"
    )
