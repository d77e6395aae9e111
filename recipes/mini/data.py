"""Fetch the emoji packages and draw them: the pictures and names that hart-mini learns from.

    python recipes/mini/data.py OUT

Needs `npm` and the packages of requirements.txt. Writes OUT/pictures.npy, [N, SIDE, SIDE, 3] uint8 on white, and
OUT/pictures.json, one entry per picture: emoji, name, keywords, style, group, split, and colour and number of the composed
ones (compose.py), which follow the others. The same packages give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resvg_py
from compose import COLOURED, COLOURS, PLACES, countable, hue_of, may_become, recolour
from PIL import Image

SIDE = 128
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
MARGIN = 5  # pixels of white around every picture
Place = tuple[float, float, float]  # left, top and side, as shares of SIDE
WHOLE_PICTURE: tuple[Place, ...] = ((MARGIN / SIDE, MARGIN / SIDE, 1 - 2 * MARGIN / SIDE),)
COUNTED = {"Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities"}
STYLES = {"noto": "iconify-json-noto", "fluent": "iconify-json-fluent-emoji-flat", "twemoji": "iconify-json-twemoji"}
PACKAGES = {  # name and version -> sha256 of the archive
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "@iconify-json/twemoji@1.2.5": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "unicode-emoji-json@0.9.0": "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    "emojilib@4.0.3": "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}
LEFT_OUT = re.compile(  # many pictures of one thing, or writing
    r"^((man|woman|men|women|family|kiss|couple|people)\b.*|.*facing right|.*o’clock|.*-thirty|Japanese “.*|(man|woman) .*)$"
)
WHOLE = {"man", "woman", "man dancing", "woman dancing", "people hugging", "woman with headscarf"}


class Picture(NamedTuple):
    """One emoji in one style."""

    emoji: str
    name: str
    keywords: list[str]
    group: str
    style: str
    split: (
        str  # "train"; "style": held out in this style only; "subject": held out in every style; "composed"; "pair": held out
    )
    colour: str | None = None  # of a recoloured picture, and of one that has such a colour by itself
    number: int = 1  # of copies


def fetch(folder: Path) -> None:
    """Download, verify and unpack every package into `folder`/<archive name without version>."""
    for package, expected in PACKAGES.items():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        name, version = package.removeprefix("@").rsplit("@", 1)
        archive = folder / f"{name.replace('/', '-')}-{version}.tgz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(
                f"{package} has sha256 {found}, not {expected}: it is not the package this recipe was written for."
            )
        with tarfile.open(archive) as packed:
            packed.extractall(folder / name.replace("/", "-"), filter="data")


def codepoints(emoji: str) -> str:
    """The key of the packages' tables: hexadecimal code points without variation selectors."""
    return "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f")


def share(text: str) -> float:
    """A number in 0..1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def split_of(name: str, style: str) -> str:
    """3% of the subjects are held out in every style, 6% of the other pictures in theirs; decided by hashing names."""
    if share(name) < 0.03:
        return "subject"
    return "style" if share(f"{name}/{style}") < 0.06 else "train"


def read(path: Path) -> Any:
    """The JSON in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def draw(icon: dict[str, Any], width: int, height: int, places: Sequence[Place] = WHOLE_PICTURE) -> np.ndarray:
    """An SVG body as [SIDE, SIDE, 3] uint8 on white, once at each of `places`."""
    width, height = icon.get("width", width), icon.get("height", height)
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = f'<svg {NAMESPACES} viewBox="{box}">{icon["body"]}</svg>'
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    for left, top, share in places:
        side = round(share * SIDE)
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))))
        canvas.alpha_composite(drawn.convert("RGBA"), (round(left * SIDE), round(top * SIDE)))
    return np.asarray(canvas.convert("RGB"))


def composed(
    picture: Picture, pixels: np.ndarray, again: Callable[[Sequence[Place]], np.ndarray]
) -> Iterator[tuple[np.ndarray, Picture]]:
    """What is made of a training picture: at most two other colours, and in half of the cases a number of copies.

    `again` draws it at other places. Which, and which are held out ("pair": a tenth), is decided by hashing names.
    """

    def chance(what: str) -> float:
        return share(f"{picture.name}/{picture.style}/{what}")

    def split(what: str) -> str:
        return "pair" if share(f"{picture.name}/{what}") < 0.1 else "composed"  # in no style

    main, hue, lightness = hue_of(pixels)
    if main and not COLOURED.search(picture.name):
        wanted = [c for c in COLOURS if c != main and may_become(c, lightness)]
        for colour in sorted(wanted, key=chance)[:2]:
            yield recolour(pixels, hue, colour), picture._replace(colour=colour, split=split(colour))
    if countable(picture.name) and picture.group in COUNTED and chance("number") < 0.5:
        number = 2 if chance("two") < 0.6 else 3
        yield again(PLACES[number]), picture._replace(number=number, split=split(str(number)))


def collect(folder: Path) -> tuple[np.ndarray, list[Picture]]:
    """Draw every kept emoji in every style."""
    names = read(folder / "unicode-emoji-json/package/data-by-emoji.json")
    keywords = read(folder / "emojilib/package/dist/emoji-en-US.json")
    sets = {style: folder / package / "package" for style, package in STYLES.items()}
    icons = {style: read(path / "icons.json") for style, path in sets.items()}
    tables = {}
    for style, path in sets.items():
        tables[style] = {
            "-".join(p for p in key.split("-") if p != "fe0f"): name for key, name in read(path / "chars.json").items()
        }
    pictures, listed = [], []
    more: list[tuple[np.ndarray, Picture]] = []
    for emoji, about in names.items():
        key, name = codepoints(emoji), about["name"]
        dropped = about["group"] == "Flags" or (LEFT_OUT.match(name) and name not in WHOLE)
        if dropped or any(key not in table for table in tables.values()):
            continue
        words = [word.replace("_", " ") for word in keywords.get(emoji, []) if word.isascii()]
        for style, table in tables.items():
            icon = icons[style]["icons"].get(table[key])
            if icon is None:  # an alias
                icon = icons[style]["icons"][icons[style]["aliases"][table[key]]["parent"]]
            sizes = icons[style]["width"], icons[style]["height"]
            picture = Picture(emoji, name, words, about["group"], style, split_of(name, style))
            pixels = draw(icon, *sizes)
            if picture.split == "train":
                more += composed(picture, pixels, partial(draw, icon, *sizes))
                main = hue_of(pixels)[0]
                picture = picture._replace(colour=main if main in COLOURS and not COLOURED.search(name) else None)
            pictures.append(pixels)
            listed.append(picture)
    return np.stack([*pictures, *(pixels for pixels, _ in more)]), [*listed, *(picture for _, picture in more)]


def main() -> None:
    """Fetch, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        pictures, listed = collect(Path(folder))
    np.save(out / "pictures.npy", pictures)
    entries = [picture._asdict() for picture in listed]
    (out / "pictures.json").write_text(json.dumps(entries, ensure_ascii=False, indent=0), encoding="utf-8")
    counts = Counter(picture.split for picture in listed)
    print(f"{len(listed)} pictures of {len({p.name for p in listed})} subjects: {dict(counts)}")  # noqa: T201


if __name__ == "__main__":
    main()
