"""HART beside other fast text-to-picture models on one machine: random weights, batch 1, each with its decoder.

    python benchmarks/against_peers.py --official CHECKOUT --out benchmarks/results/peers.json

Needs diffusers; where openvino is installed, the peers run on it too. What turns a prompt into features is left out on every
side. A peer's picture is its denoiser, once a step, and its decoder, called as its pipeline calls them; the scheduler's
arithmetic between is left out. Each model has a fresh process in every round, which draws all its rows. Speed says nothing of
quality, and sizes in pixels differ: read the rows with both in mind.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import official
import torch
from families import DTYPES, FAMILIES
from torch import Tensor, nn

OURS, RELEASED, SPRINT, TURBO = "hart_infer", "released HART", "SANA-Sprint 0.6B", "SDXL-Turbo"
OPENVINO = " on OpenVINO"  # behind a peer's name
SANA = {  # NVlabs/Sana's SanaSprint_600M_P1_D28, as diffusers' scripts/convert_sana_to_diffusers.py has it
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 36, "attention_head_dim": 32, "num_layers": 28,
    "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 2304,
    "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
SANA_DECODER = {  # dc-ae-f32c32-sana, as scripts/convert_dcae_to_diffusers.py has it
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
}  # fmt: skip
SDXL = {  # stable-diffusion-xl's published UNet
    "sample_size": 64, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL_DECODER = {
    "latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": 0.13025,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is timed."""

    model: str
    pixels: int
    setting: str = ""  # of ours, a speed mode; of a peer, "channels_last" or nothing
    steps: int = 0

    @property
    def name(self) -> str:
        """For people, and the record's key."""
        steps = f", {self.steps} step{'s' * (self.steps > 1)}" if self.steps else ""
        return f"{self.model} {self.pixels}px{steps}{', ' * bool(self.setting)}{self.setting}"


ROWS = [
    *(Row(OURS, 1024, speed) for speed in ("exact", "turbo")),
    Row(RELEASED, 1024),
    *(Row(SPRINT, 1024, setting, steps) for setting in ("", "channels_last") for steps in (1, 2)),
    *(Row(SPRINT + OPENVINO, 1024, steps=steps) for steps in (1, 2)),
    *(Row(TURBO, 512, setting, 1) for setting in ("", "channels_last")),
    Row(TURBO + OPENVINO, 512, steps=1),
]


# ---- a side, in a worker


def filled(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """A network with small random weights."""
    with torch.device("meta"):
        network = build()
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in network.parameters():
        tensor.normal_(0, 0.02, generator=generator)
    for tensor in network.buffers():
        tensor.zero_()
    return network


class Called(nn.Module):
    """A network behind a function of fp32 tensors alone, as an exporter wants it."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        """`call` takes the network and its inputs, in its dtype."""
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs of the network, fp32 -> its output, fp32."""
        dtype = next(self.network.parameters()).dtype
        return self.call(self.network, *(x.to(dtype) for x in inputs)).float()


@dataclass(frozen=True)
class Peer:
    """A model of diffusers: `denoise` takes x_t and what is `known`, `decode` a latent."""

    denoise: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    latent: Tensor
    known: Sequence[Tensor]

    def draw(self, row: dict[str, Any]) -> object:
        """Draw a picture."""
        x = self.latent
        for _ in range(row["steps"]):
            x = self.denoise(x, *self.known)
        return self.decode(x)


def sana_sprint(dtype: torch.dtype, device: str) -> tuple[Called, Called, list[Tensor]]:
    """Return SANA-Sprint's denoiser, its decoder, and inputs: the latent and what is known."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    denoiser = filled(lambda: SanaTransformer2DModel(**SANA), dtype, device)
    autoencoder = filled(lambda: AutoencoderDC(**SANA_DECODER), dtype, device)

    def call(network: nn.Module, x: Tensor, text: Tensor, mask: Tensor, time: Tensor, guidance: Tensor) -> Tensor:
        known = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "guidance": guidance}
        output: Tensor = network(x, timestep=time, return_dict=False, **known)[0]
        return output

    one = torch.ones(1)
    inputs = [random((1, 32, 32, 32)), random((1, 300, 2304)), torch.ones(1, 300), one, 4.5 * one]
    return Called(denoiser, call), decoder_of(autoencoder), [x.to(device) for x in inputs]


def sdxl_turbo(dtype: torch.dtype, device: str) -> tuple[Called, Called, list[Tensor]]:
    """Return SDXL-Turbo's, as `sana_sprint`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    denoiser = filled(lambda: UNet2DConditionModel(**SDXL), dtype, device)
    autoencoder = filled(lambda: AutoencoderKL(**SDXL_DECODER), dtype, device)

    def call(network: nn.Module, x: Tensor, text: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
        known = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        output: Tensor = network(x, 999, return_dict=False, **known)[0]
        return output

    sizes = torch.tensor([[512.0, 512, 0, 0, 512, 512]])
    inputs = [random((1, 4, 64, 64)), random((1, 77, 2048)), random((1, 1280)), sizes]
    return Called(denoiser, call), decoder_of(autoencoder), [x.to(device) for x in inputs]


def decoder_of(autoencoder: Any) -> Called:
    """Return the decoding half of an autoencoder; the other half is dropped."""
    del autoencoder.encoder
    return Called(autoencoder, lambda network, latent: network.decode(latent, return_dict=False)[0])


def random(shape: tuple[int, ...]) -> Tensor:
    """Return the same normal numbers every time, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def on_openvino(called: Called, inputs: Sequence[Tensor], threads: int) -> Callable[..., Tensor]:
    """Compile for OpenVINO's CPU device, in the weights' dtype; it goes on reading some of them where `called` has them.

    Raises BenchmarkError where its output is not PyTorch's.
    """
    import openvino

    dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[next(called.parameters()).dtype]
    with torch.no_grad():
        converted = openvino.convert_model(torch.export.export(called, tuple(inputs)))
    settings = {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": threads}
    try:
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
    except RuntimeError:  # 2026.4.1 on SANA's transformer: "2 passes ... can't be merged"
        print("  without OpenVINO's fusing of elementwise layers (snippets), which fails here", file=sys.stderr, flush=True)
        compiled = openvino.Core().compile_model(converted, "CPU", settings | {"SNIPPETS_MODE": "DISABLE"})

    def call(*given: Tensor) -> Tensor:
        return torch.from_numpy(compiled([x.numpy() for x in given])[0])

    with torch.inference_mode():
        expected = called(*inputs)
        error = ((call(*inputs) - expected).norm() / expected.norm()).item()
    if not error < 0.1:
        raise measure.BenchmarkError(f"OpenVINO's output is {error:.2g} of its size away from PyTorch's")
    return call


class Side:
    """A worker's state: one model, drawn again and again."""

    def __init__(self, role: str) -> None:
        """`role` names the model."""
        self._role = role
        self._draw: Callable[[dict[str, Any]], object] = lambda request: None
        self._device = torch.device("cpu")
        self._networks: list[Called] = []  # of a peer; kept, as OpenVINO reads their weights

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        return self._load(request) if request["command"] == "load" else self._picture(request)

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        self._device = torch.device(request["device"])
        return {"parameters": self._load_hart(request) if self._role in (OURS, RELEASED) else self._load_peer(request)}

    def _load_hart(self, request: dict[str, Any]) -> list[int]:
        family = FAMILIES["hart"]
        loaded = (family.load_ours if self._role == OURS else family.load_theirs)(request)
        measure.touch(loaded.weights)
        further = {OURS: lambda row: {"speed": row["setting"]}, RELEASED: lambda row: {}}[self._role]
        self._draw = lambda row: loaded.draw(1, **further(row))
        return []

    def _load_peer(self, request: dict[str, Any]) -> list[int]:
        build = {SPRINT: sana_sprint, TURBO: sdxl_turbo}[self._role.removesuffix(OPENVINO)]
        denoiser, decoder, (latent, *known) = build(DTYPES[request["dtype"]], request["device"])
        self._networks = [denoiser, decoder]
        if self._role.endswith(OPENVINO):
            denoise = on_openvino(denoiser, [latent, *known], request["threads"])
            self._draw = Peer(denoise, on_openvino(decoder, [latent], request["threads"]), latent, known).draw
        else:
            self._draw = Peer(denoiser, decoder, latent, known).draw
        return [sum(p.numel() for p in called.parameters()) for called in self._networks]

    @torch.inference_mode()
    def _picture(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self._role.endswith(OPENVINO):
            layout = torch.channels_last if row["setting"] == "channels_last" else torch.contiguous_format
            for network in self._networks:
                network.to(memory_format=layout)
        measure.reset_peak(self._device)
        measure.synchronize(self._device)
        start, cpu_start = time.perf_counter(), time.process_time()
        self._draw(row)
        measure.synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": measure.peak_bytes(self._device)}


# ---- the comparison


def compare(rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Every row, in rounds; ratios are to the first row's time in the same round."""
    checkpoint = FAMILIES["hart"].checkpoint(1024, args.dtype, args.cache_dir)
    request = {
        "checkpoint": str(checkpoint), "official": str(args.official), "dtype": args.dtype, "stored": args.dtype,
        "setting": "cast", "device": args.device, "guidance": 4.5, "more_smooth": True, "threads": args.threads,
    }  # fmt: skip
    models = list(dict.fromkeys(row.model for row in rows))
    parameters: dict[str, list[int]] = {}
    measured: list[dict[str, Any]] = []
    for i in range(args.repeats):
        measured.append({})
        for model in models if i % 2 == 0 else models[::-1]:
            with measure.Worker(__file__, model, args.threads) as worker:  # one at a time: together they need 25 GB
                parameters[model] = worker.ask("load", **request)["parameters"]
                for row in (row for row in rows if row.model == model):
                    for _ in range(args.warmup + 1):
                        found = worker.ask("picture", setting=row.setting, steps=row.steps)
                        print(f"  {row.name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
                    measured[-1][row.name] = found
    exact = rows[0].name
    table = {
        row.name: {
            "seconds": measure.spread([r[row.name]["seconds"] for r in measured]),
            "ratio": statistics.geometric_mean([r[row.name]["seconds"] / r[exact]["seconds"] for r in measured]),
            "cpu_ratio": statistics.geometric_mean([r[row.name]["cpu_seconds"] / r[exact]["cpu_seconds"] for r in measured]),
            "peak_bytes": max(r[row.name]["peak_bytes"] for r in measured),
        }
        for row in rows
    }
    return {"rows": table, "parameters": {model: counts for model, counts in parameters.items() if counts}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--official", type=Path, metavar="PATH", help="checkout of mit-han-lab/hart; without it no such row")
    result.add_argument("--dtype", choices=DTYPES, default="bf16")
    result.add_argument("--device", default="cpu")
    measure.add_run_options(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code: 2 where PATH is no checkout, 1 where a side fails."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Compare, print and write."""
    measure.require_package()
    measure.check_out(args.out)
    if args.official:
        args.official = official.check_checkout(args.official, "hart")
    absent = set() if args.official else {RELEASED}
    if args.device != "cpu" or importlib.util.find_spec("openvino") is None:
        absent |= {SPRINT + OPENVINO, TURBO + OPENVINO}
    print("".join(f"left out: {model}\n" for model in sorted(absent)), end="", file=sys.stderr)
    result = compare([row for row in ROWS if row.model not in absent], args)
    for name, row in result["rows"].items():
        print(f"{name:44}{row['seconds']['median']:8.2f} s {measure.gigabytes(row['peak_bytes']):>9}  ratio {row['ratio']:.3f}")
    if args.out:
        settings = {name: getattr(args, name) for name in ("dtype", "device", "repeats", "warmup", "threads")}
        machine = measure.machine(args.device) | {name: measure.version(name) for name in ("diffusers", "openvino")}
        measure.write_json(args.out, {"benchmark": "against_peers", "machine": machine, "settings": settings, **result})


if __name__ == "__main__":
    worker_role = sys.argv[2] if sys.argv[1:2] == ["--worker"] else None
    sys.exit(measure.serve(Side(worker_role)) if worker_role else main())
