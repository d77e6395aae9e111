"""Draw the pictures for a VAR model's FID: 50 of every class as PNGs, then one .npz for OpenAI's evaluator.

    python benchmarks/sample_for_fid.py OUT --model FoundationVision/var --variant d16 --batch-size 50

Picture i of class c is `OUT/0207-00003.png` (c 207, i 3). Its seed is c * 1,000,000 + i, whatever else is drawn, so that a
split of the work, an interruption or more pictures a class change no picture. A picture appears under its name only when it is
complete; a second run draws what is missing. `--shard 0/4` draws the first of four parts. Whoever finds all pictures there
writes `OUT.npz`: `arr_0` [N, H, W, 3] uint8, as `evaluator.py` of github.com/openai/guided-diffusion reads it. All classes
take turns in it, because the Inception score is taken of 5,000 pictures at a time.

On a GPU a picture's last bits depend on the pictures that are drawn beside it: always the same ones for one --batch-size; with
`--reproducible` it is drawn alone. On a CPU it always is. A CPU and a GPU draw different pictures from one seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from measure import BenchmarkError, write_json
from PIL import Image
from tqdm import tqdm

from hart_infer import HartError, VarPipeline
from hart_infer.images.files import save_picture
from hart_infer.pipelines.describe import weights_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = "settings.json"  # in OUT: what must be the same in every run
SEEDS_PER_CLASS = 1_000_000


@dataclass(frozen=True)
class Sample:
    """Picture number `index` of class `label`."""

    label: int
    index: int

    @property
    def seed(self) -> int:
        """Different for every sample; below 2**32 up to class 4293, which is as much as a generator on the CPU takes in."""
        return self.label * SEEDS_PER_CLASS + self.index

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.label:04d}-{self.index:05d}.png"


def all_samples(num_classes: int, per_class: int) -> list[Sample]:
    """Every class's first picture, then every class's second, and so on: the order of the npz and of the batches."""
    return [Sample(label, index) for index in range(per_class) for label in range(num_classes)]


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` with i from 0 to n - 1."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1")
    return int(index), int(count)


# ---- pictures


def draw_missing(pipe: Any, batches: Sequence[Sequence[Sample]], out: Path, **options: Any) -> None:
    """Draw every batch of which a picture is missing, whole, and write the missing pictures."""
    missing = [[sample for sample in batch if not (out / sample.name).exists()] for batch in batches]
    total = sum(map(len, batches))
    with tqdm(total=total, initial=total - sum(map(len, missing)), desc="pictures", unit="picture") as bar:
        for batch, wanted in zip(batches, missing, strict=True):
            if not wanted:
                continue
            images = pipe([sample.label for sample in batch], seed=[sample.seed for sample in batch], **options).images
            for sample, image in zip(batch, images, strict=True):
                if sample in wanted:
                    save_picture(image, out / sample.name)
                    bar.update()


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Note what the folder's pictures are drawn with; BenchmarkError if they were begun with something else."""
    path = out / SETTINGS
    if not path.exists():
        write_json(path, settings)
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        differ = [
            f"{name} {begun.get(name)!r}, not {settings[name]!r}" for name in settings if begun.get(name) != settings[name]
        ]
    except (ValueError, AttributeError) as error:
        raise BenchmarkError(f"{path} is not one that this script wrote") from error
    if differ:
        raise BenchmarkError(f"{out} was begun with {'; '.join(differ)}; take another folder")


# ---- the npz


def write_npz(pictures: Sequence[Path], target: Path) -> None:
    """Write all pictures as `arr_0` [N, H, W, 3] uint8, one picture in memory at a time; whole or not at all."""
    with contextlib.ExitStack() as on_failure:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            on_failure.callback(os.unlink, file.name)
            with (
                zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as array,
            ):
                write_array(pictures, array)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
        on_failure.pop_all()


def write_array(pictures: Sequence[Path], array: IO[bytes]) -> None:
    """Write what np.save would write of all pictures; BenchmarkError if they differ in size."""
    shape = read_picture(pictures[0]).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), *shape)}
    np.lib.format.write_array_header_1_0(array, header)
    for path in tqdm(pictures, desc="npz", unit="picture"):
        pixels = read_picture(path)
        if pixels.shape != shape:
            raise BenchmarkError(f"{path} is {list(pixels.shape)}, and {pictures[0].name} is {list(shape)}")
        array.write(pixels.tobytes())


def read_picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[H, W, 3] uint8; BenchmarkError if it is no picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise BenchmarkError(f"{path} can't be read; delete it and run again") from error


# ---- the command


def run(args: argparse.Namespace) -> None:
    """Draw what is missing of this shard, and write the npz if nothing is missing at all."""
    out: Path = args.out
    pipe = VarPipeline.from_pretrained(
        args.model, variant=args.variant, dtype=DTYPES[args.dtype] if args.dtype else None, device=args.device
    )
    pipe.set_progress_bar_config(disable=True)
    dtype = str(pipe.dtype).removeprefix("torch.")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": args.model, "variant": args.variant, "preset": args.preset, "dtype": dtype}
    check_settings(out, settings | {"weights": weights_digest(pipe.components)})

    samples = all_samples(pipe.transformer.config.num_classes, args.per_class)
    batches = [samples[i : i + args.batch_size] for i in range(0, len(samples), args.batch_size)]
    index, count = args.shard
    options = {"preset": None if args.preset == "default" else args.preset, "reproducible": args.reproducible or None}
    draw_missing(pipe, batches[index::count], out, **options)

    pictures = [out / sample.name for sample in samples]
    absent = sum(not path.exists() for path in pictures)
    if absent:
        print(f"{absent} pictures of other shards are missing; the npz is written once all are in {out}")
        return
    target = out.with_name(f"{out.name}.npz")
    write_npz(pictures, target)
    print(f"{target}: {len(pictures)} pictures")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Draw the pictures for a VAR model's FID, as PNGs and one .npz.")
    result.add_argument("out", type=Path, metavar="OUT", help="folder of the pictures; the npz is put beside it")
    result.add_argument("--model", default="FoundationVision/var", help="a folder or a Hub id (FoundationVision/var)")
    result.add_argument("--variant", help="which of several: d16, d20, ...")
    result.add_argument("--preset", choices=("fid", "default"), default="fid",
                        help="fid: guidance 1.5, top-k 900, top-p 0.96; default: the checkpoint's own")  # fmt: skip
    result.add_argument("--per-class", type=int, default=50, help="pictures of each class (50)")
    result.add_argument("--batch-size", type=int, default=16, help="pictures drawn together (16)")
    result.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N",
                        help="draw only part I of N, I from 0 to N - 1")  # fmt: skip
    result.add_argument("--reproducible", action="store_true", help="on a GPU: draw each picture alone, in any batch alike")
    result.add_argument("--dtype", choices=DTYPES, help="default: the stored one")
    result.add_argument("--device", help="default: CUDA, else MPS, else the CPU")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = parser().parse_args(arguments)
    if not (1 <= args.per_class <= SEEDS_PER_CLASS and args.batch_size >= 1):
        parser().error(f"--per-class must be from 1 to {SEEDS_PER_CLASS}, --batch-size 1 or more")
    args.out = Path(os.path.abspath(args.out))
    try:
        run(args)
    except (BenchmarkError, HartError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
