"""Write a checkpoint with random weights in the released layout.

    python benchmarks/random_checkpoint.py OUT --preset tiny --text-encoder
    python benchmarks/random_checkpoint.py OUT --preset 1024 --dtype bf16
    python benchmarks/random_checkpoint.py --family var --depth 16

`OUT/llm` and `OUT/tokenizer` hold what HART's released folders hold, `OUT/text_encoder` a Qwen2 and a byte-level tokenizer
when asked for; for VAR, OUT holds a `var_d16.pth` and a `vae_ch160v4096z32.pth`. Without OUT it is the folder where the other
benchmarks look for it. The pictures mean nothing; sizes, shapes and the range of the activations are the real model's.
HART's tensors are drawn and written in pieces, so that the full-size checkpoint needs little more memory than PyTorch itself;
a VAR pickle is in memory while it is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from architecture import (
    PRESETS,
    Entry,
    Preset,
    TextPreset,
    autoencoder_entries,
    dead_autoencoder_entries,
    dead_transformer_entries,
    parameter_counts,
    text_encoder_entries,
    text_preset,
    transformer_entries,
)
from architecture_var import VAR_PRESETS, VarPreset, var_autoencoder_entries, var_parameter_counts, var_transformer_entries

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def default_cache() -> Path:
    """Where made checkpoints are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hart_infer" / "benchmarks"


def cached_name(size: int, dtype: str, text_encoder: str) -> str:
    """The folder of a HART checkpoint within the cache."""
    return f"random-{size}px-{dtype}-text-{text_encoder}"


def cached_var_name(depth: int, dtype: str) -> str:
    """The folder of a VAR checkpoint within the cache."""
    return f"random-var-d{depth}-{dtype}"


def write_safetensors(path: Path, entries: Iterator[Entry], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Stream `entries` into a safetensors file: the header first, then every tensor's bytes in order."""
    listed = sorted(entries, key=lambda entry: -(entry.dtype or dtype).itemsize)  # wide ones first: all stay aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in listed:
        kind = entry.dtype or dtype
        end = offset + entry.count * kind.itemsize
        header[entry.name] = {"dtype": _STORED_NAMES[kind], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in listed:
            _write_entry(file, entry, entry.dtype or dtype, generator)


def _write_entry(file: BinaryIO, entry: Entry, dtype: torch.dtype, generator: torch.Generator) -> None:
    for piece in entry.pieces(generator):
        file.write(piece.to(dtype).view(torch.uint8).numpy().data)


def write_pickle(path: Path, entries: Iterator[Entry], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Write `entries` as a flat pickle of tensors, as VAR is released."""
    state = {e.name: torch.cat([piece.to(e.dtype or dtype) for piece in e.pieces(generator)]).view(e.shape) for e in entries}
    torch.save(state, path)


def transformer_config(p: Preset) -> dict[str, Any]:
    """`llm/config.json`: the released flags."""
    return {
        "architectures": ["HARTForT2I"],
        "model_type": "hart_transformer_t2i",
        "patch_nums": p.patch_nums,
        "context_token": p.context_token,
        "context_dim": p.context_dim,
        "embed_dim": p.embed_dim,
        "num_heads": p.num_heads,
        "depth": p.depth,
        "diff_width": p.diff_width,
        "diff_depth": p.diff_depth,
        "mlp_ratio": 4.0,
        "mlp_type": "llama",
        "attn_type": "llama",
        "norm_eps": 1e-6,
        "disable_aln": True,
        "shared_aln": False,
        "sep_aln_pooling_mode": "avg",
        "attn_l2_norm": False,
        "use_timestep_embed": True,
        "use_context_norm": True,
        "use_cross_attn": False,
        "num_sampling_steps": "8",
        "sampler": "iddpm",
        "vae_path": None,
    }


def autoencoder_config(p: Preset) -> dict[str, Any]:
    """`tokenizer/config.json`: the released flags."""
    return {
        "architectures": ["HARTAutoEncoderWithDisc"],
        "model_type": "hart_autoencoder_with_disc",
        "v_patch_nums": p.patch_nums,
        "vocab_size": p.vocab_size,
        "z_channels": p.z_channels,
        "ch": p.ch,
        "ch_mult": p.ch_mult,
        "share_quant_resi": 4,
        "quantizer_type": "var_hybrid",
        "hybrid": True,
        "quant_resi": 0.5,
        "quant_conv_ks": 3,
        "using_znorm": False,
        "double_decoder": False,
        "disable_quant_resi": False,
    }


def text_encoder_config(t: TextPreset, dtype: torch.dtype) -> dict[str, Any]:
    """`text_encoder/config.json`, readable by transformers 4 and 5."""
    return {
        "architectures": ["Qwen2Model"],
        "model_type": "qwen2",
        "hidden_size": t.hidden_size,
        "intermediate_size": t.intermediate_size,
        "num_hidden_layers": t.num_hidden_layers,
        "num_attention_heads": t.num_attention_heads,
        "num_key_value_heads": t.num_key_value_heads,
        "vocab_size": t.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: 256 bytes, a padding token and an end token. Needs only `tokenizers`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|pad|>"]
    vocabulary = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|endoftext|>",
        "padding_side": "right",
        "model_max_length": 32768,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _generator(seed: int, name: str) -> torch.Generator:
    """One per file, so that no file's draws depend on another's; hashed, because weights drawn from the same stream as
    somebody's `manual_seed(0)` inputs are those inputs, and their product is far from random."""
    digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _fill(folder: Path, preset: Preset, dtype: torch.dtype, text: str, seed: int, buffers: bool) -> None:
    def write(name: str, config: dict[str, Any], *parts: Iterator[Entry]) -> None:
        part = folder / name
        part.mkdir(parents=True)
        _write_json(part / "config.json", config)
        generator = _generator(seed, name)
        write_safetensors(part / "model.safetensors", (e for entries in parts for e in entries), dtype, generator)

    dead = (dead_transformer_entries(preset),) if buffers else ()
    write("llm", transformer_config(preset), transformer_entries(preset), *dead)
    dead = (dead_autoencoder_entries(preset),) if buffers else ()
    write("tokenizer", autoencoder_config(preset), autoencoder_entries(preset), *dead)
    if text != "none":
        encoder = text_preset(preset, text)
        write("text_encoder", text_encoder_config(encoder, dtype), text_encoder_entries(encoder))
        write_tokenizer(folder / "text_encoder")


def _fill_var(folder: Path, preset: VarPreset, dtype: torch.dtype, seed: int) -> None:
    folder.mkdir()
    files = {
        f"var_d{preset.depth}.pth": var_transformer_entries(preset),
        preset.autoencoder_file: var_autoencoder_entries(preset),
    }
    for name, entries in files.items():
        write_pickle(folder / name, entries, dtype, _generator(seed, name))


def write_checkpoint(
    out: str | Path,
    preset: str = "tiny",
    *,
    dtype: str = "fp32",
    text_encoder: str = "none",
    seed: int = 0,
    buffers: bool = False,
    force: bool = False,
) -> Path:
    """Write a HART checkpoint's folder, whole or not at all; FileExistsError if it is there already and not `force`."""
    fill = partial(_fill, preset=PRESETS[preset], dtype=DTYPES[dtype], text=text_encoder, seed=seed, buffers=buffers)
    return _write_folder(Path(out), fill, force)


def write_var_checkpoint(out: str | Path, depth: int, *, dtype: str = "fp32", seed: int = 0, force: bool = False) -> Path:
    """Write a VAR checkpoint's folder, whole or not at all; FileExistsError if it is there already and not `force`."""
    return _write_folder(Path(out), partial(_fill_var, preset=VAR_PRESETS[depth], dtype=DTYPES[dtype], seed=seed), force)


def _write_folder(target: Path, fill: Callable[[Path], None], force: bool) -> Path:
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        filled = work / "checkpoint"
        fill(filled)
        if target.exists():
            os.replace(target, work / "replaced")
        os.replace(filled, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights in the released layout.")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=f"folder to make (default: in {default_cache()})")
    parser.add_argument("--family", choices=("hart", "var"), default="hart")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="HART's shapes: tiny (128px) or the published ones")
    parser.add_argument("--depth", type=int, choices=VAR_PRESETS, default=16, help="VAR's shapes: 2 (tiny) or a published one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="stored type (default: fp32, as released)")
    parser.add_argument(
        "--text-encoder", nargs="?", choices=("none", "tiny", "full"), const="tiny", default="none", metavar="KIND",
        help="also write text_encoder/: tiny (two layers, the default), or full (1.5 B parameters)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--buffers", action="store_true", help="HART: also what inference drops: masks, counts, discriminator")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    if args.text_encoder == "full" and preset.context_dim != TextPreset().hidden_size:
        parser.error(f"--text-encoder full is 1536 wide; preset {args.preset} takes {preset.context_dim}")
    try:
        if args.family == "var":
            out = args.out or default_cache() / cached_var_name(args.depth, args.dtype)
            path = write_var_checkpoint(out, args.depth, dtype=args.dtype, seed=args.seed, force=args.force)
            pixels, parts = VAR_PRESETS[args.depth].size, var_parameter_counts(VAR_PRESETS[args.depth])
        else:
            out = args.out or default_cache() / cached_name(preset.size, args.dtype, args.text_encoder)
            path = write_checkpoint(
                out, args.preset, dtype=args.dtype, text_encoder=args.text_encoder, seed=args.seed,
                buffers=args.buffers, force=args.force,
            )  # fmt: skip
            pixels, parts = preset.size, parameter_counts(preset)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parts.items())
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    sys.stdout.write(f"{path}: random weights, {pixels}px, {args.dtype}, {size / 1e6:.1f} MB; {counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
