"""The released HART code, unmodified, on a machine it was not written for: for comparison only. VAR's: `official_var.py`.

A checkout of github.com/mit-han-lab/hart imports a CUDA extension, moves tensors with `.cuda()` and expects
transformers 4.42. Nothing in the checkout is edited. What it lacks is put in its way from outside:

* `hart_backend.fused_kernels` with `rms_norm` written in PyTorch; the extension's other kernels raise if they are ever called.
* `scipy.stats`, where scipy is not installed: a training-only distribution that inference builds and never draws from.
* `.cuda()` on tensors and modules returns its argument when the comparison runs on a CPU.
* The tokenizer's `from_pretrained`, called inside the transformer's constructor, and the transformer's own are replaced
  by build-then-copy: transformers 5 runs the first on the meta device, where that constructor can't work. Weights are
  copied tensor by tensor from the safetensors file, which needs less memory than the released scripts do.

These patches are process-wide: use a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import BenchmarkError
from safetensors import safe_open

SETTINGS = {
    "fp32": "fp32 weights, no autocast",
    "autocast": "fp32 weights under torch.autocast, as the released scripts do it",
    "cast": "16-bit weights under torch.autocast: faster and smaller than the released scripts",
}
MARKERS = {  # per family the repository and a file that only its checkout has
    "hart": ("mit-han-lab/hart", "hart/modules/models/transformer/hart_transformer_t2i.py"),
    "var": ("FoundationVision/VAR", "models/basic_var.py"),
}
_DEAD_KEYS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")


class OfficialError(BenchmarkError):
    """The path is not a checkout of the released code, or it does not run here."""

    exit_code = 2


def check_checkout(path: str | Path, family: str) -> Path:
    """The checkout's absolute path, or an OfficialError that says what is missing."""
    root = Path(path).expanduser().resolve()
    repository, marker = MARKERS[family]
    if not root.is_dir():
        raise OfficialError(f"{path} is not a folder: --official takes a checkout of github.com/{repository}")
    if not (root / marker).is_file():
        raise OfficialError(f"{path} is not a checkout of github.com/{repository}: no {marker}")
    return root


def check_setting(setting: str) -> None:
    """Raise OfficialError unless it is one of SETTINGS."""
    if setting not in SETTINGS:
        raise OfficialError(f"setting must be one of {', '.join(SETTINGS)}, not {setting!r}")


def commit(checkout: Path) -> str | None:
    """The checkout's commit, where git can tell."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float, use_quant: bool = False) -> None:
    """The fused kernel's contract: mean square in fp32, rounded to x's dtype before the weight multiplies it."""
    if use_quant:
        raise OfficialError("the int8 output of rms_norm is not stubbed; no released checkpoint asks for it")
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1]
    scale = mean_square.add_(epsilon).rsqrt_()
    if x.dtype == torch.float32:
        torch.mul(x, scale, out=out)
        out.mul_(weight)
    else:
        torch.mul((x * scale).to(x.dtype), weight, out=out)


def _missing_kernel(name: str) -> Callable[..., Any]:
    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise OfficialError(f"the released code called {name}, which inference never did")

    return kernel


@contextlib.contextmanager
def _stub_modules() -> Iterator[None]:
    """The CUDA extension's stand-in for good, scipy's only while the released code is being imported: transformers
    probes for scipy and must not find half of one."""
    import transformers.modeling_utils  # noqa: F401 - its probes run before the stand-ins exist

    backend, kernels = types.ModuleType("hart_backend"), types.ModuleType("hart_backend.fused_kernels")
    kernels.rms_norm = rms_norm  # type: ignore[attr-defined]
    for name in ("fused_rope_forward_func", "fused_rope_with_pos_forward_func", "fused_rope_backward_func"):
        setattr(kernels, name, _missing_kernel(name))
    backend.fused_kernels = kernels  # type: ignore[attr-defined]
    sys.modules.update({"hart_backend": backend, "hart_backend.fused_kernels": kernels})
    if importlib.util.find_spec("scipy") is not None:
        yield
        return
    scipy, stats = types.ModuleType("scipy"), types.ModuleType("scipy.stats")
    stats.truncnorm = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]
    scipy.stats = stats  # type: ignore[attr-defined]
    sys.modules.update({"scipy": scipy, "scipy.stats": stats})
    try:
        yield
    finally:
        del sys.modules["scipy"], sys.modules["scipy.stats"]


def _stay_on_cpu() -> None:
    """Make `.cuda()` a no-op, and the module-level choice of device the CPU even where CUDA is available."""
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign, assignment]


def _copy_weights(module: torch.nn.Module, folder: Path, prefix: str = "") -> None:
    """Copy a folder's safetensors into a built module, one tensor at a time."""
    target = {name: p for name, p in module.state_dict(keep_vars=True).items() if not name.endswith(_DEAD_KEYS)}
    loaded = set()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 - a safe_open handle can't be iterated
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name in target:
                target[name].data.copy_(stored.get_tensor(key))
                loaded.add(name)
    if missing := sorted(target.keys() - loaded):
        raise OfficialError(f"{folder} lacks {len(missing)} tensors of the released model, {missing[0]} among them")


def _from_folder(cls: Any) -> classmethod[Any, Any, Any]:
    """A `from_pretrained` for the autoencoder that builds it plainly, then copies its weights."""

    def from_pretrained(_cls: Any, folder: str) -> Any:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        model = cls(cls.config_class(**config))
        _copy_weights(model.vae, Path(folder), prefix="vae.")
        return model

    return classmethod(from_pretrained)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The released constructors print shapes; keep them off our output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class OfficialHart:
    """The released transformer and autoencoder, loaded from a checkpoint in the released layout."""

    def __init__(self, checkout: str | Path, checkpoint: str | Path, *, setting: str, device: str = "cpu") -> None:
        """`setting` is one of SETTINGS; 16-bit settings take bf16 on the CPU and fp16 on CUDA unless told."""
        check_setting(setting)
        root, folder = check_checkout(checkout, "hart"), Path(checkpoint)
        self.setting, self.device = setting, torch.device(device)
        if self.device.type == "cpu":
            _stay_on_cpu()
        sys.path.insert(0, str(root))
        with quiet(), _stub_modules():
            self.model = self._build(folder)
        if setting == "cast":
            self.model.to(torch.bfloat16)
            self.model.vae_proxy[0].to(torch.bfloat16)
        self.model.to(self.device).eval()
        self.model.vae_proxy[0].to(self.device).eval()

    def _build(self, folder: Path) -> Any:
        import hart.utils.tools as tools
        from hart.modules.models import autoencoder, transformer

        if self.device.type == "cpu":
            transformer.hart_transformer_t2i.get_device = lambda: "cpu"
            tools.get_device = lambda: "cpu"
        with_disc = autoencoder.HARTAutoEncoderWithDisc
        with_disc.from_pretrained = _from_folder(with_disc)
        config = json.loads((folder / "llm" / "config.json").read_text(encoding="utf-8"))
        config["vae_path"] = str(folder / "tokenizer")
        model = transformer.HARTForT2I(transformer.HARTForT2IConfig(**config))
        _copy_weights(model, folder / "llm")
        return model

    def generate(
        self,
        context: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        seed: int,
        cfg: float = 4.5,
        more_smooth: bool = True,
        top_p: float = 0.0,
    ) -> torch.Tensor:
        """Pictures [B, 3, H, W] in 0..1. `seed` seeds the index draws and, through torch's global generator,
        the diffusion noise, which the released code leaves unseeded."""
        torch.manual_seed(seed)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting != "fp32")
        with torch.inference_mode(), autocast, quiet():
            image: torch.Tensor = self.model.autoregressive_infer_cfg(
                B=context.shape[0],
                label_B=context.to(self.device),
                cfg=cfg,
                g_seed=seed,
                top_p=top_p,
                more_smooth=more_smooth,
                context_position_ids=position_ids.to(self.device),
                context_mask=mask.to(self.device),
            )
        return image


def verdict(fine: bool) -> str:
    """How a line of `check` ends."""
    return "" if fine else ", too much"


def check(checkout: str, golden: Path) -> bool:
    """Compare with what the released code recorded on one golden checkpoint; prints, and says whether all agree."""
    hart, agrees = OfficialHart(checkout, golden, setting="fp32"), True
    for name, tolerance in (("trace-smooth", 5e-3), ("trace-hard", 2e-4)):
        path = golden / f"{name}.safetensors"
        if not path.exists():
            continue
        with safe_open(path, "pt") as trace:
            said = trace.metadata()
            inputs = [trace.get_tensor(f"context{part}") for part in ("", "_mask", "_position_ids")]
            expected = trace.get_tensor("image")
        rounded = expected.dtype == torch.uint8
        image = hart.generate(
            *inputs,
            seed=int(said["seed"]),
            cfg=float(said["cfg_scale"]),
            more_smooth=said["more_smooth"] == "True",
            top_p=float(said.get("top_p", 0)),
        )
        difference = (image - (expected / 255 if rounded else expected)).abs().max().item()
        fine = difference < (1 / 255 if rounded else tolerance)
        print(f"{golden.name} {name}: largest difference {difference:.2e}{verdict(fine)}")
        agrees &= fine
    return agrees


def main(check: Callable[[str, Path], bool]) -> int:
    """Check the golden folders of the command line: do the stand-ins leave the released code's numbers alone?"""
    if len(sys.argv) < 3:
        print(f"usage: {Path(sys.argv[0]).name} CHECKOUT GOLDEN_FOLDER...", file=sys.stderr)
        return 2
    try:
        disagreeing = [folder for folder in sys.argv[2:] if not check(sys.argv[1], Path(folder))]
    except (OfficialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if disagreeing else 0


if __name__ == "__main__":
    sys.exit(main(check))
