"""Every Triton kernel as the library uses it: constants, types, and what its launcher knows of the arguments."""

from __future__ import annotations

import importlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel can't be compiled

import triton  # noqa: E402
from binaries import LIMITS  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TYPES = ("bf16", "fp16", "fp32")
ALIGNED = re.compile(r"_(row|head|token|part|split|half|image|pixel|channel)$|^(width|vocab_size|channels|pixels|per_slab)$")


@dataclass(frozen=True)
class Case:
    """One kernel with the constants and the types of one use."""

    name: str
    kernel: Any
    types: dict[str, str]  # of pointers and floats; the rest are 32-bit integers
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    fusion: bool = True  # of products and sums
    targets: tuple[int, ...] = ()  # capabilities that it is for; all

    def source(self) -> ASTSource:
        """For the compiler; pointers and strides are multiples of 16, as the launchers' almost always are."""
        names = self.kernel.arg_names
        kinds = {name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names}
        counts = {p.name for p in self.kernel.params if p.do_not_specialize}
        aligned = [n for n in names if kinds[n].startswith("*") or (ALIGNED.search(n) and n not in counts)]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if kinds[name] != "constexpr"}
        return ASTSource(fn=self.kernel, signature=kinds, constexprs=self.constants, attrs=attributes)


def module(name: str) -> Any:
    """A module of kernels."""
    return importlib.import_module(f"hart_infer.kernels.{name}")


def attention_cases(dtype: str) -> Iterator[Case]:
    """Every tile, for the GPUs that it is chosen on: over all keys and over ranges, whole and split."""
    attention = module("attention")
    size = 4 if dtype == "fp32" else 2
    for _, itemsize, width, queries, tiles in attention.CONFIGS:
        if itemsize != size:
            continue
        targets = tuple(gpu for gpu in LIMITS if attention.config_for(gpu, size, width, queries) is tiles)
        for ranged, split in itertools.product((False, True), repeat=2):
            if dtype == "fp16" and (ranged or split):
                continue  # the same code as bf16's but for one conversion
            for head_dim in (width,) if ranged or split else (width, width // 2 + 16):
                yield _attention_case(attention.attention_kernel, dtype, head_dim, tiles, targets, ranged, split)


def _attention_case(
    kernel: Any, dtype: str, head_dim: int, tiles: Any, targets: tuple[int, ...], ranged: bool, split: bool
) -> Case:
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("maxima", "sums"), "*fp32")
    types |= dict.fromkeys(("scale_log2", "bonus"), "fp32") | ({"out": "*fp32"} if split else {})
    width = triton.next_power_of_2(head_dim)
    constants = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_Q": tiles.rows, "BLOCK_K": tiles.columns}
    constants |= {"SPLIT": split, "RANGED": ranged, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    name = f"attention {dtype} d{head_dim} {tiles.rows}x{tiles.columns}{' ranges' * ranged}{' split' * split}"
    return Case(name, kernel, types, constants, tiles.warps, tiles.stages, targets=targets)


def merge_cases() -> Iterator[Case]:
    """The parts of attention with split keys."""
    types = dict.fromkeys(("parts", "maxima", "sums"), "*fp32") | {"out": "*bf16"}
    constants = {"HEAD_DIM": 64, "WIDTH": 64, "SPLITS": 16}
    yield Case("attention merge bf16 d64 16 splits", module("attention").merge_kernel, types, constants)


def rope_cache_cases(dtype: str) -> Iterator[Case]:
    """The released model's heads, and a small one's."""
    for heads, head_dim, normalised in ((24, 64, False), (8, 32, False), (24, 64, True)):
        types = dict.fromkeys(("qkv", "cos", "sin", "gains", "q_out", "k_out", "v_out"), f"*{dtype}")
        constants = {"HALF": head_dim // 2, "LANES": head_dim // 2, "HEADS": triton.next_power_of_2(heads)}
        name = f"rope_cache {dtype} {heads}x{head_dim}{' normalised' * normalised}"
        kernel = module("rope_cache").rope_cache_kernel
        yield Case(name, kernel, types, constants | {"NORMALISED": normalised}, fusion=False)


def swiglu_cases(dtype: str) -> Iterator[Case]:
    """Any width."""
    swiglu = module("swiglu")
    types = dict.fromkeys(("gate", "up", "out"), f"*{dtype}")
    yield Case(f"swiglu {dtype}", swiglu.swiglu_kernel, types, {"BLOCK": swiglu.BLOCK})


def group_norm_silu_cases(dtype: str) -> Iterator[Case]:
    """The released decoder's widest and its largest level, in both memory formats."""
    norm = module("group_norm_silu")
    results = dict.fromkeys(("means", "squares", "group_means", "group_scales"), "*fp32")
    for last, tiles in ((True, norm.CHANNELS_LAST), (False, norm.CHANNELS_FIRST)):
        tile = {"PIXELS": tiles.rows, "CHANNELS": tiles.columns, "x_channel" if last else "x_pixel": 1}
        name = f"{dtype} channels {'last' if last else 'first'}"
        yield Case(f"group_norm_silu slab {name}", norm.slab_kernel, results | {"x": f"*{dtype}"}, tile, tiles.warps)
        types = results | dict.fromkeys(("x", "out", "weight", "bias"), f"*{dtype}")
        for per_group in (5, 20):
            constants = tile | {"PER_GROUP": per_group, "SILU": True}
            yield Case(f"group_norm_silu apply {name} {32 * per_group}", norm.apply_kernel, types, constants, tiles.warps)
    one = {"PER_GROUP": 4, "WIDTH": 4, "SLABS": 1, "pixels": 1, "slabs": 1}  # ones are compiled in
    yield Case(f"group_norm_silu merge {dtype} of one pixel", norm.merge_kernel, results | {"eps": "fp32"}, one, warps=8)
    for per_group in (5, 20) if dtype == "fp32" else ():
        width = triton.next_power_of_2(per_group)
        constants = {"PER_GROUP": per_group, "WIDTH": width, "SLABS": norm.MERGED // width}
        name = f"group_norm_silu merge {per_group}x{norm.MERGED // width}"
        yield Case(name, norm.merge_kernel, results | {"eps": "fp32"}, constants, warps=8)


def guided_sample_cases(dtype: str) -> Iterator[Case]:
    """The released vocabulary, and the largest that is supported."""
    sample = module("guided_sample")
    types = {"logits": f"*{dtype}", "indices": "*i64", "seeds": "*i64", "offset": "*i64"}
    types |= dict.fromkeys(("codebook", "settings", "thresholds", "embeddings"), "*fp32")
    for vocabulary in (4096, sample.MAX_VOCABULARY):
        for top_p in (False, True):
            constants = {"GUIDED": True, "TOP_K": True, "TOP_P": top_p, "BLOCK": vocabulary}
            name = f"guided_sample threshold {dtype} {vocabulary}{' top-p' * top_p}"
            yield Case(name, sample.threshold_kernel, types, constants, sample.warps_for(vocabulary), fusion=False)
    for mixes, guided in ((True, True), (False, True), (True, False)):
        constants = {"GUIDED": guided, "FILTERED": guided, "MORE_SMOOTH": mixes}
        constants |= {"TOKENS": sample.TOKENS, "CODES": sample.CODES, "WIDTH": 32}
        name = f"guided_sample draw {dtype}{' mixes' * mixes}{' plain' * (not guided)}"
        yield Case(name, sample.draw_kernel, types, constants, fusion=False)


def diffusion_step_cases() -> Iterator[Case]:
    """The released latent's channels."""
    step = module("diffusion_step")
    numbers = ("x0_from_x", "x0_from_noise", "mean_from_x0", "mean_from_x")
    types = dict.fromkeys((*numbers, "log_variance_min", "log_variance_max"), "fp32")
    types |= dict.fromkeys(("x", "eps", "variance", "noise", "settings", "out"), "*fp32")
    constants = {"CHANNELS": 32, "GUIDED": True, "ADDS_NOISE": True, "BLOCK": step.BLOCK}
    yield Case("diffusion_step 32", step.diffusion_step_kernel, types, constants, fusion=False)


def normal_noise_cases() -> Iterator[Case]:
    """The released latent's channels."""
    noise = module("normal_noise")
    constants = {"CHANNELS": 32, "BLOCK": noise.BLOCK}
    yield Case("normal_noise 32", noise.normal_noise_kernel, {"seeds": "*i64", "out": "*fp32"}, constants)


def cases() -> Iterator[Case]:
    """Every kernel, in the shapes of the released model and of hart-mini."""
    for dtype in TYPES:
        yield from attention_cases(dtype)
        yield from rope_cache_cases(dtype)
        yield from swiglu_cases(dtype)
        yield from group_norm_silu_cases(dtype)
        yield from guided_sample_cases(dtype)
    yield from merge_cases()
    yield from diffusion_step_cases()
    yield from normal_noise_cases()
