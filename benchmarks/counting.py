"""Count what a picture takes on the meta device: every launch of a stage, its bytes and its floating-point operations.

Nothing is computed and no memory is used: the library's own loop runs on tensors that have shapes only. A launch is an operator
that computes, neither a view nor an allocation. Where kernels are assumed, an operation of the library that has one is a single
launch that reads its inputs and writes its results once; attention is one launch everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from architecture import Preset, preset_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hart_infer.generation.fast import apply
from hart_infer.generation.next_scale import GenerationState, copy_prefix, finish, new_cache, prefill
from hart_infer.generation.sampling import PhiloxSampler
from hart_infer.generation.schedule import Schedule, Settings, hart_schedule
from hart_infer.generation.speed import Knobs, SpeedName, resolve
from hart_infer.models.hart import HartConfig, HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder, AutoencoderConfig
from hart_infer.models.parts.cache import KVCache
from hart_infer.ops.registry import Op

META = torch.device("meta")
GUIDANCE_SCALE = 4.5  # the released one; how large it is changes no count
_ALLOCATES = frozenset("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view detach lift_fresh".split())
_KINDS = {"mm": "linear", "addmm": "linear", "bmm": "linear", "baddbmm": "linear", "convolution": "convolution"}


@dataclass(frozen=True)
class Launch:
    """One launch: what it moves if each tensor is read or written once, and what it computes, by kind."""

    stage: str
    name: str
    kind: str  # linear, attention, wide attention (heads over 128), convolution, sampling, other
    nbytes: int
    flops: int  # of sampling: the logits that are drawn from


def nbytes(*values: Any) -> int:
    """Bytes of the distinct tensors; of one that repeats elements, those it holds."""
    found = {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values()
    return sum(min(x.numel(), x.untyped_storage().nbytes() // x.itemsize) * x.itemsize for x in found)


class Counter(TorchDispatchMode):
    """Notes the launches of the stage that is being run."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.stage = ""
        self._within = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on the meta device, and note it."""
        out = func(*args, **(kwargs or {}))
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not self._within and not views and name not in _ALLOCATES:
            flops = int(flop_registry[packet](*args, **(kwargs or {}), out_val=out)) if packet in flop_registry else 0
            written = [] if any(each.alias_info is not None for each in func._schema.returns) else out
            self.note(name, _KINDS.get(name, "other"), nbytes(args, kwargs, written), flops)
        return out

    def note(self, name: str, kind: str, size: int, flops: int = 0) -> None:
        """Note a launch."""
        self.launches.append(Launch(self.stage, name, kind, size, flops))

    @contextmanager
    def inside(self) -> Iterator[bool]:
        """Note nothing within; whether this is the outermost such block."""
        outermost, self._within = not self._within, True
        try:
            yield outermost
        finally:
            self._within = not outermost


@contextmanager
def counting(*, kernels: bool) -> Iterator[Counter]:
    """Count within the context; `kernels`: as where the library's kernels run."""
    counter = Counter()
    attend, call = F.scaled_dot_product_attention, Op.__call__

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with counter.inside() as outermost:
            out = attend(q, k, v, *args, **kwargs)
            out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as PyTorch's kernels lay it out
        if outermost:
            kind = "attention" if q.shape[-1] <= 128 else "wide attention"
            counter.note("attention", kind, nbytes(q, k, v, out), 4 * q.numel() * k.shape[-2])
        return out

    def operation(op: Op[Any, Any], *args: Any, **kwargs: Any) -> Any:
        samples = op.name in ("guided_sample", "normal_noise")
        if op.name == "attention" or not (samples or (kernels and op.backends)):
            return call(op, *args, **kwargs)
        with counter.inside() as outermost:
            out = call(op, *args, **kwargs)
        if outermost:
            twice = nbytes(args[0]) if op.name in ("guided_sample", "group_norm_silu") else 0  # two launches read it
            drawn = args[0].numel() * len(args[2]) // len(args[0]) if op.name == "guided_sample" else 0  # logits, once guided
            counter.note(op.name, "sampling" if samples else "other", nbytes(args, kwargs, out) + twice, drawn)
        return out

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(Op, "__call__", operation),
        torch.no_grad(),
        counter,
    ):
        yield counter


@dataclass(frozen=True)
class Work:
    """What a picture is drawn with."""

    preset: Preset
    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 1
    speed: SpeedName = "exact"

    @property
    def schedule(self) -> Schedule:
        """Of the released model."""
        given = Settings(guidance_scale=GUIDANCE_SCALE)
        whole = hart_schedule(
            self.preset.patch_nums, context_tokens=self.preset.context_token, share_quant_resi=4, settings=given
        )
        knobs = resolve(self.speed, Knobs(), sides=self.preset.patch_nums, depth=self.preset.depth, late_temperature=1.0)
        return apply(knobs, whole)


def modules(preset: Preset) -> tuple[HartTransformer, Autoencoder]:
    """The transformer and the autoencoder of a preset, on the meta device."""
    with META:
        config = preset_config(preset, HartConfig)
        transformer = HartTransformer(config, vocab_size=preset.vocab_size, channels=preset.z_channels)
        return transformer, Autoencoder(preset_config(preset, AutoencoderConfig))


def launches(work: Work, *, kernels: bool) -> list[Launch]:
    """Every launch of a call with encoded prompts, in order; stages are named as `end_to_end.py` names them.

    The unconditional prefix is there already, as in a pipeline's second call.
    """
    preset = work.preset
    transformer, autoencoder = modules(preset)
    transformer.to(work.dtype)
    autoencoder.to_device(None, work.dtype)
    schedule = work.schedule
    context = torch.empty(1, preset.context_token, preset.context_dim, device=META)
    mask = torch.ones(1, preset.context_token, dtype=torch.bool, device=META)
    rows = work.batch_size * (2 if schedule.guided else 1)
    behind = slice(work.batch_size, rows)  # the unconditional ones
    lengths = {"length": schedule.cached_length, "scratch_length": schedule.scratch_length}
    with torch.no_grad():
        sampler = PhiloxSampler(range(work.batch_size), META, schedule)
        cache = new_cache(transformer, rows=rows, **lengths)
        known = prefill(transformer, transformer.unconditional(), cache, behind) if schedule.guided else None
    with counting(kernels=kernels) as counter:
        counter.stage = stage_name(0, 1)
        prompt = transformer.condition(context, mask, mask.long())
        prefixes = [prefill(transformer, prompt, cache, slice(0, work.batch_size))]
        if known is not None:
            copy_prefix(known, cache, behind)
            prefixes.append(known)
        state = GenerationState(transformer, autoencoder.quantizer, schedule, sampler, prefixes, cache)
        with diffusion_as_its_own_stage(counter):
            for stage in schedule:
                counter.stage = stage_name(stage.index, stage.side)
                state.advance(stage)
        counter.stage = "decode"
        autoencoder.decode(finish(state)).add_(1).mul_(0.5).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    return counter.launches


@contextmanager
def diffusion_as_its_own_stage(counter: Counter) -> Iterator[None]:
    """Note the residual diffusion's launches under its name."""
    from hart_infer.generation import next_scale

    sample: Callable[..., Tensor] = next_scale.sample_residual

    def named(*args: Any, **kwargs: Any) -> Tensor:
        before, counter.stage = counter.stage, "diffusion"
        try:
            return sample(*args, **kwargs)
        finally:
            counter.stage = before

    with mock.patch.object(next_scale, "sample_residual", named):
        yield


def stage_name(index: int, side: int) -> str:
    """As end_to_end.py's."""
    return f"scale {index} ({side}x{side})"


def memory(work: Work) -> dict[str, int]:
    """Bytes that lie on the device throughout: weights, keys and values with the last scale's, and its logits in fp32."""
    preset, schedule = work.preset, work.schedule
    transformer, autoencoder = modules(preset)
    weights = sum(p.numel() for part in (transformer, autoencoder) for p in part.parameters())
    rows = work.batch_size * (2 if schedule.guided else 1)
    cache = KVCache.size_in_bytes(
        depth=preset.depth,
        rows=rows,
        width=preset.embed_dim,
        length=schedule.cached_length,
        scratch_length=schedule.scratch_length,
        itemsize=work.dtype.itemsize,
    )
    last = schedule.stages[-1]
    logits = 4 * work.batch_size * (2 if last.guided else 1) * last.tokens * preset.vocab_size
    return {"weights": weights * work.dtype.itemsize, "cache": cache, "logits": logits}
