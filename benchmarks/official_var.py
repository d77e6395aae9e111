"""The released VAR code, unmodified, beside ours: for comparison only; as `official.py` for HART.

A checkout of github.com/FoundationVision/VAR is built and loaded as its notebook does it. Its `dist` chooses CUDA wherever
there is one; here it says the comparison's device. The function that draws is wrapped, to record what it drew.

These patches are process-wide: use a process of its own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from official import check_checkout, check_setting, main, quiet, verdict
from safetensors import safe_open

FILTERS = {"top_k": 900, "top_p": 0.95}  # of the released notebook
_MASK = "attn_bias_for_masking"


class OfficialVar:
    """VAR's released transformer and autoencoder, loaded from `var_*.pth` and `vae_*.pth`."""

    def __init__(
        self,
        checkout: str | Path,
        checkpoint: Path,
        *,
        setting: str,
        device: str = "cpu",
        autoencoder: Path | None = None,
    ) -> None:
        """`setting` is one of SETTINGS, 16 bits being bf16; `autoencoder`: its file, where it isn't in the folder."""
        check_setting(setting)
        sys.path.insert(0, str(check_checkout(checkout, "var")))
        self.setting, self.device = setting, torch.device(device)
        self.indices: list[torch.Tensor] = []  # of the last pictures, per scale [B, L]
        files = next(checkpoint.glob("var_*.pth")), autoencoder or next(checkpoint.glob("vae_*.pth"))
        with quiet():
            self.autoencoder, self.model = self._build(*files)
        self._record_indices()

    def _build(self, transformer_file: Path, autoencoder_file: Path) -> tuple[Any, Any]:
        import dist
        from models import build_vae_var

        dist.get_device = lambda: str(self.device)
        shapes, levels = _shapes(transformer_file)
        autoencoder_shapes, _ = _shapes(autoencoder_file)
        vocab_size, channels = autoencoder_shapes["quantize.embedding.weight"]
        parts = build_vae_var(
            device=self.device,
            patch_nums=tuple(math.isqrt(count) for count in levels.bincount().tolist()),
            V=vocab_size,
            Cvae=channels,
            ch=autoencoder_shapes["encoder.conv_in.weight"][0],
            num_classes=shapes["class_emb.weight"][0] - 1,
            depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            shared_aln="blocks.0.ada_gss" in shapes,
        )
        for part, file in zip(parts, (autoencoder_file, transformer_file), strict=True):
            stored = torch.load(file, map_location="cpu", weights_only=True)
            stored.setdefault(_MASK, part.state_dict().get(_MASK))  # the largest golden file leaves it out
            part.load_state_dict({name: tensor for name, tensor in stored.items() if tensor is not None}, strict=True)
            del stored
            part.eval().requires_grad_(False)
            if self.setting == "cast":
                part.to(torch.bfloat16)
        return parts

    def _record_indices(self) -> None:
        import models.var as released

        draw = released.sample_with_top_k_top_p_

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            indices: torch.Tensor = draw(*args, **kwargs)
            self.indices.append(indices[:, :, 0])
            return indices

        released.sample_with_top_k_top_p_ = recorded

    def generate(
        self, labels: torch.Tensor, *, seed: int, cfg: float, top_k: int, top_p: float, more_smooth: bool
    ) -> torch.Tensor:
        """Pictures [B, 3, H, W] in 0..1 of classes [B]."""
        self.indices = []
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting != "fp32")
        with torch.inference_mode(), autocast, quiet():
            image: torch.Tensor = self.model.autoregressive_infer_cfg(
                B=len(labels),
                label_B=labels.to(self.device),
                g_seed=seed,
                cfg=cfg,
                top_k=top_k,
                top_p=top_p,
                more_smooth=more_smooth,
            )
        return image


def _shapes(file: Path) -> tuple[dict[str, torch.Size], torch.Tensor]:
    """The shapes in a flat pickle, by mmap, and its `lvl_1L` [L] if it has one."""
    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    levels = stored["lvl_1L"][0].clone() if "lvl_1L" in stored else torch.zeros(0, dtype=torch.int64)
    return {name: tensor.shape for name, tensor in stored.items()}, levels


def check(checkout: str, golden: Path) -> bool:
    """Compare with what the released code recorded on one golden checkpoint; prints, and says whether all agree."""
    from safetensors.torch import load_file

    shared = None if any(golden.glob("vae_*.pth")) else next(golden.parent.glob("var-*/vae_*.pth"))
    var, agrees = OfficialVar(checkout, golden, setting="fp32", autoencoder=shared), True
    for path in sorted(golden.glob("trace-[hs]*.safetensors")):
        with safe_open(path, "pt") as trace:
            said = trace.metadata()
        recorded = load_file(path)
        image = var.generate(
            recorded["labels"],
            seed=int(said["g_seed"]),
            cfg=float(said["cfg"]),
            top_k=int(said["top_k"]),
            top_p=float(said["top_p"]),
            more_smooth=said["more_smooth"] == "True",
        )
        expected = [recorded[f"scale{scale}.indices"] for scale in range(len(var.indices))]
        differ = sum(int((a != b).sum()) for a, b in zip(var.indices, expected, strict=True))
        difference = (image - recorded["image"] / 65535).abs().max().item()
        fine = difference < (3e-2 if said["more_smooth"] == "True" else 2e-4) and differ == 0
        print(f"{golden.name} {path.stem}: {differ} indices differ, largest difference {difference:.2e}{verdict(fine)}")
        agrees &= fine
    return agrees


if __name__ == "__main__":
    sys.exit(main(check))
