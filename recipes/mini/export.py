"""Put the trained parts together and write the checkpoint that comes with the package.

python recipes/mini/export.py OUT hart_infer/models/hart-mini
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import AUTOENCODER, DEFAULTS, TRANSFORMER
from text_encoder import build_text_encoder
from transformers import PreTrainedTokenizerFast

from hart_infer import HartPipeline
from hart_infer.model.autoencoder import Autoencoder
from hart_infer.model.transformer import Transformer


def assemble(out: Path) -> HartPipeline:
    """The pipeline of the averaged weights in `out`, fp32."""
    autoencoder = Autoencoder(AUTOENCODER).eval().requires_grad_(False)
    autoencoder.load_state_dict(torch.load(out / "tokenizer-final.pt", weights_only=True))
    weights = torch.load(out / "transformer.pt", weights_only=True)["average"]
    transformer = Transformer(TRANSFORMER, vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    transformer.load_state_dict(_part(weights, "transformer."))
    text_encoder = build_text_encoder(PreTrainedTokenizerFast.from_pretrained(out / "text_tokenizer"))
    text_encoder.model.load_state_dict(_part(weights, "text_encoder."))
    return HartPipeline(
        transformer.eval().requires_grad_(False), autoencoder, text_encoder, name="hart-mini", defaults=DEFAULTS
    )


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def main() -> None:
    """Assemble, cast, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what the trainings wrote")
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    pipe = assemble(args.out).to(torch.bfloat16)
    path = pipe.save_pretrained(args.checkpoint)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(pipe.describe(), f"\n{size / 1e6:.1f} MB in {args.checkpoint}")


if __name__ == "__main__":
    main()
