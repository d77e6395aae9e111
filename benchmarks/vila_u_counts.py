"""Count the full-depth VILA-U on the meta device: parameters, bytes, floating-point operations and launches per position.

Nothing is computed: the loop of `generation/next_token.py` runs on tensors that have shapes only. A launch is an operator that
PyTorch dispatches and that computes something, so neither a view nor an allocation; attention counts as one, as GPUs have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from vila_u_checkpoint import Sizes, released_sizes
from vila_u_compare import cached_slots, rerun_slots

from hart_infer.generation.next_token import Networks, prefill_alone, run_position, start
from hart_infer.generation.sampling import CodeRule
from hart_infer.models.llama import Llama
from hart_infer.models.vila_u.depth import DepthTransformer
from hart_infer.models.vila_u.projector import Projector
from hart_infer.models.vila_u.vision import VisionTower
from hart_infer.ops.registry import Op

PROMPT = 74  # tokens of a short prompt with the system prompt: with a picture's 256 positions, 330
FRAMES = 8
ROWS = 2  # one picture with guidance
META = torch.device("meta")
_ALLOCATES = frozenset("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view detach lift_fresh".split())


class Launches(TorchDispatchMode):
    """Counts operators that compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self._within = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        if not self._within and _computes(func):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def as_one(self, function: Callable[..., Any], name: Callable[..., str | None]) -> Callable[..., Any]:
        """Wrap a function, to count a call that has a `name` as one launch, with everything in it."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            own = name(*args)
            if own is None:
                return function(*args, **kwargs)
            if not self._within:
                self.counts[own] += 1
            self._within += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._within -= 1

        return counted


def _computes(func: Any) -> bool:
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    return not views and func.overloadpacket.__name__ not in _ALLOCATES


@contextmanager
def counted_launches(*, fused: bool) -> Iterator[Counter[str]]:
    """Count what is launched within the context; where `fused`, the package's operations that have a kernel as one each."""
    mode = Launches()
    attention = mode.as_one(F.scaled_dot_product_attention, lambda *args: "scaled_dot_product_attention")
    call = mode.as_one(Op.__call__, lambda op, *args: op.name if fused and op.backends else None)
    with mock.patch.object(F, "scaled_dot_product_attention", attention), mock.patch.object(Op, "__call__", call), mode:
        yield mode.counts


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of products and attention: two a multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


class NoDraws:
    """A sampler for tensors without values."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def draw(self, logits: Tensor, rule: Any, step: int) -> Tensor:
        """Codes [B], of no value."""
        return torch.empty(self.batch_size, dtype=torch.int64, device=META)

    def end_position(self, vocab_size: int) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Do nothing."""


class Model:
    """All networks of the given sizes on the meta device, in bf16."""

    def __init__(self, sizes: Sizes) -> None:
        with META:
            self.llama, self.tower, self.depth = Llama(sizes.llama), VisionTower(sizes.vision), DepthTransformer(sizes.depth)
            widths = {"code_dim": sizes.vision.hidden_size, "hidden_size": sizes.llama.hidden_size}
            self.projector = Projector("mlp2x_gelu", **widths)
        for part in (self.llama, self.tower, self.depth, self.projector):
            part.to(torch.bfloat16).eval().requires_grad_(False)
        self.grid = sizes.vision.grid

    def parameters(self) -> dict[str, int]:
        """Parameters by part; the codebook without its padding row is K * C."""
        parts: dict[str, list[nn.Module]] = {
            "llama": [self.llama],
            "siglip": [self.tower.encoder],
            "codebook": [self.tower.quantizer],
            "decoder": [self.tower.post_quant_conv, self.tower.decoder],
            "projector": [self.projector],
            "depth_transformer": [self.depth],
        }
        return {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in parts.items()}

    def cache_bytes(self, positions: int, rows: int = ROWS) -> int:
        """Keys and values."""
        cache = self.llama.new_cache(rows=rows, length=positions)
        return cache.keys.nbytes + cache.values.nbytes

    def in_the_middle(self) -> Callable[[], None]:
        """Prepare a picture up to the middle; what is returned runs its next position."""
        networks = Networks(self.llama, self.depth, self.projector, self.tower.quantizer.rows)
        before = [0] * (PROMPT + self.grid**2 // 2)  # a prompt that is as long as prompt and half a picture together
        unconditional = prefill_alone(self.llama, before)
        state = start(networks, [before], unconditional, NoDraws(1), CodeRule(), num_positions=self.grid**2 // 2)
        run_position(state)
        return lambda: run_position(state)

    def language_step(self, rows: int = ROWS) -> None:
        """The Llama at one position, in the middle of a picture, without its head."""
        length = PROMPT + self.grid**2 // 2
        width = self.llama.config.hidden_size
        x = torch.empty(rows, 1, width, dtype=torch.bfloat16, device=META)
        place = self.llama.new_cache(rows=rows, length=length + 1).at(length, 1)
        self.llama(x, torch.empty(rows, 1, dtype=torch.int64, device=META), place)

    def depth_inputs(self, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        """Hidden states and codes' vectors."""
        config = self.depth.config
        return (
            torch.empty(rows, config.hidden_size, dtype=torch.bfloat16, device=META),
            torch.empty(rows, config.num_slots, config.code_dim, device=META),
        )


@torch.inference_mode()
def count(slots: int = 4) -> dict[str, Any]:
    """Everything about the 256 px model with `slots` codes a position; MAC are multiplications with additions."""
    sizes = released_sizes(slots=slots)
    model = Model(sizes)
    parameters = model.parameters()
    position, picture = model.in_the_middle(), sizes.vision.grid**2
    whole = flops(position)
    with counted_launches(fused=False) as plain:
        position()
    with counted_launches(fused=True) as fused:
        position()
    side = sizes.vision.image_size
    pixels = torch.empty(1, 3, side, side, dtype=torch.bfloat16, device=META)
    features = torch.empty(1, sizes.vision.grid, sizes.vision.grid, sizes.vision.hidden_size, dtype=torch.bfloat16, device=META)
    return {
        "slots": slots,
        "parameters": parameters,
        "weights_bytes": 2 * sum(parameters.values()),
        "cache_bytes": {
            "position and row": model.cache_bytes(1, rows=1),
            "picture": model.cache_bytes(PROMPT + picture),
            "video": model.cache_bytes(PROMPT + FRAMES * picture),
        },
        "mac_per_position_and_row": {
            "llama": flops(model.language_step) // 2 // ROWS,
            "depth transformer": flops(lambda: cached_slots(model.depth, *model.depth_inputs())) // 2 // ROWS,
            "depth transformer, re-run": flops(lambda: rerun_slots(model.depth, *model.depth_inputs())) // 2 // ROWS,
            "all": whole // 2 // ROWS,
        },
        "mac_per_picture": {
            "siglip": flops(lambda: model.tower.hidden(pixels)) // 2,
            "decoder": flops(lambda: model.tower.decode(features)) // 2,
        },
        "bytes_read_per_position": 2 * (_read_by_llama(model) + slots * parameters["depth_transformer"]),
        "launches_per_position": {"operators": plain.total(), "with kernels": fused.total()},
        "launches_by_name": {"operators": dict(plain.most_common()), "with kernels": dict(fused.most_common())},
    }


def _read_by_llama(model: Model) -> int:
    """Parameters that a position reads of the Llama: all but the embedding and the head."""
    parts = (model.llama.layers, model.llama.norm)
    return sum(p.numel() for part in parts for p in part.parameters())


def lines(counts: dict[str, Any]) -> list[str]:
    """The counts for people."""
    gigabytes = {name: f"{value / 1e9:.2f} GB" for name, value in counts["cache_bytes"].items()}
    gigabytes["position and row"] = f"{counts['cache_bytes']['position and row'] / 1e6:.2f} MB"
    macs = counts["mac_per_position_and_row"] | {f"{k}, a picture": v for k, v in counts["mac_per_picture"].items()}
    return [
        f"D {counts['slots']}: parameters " + ", ".join(f"{k} {v / 1e6:,.1f} M" for k, v in counts["parameters"].items()),
        f"  weights in bf16 {counts['weights_bytes'] / 1e9:.2f} GB; keys and values: "
        + ", ".join(f"{k} {v}" for k, v in gigabytes.items()),
        "  GMAC a position and row: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in macs.items()),
        f"  weights read a position {counts['bytes_read_per_position'] / 1e9:.1f} GB; launches a position: "
        + ", ".join(f"{k} {v:,}" for k, v in counts["launches_per_position"].items()),
    ]
