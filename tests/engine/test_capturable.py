"""What a graph would capture, on the meta device: everything is computed there, and nothing comes from or goes to the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hart_infer import HartPipeline, VarPipeline
from hart_infer.generation.fast import apply
from hart_infer.generation.next_scale import GenerationState, new_cache, prefill
from hart_infer.generation.sampling import PhiloxSampler
from hart_infer.generation.schedule import Schedule, Settings, var_schedule
from hart_infer.models.next_scale import Condition
from hart_infer.models.parts.rope import image_tables
from tests.engine.tape import NotCapturable, tensors

META = torch.device("meta")


class OnTheDevice(TorchDispatchMode):
    """Fails on operators that read a tensor of the host, or make one; but a kernel may be given a single number of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tensors(args, kwargs, out):
            if x.device.type == "cpu" and (x.dim() or func.overloadpacket is torch.ops.aten._to_copy):
                raise NotCapturable(f"{func} with a tensor of the host, {list(x.shape)}")
        return out


class NoNumbers(TorchFunctionMode):
    """Fails where a tensor is made of numbers of the host: the copy that takes is hidden from dispatch modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise NotCapturable(f"{func.__name__} of numbers of the host")
        return func(*args, **(kwargs or {}))


def scales(pipe: Any, schedule: Schedule, condition: Callable[[Any], Condition], count: int = 2) -> GenerationState:
    """Start a generation on the meta device and run it, within the mode; prefills are what the first graph has."""
    transformer, autoencoder = (copy.deepcopy(part).to(META) for part in (pipe.transformer, pipe.autoencoder))
    sampler = PhiloxSampler(range(count), META, schedule)
    prompt, unconditional = condition(transformer), transformer.unconditional()
    rows = count * (2 if schedule.guided else 1)
    lengths = {"length": schedule.cached_length, "scratch_length": schedule.scratch_length}
    cache = new_cache(transformer, rows=rows, **lengths)
    with NoNumbers(), OnTheDevice():
        halves = [prompt, unconditional][: rows // count]
        prefixes = [prefill(transformer, c, cache, slice(i * count, (i + 1) * count)) for i, c in enumerate(halves)]
        state = GenerationState(transformer, autoencoder.quantizer, schedule, sampler, prefixes, cache)
        for stage in schedule:
            state.advance(stage)
        autoencoder.decode(state.f_hat)
    return state


def hart_condition(transformer: Any) -> Condition:
    config = transformer.config
    mask = torch.ones(1, config.context_token, dtype=torch.bool, device=META)
    context = torch.zeros(1, config.context_token, config.context_dim, device=META)
    found: Condition = transformer.condition(context, mask, mask.long())
    return found


@torch.no_grad()
@pytest.mark.parametrize("speed", ["exact", "fast", "turbo", "draft"])
def test_hart(pipe: HartPipeline, speed: Any) -> None:
    schedule = apply(pipe.knobs(speed), pipe._schedule(Settings(top_p=0.9)))
    image_tables([stage.side for stage in schedule], schedule.latent_side, torch.zeros(1, device=META), 32, torch.float32)
    scales(pipe, schedule, hart_condition)


@torch.no_grad()
def test_var(whole_var_tiny: Any) -> None:
    pipe = VarPipeline.from_pretrained(whole_var_tiny, device="cpu", dtype=torch.float32)
    config = pipe.autoencoder.config
    schedule = var_schedule(config.v_patch_nums, share_quant_resi=config.share_quant_resi, settings=Settings(top_p=0.9))
    scales(pipe, schedule, lambda transformer: transformer.condition(torch.zeros(1, dtype=torch.int64)))


@torch.no_grad()
@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x + torch.ones(x.shape[-1]).to(META),
        lambda x: x * float(x.sum()),
        lambda x: x + torch.tensor(2.0, device=META),
    ],
    ids=["a copy", "a value read", "a number made there"],
)
def test_what_comes_from_the_host_is_found(pipe: HartPipeline, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = type(pipe.transformer.head)
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda *given: planted(forward(*given)))
    with pytest.raises((NotCapturable, RuntimeError), match="of the host|meta"):
        scales(pipe, pipe._schedule(Settings()), hart_condition)
