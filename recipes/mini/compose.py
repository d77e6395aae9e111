"""Pictures made of pictures, whose captions have a colour or a number: recoloured, and drawn two or three times."""

from __future__ import annotations

import re

import numpy as np

# Hue in the CIELAB plane, degrees, and the lightness (0 to 100) at which people call it so.
COLOURS = {
    "red": (38, 40, 60),
    "orange": (62, 66, 82),
    "yellow": (92, 76, 96),
    "green": (140, 35, 85),
    "blue": (275, 30, 72),
    "purple": (312, 25, 62),
    "pink": (355, 60, 88),
}
PALEST = 55  # mean chroma of a recoloured picture, if it was less
NEAR = 32  # degrees: what counts as the same hue
COLOURED = re.compile(r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|grey|light|dark)\b")
NUMBERS = {2: "two", 3: "three"}
PLACES = {2: ((0.03, 0.265, 0.46), (0.51, 0.265, 0.46)), 3: ((0.27, 0.03, 0.45), (0.03, 0.51, 0.45), (0.51, 0.51, 0.45))}
COUNTABLE = re.compile(r"^[a-z-]+( [a-z-]+)?$")  # one or two plain words
UNCOUNTABLE = re.compile(
    r"(^(two|three|no|person|man|woman|people|sun|moon|new|full|first|last) ?|s$|ing$|button$|face$|arrow$|\b(rice|bread|bacon|"
    r"butter|salt|honey|milk|sushi|tofu|beer|wine|fire|fog|snow|ice|rain|money|earth|world|grass|seaweed|broccoli|garlic|food)$)"
)


def hue_of(pixels: np.ndarray) -> tuple[str | None, float, float]:
    """The colour that most of a picture's coloured part has, with its hue in degrees and its mean lightness.

    `pixels` [h, w, 3] uint8. The name is None where less than 85 % of the coloured part, weighted by chroma, has one hue, or
    where a third of what isn't white has no colour.
    """
    from skimage.color import rgb2lab  # here: captions need the rest of this file without it

    light, a, b = np.moveaxis(rgb2lab(pixels), -1, 0)
    chroma, drawn = np.hypot(a, b), light + 0.5 * np.hypot(a, b) < 97
    coloured = (chroma > 18) & drawn
    if coloured.sum() < 0.67 * drawn.sum() or not coloured.any():
        return None, 0.0, 0.0
    hue, weight = np.degrees(np.arctan2(b, a))[coloured] % 360, chroma[coloured]
    histogram = np.bincount((hue / 10).astype(int) % 36, weights=weight, minlength=36)
    main = 10 * float(np.argmax(histogram + np.roll(histogram, 1) + np.roll(histogram, -1))) + 5
    within = _apart(hue, main) < NEAR
    if weight[within].sum() < 0.85 * weight.sum():
        return None, 0.0, 0.0
    mean = float((light[coloured][within] * weight[within]).sum() / weight[within].sum())
    names = [name for name, (at, low, high) in COLOURS.items() if _apart(np.array(main), at) < 22 and low <= mean <= high]
    return (names[0] if names else "other"), main, mean


def _apart(hue: np.ndarray, other: float) -> np.ndarray:
    return np.abs((hue - other + 180) % 360 - 180)


def recolour(pixels: np.ndarray, main: float, colour: str) -> np.ndarray:
    """Turn the hue `main` of a picture [h, w, 3] uint8, and those near it, to `colour`; lightness stays."""
    from skimage.color import lab2rgb, rgb2lab

    lab = rgb2lab(pixels)
    hue, chroma = np.degrees(np.arctan2(lab[..., 2], lab[..., 1])) % 360, np.hypot(lab[..., 1], lab[..., 2])
    chroma = chroma * np.clip(PALEST / chroma[chroma > 18].mean(), 1, 2)  # a pale red would be brown or pink
    turned = np.radians(hue + COLOURS[colour][0] - main)
    share = np.clip((45 - _apart(hue, main)) / 10, 0, 1)[..., None]  # fades out, so that edges show no seam
    new = np.stack([lab[..., 0], chroma * np.cos(turned), chroma * np.sin(turned)], axis=-1)
    return (lab2rgb(share * new + (1 - share) * lab) * 255).round().astype(np.uint8)


def may_become(colour: str, lightness: float) -> bool:
    """Whether a picture of this mean lightness, its hue turned, is what people call `colour`."""
    _, low, high = COLOURS[colour]
    return low <= lightness <= high


def countable(name: str) -> bool:
    """Whether "two ..." of this name is said, and means two of the picture."""
    return bool(COUNTABLE.match(name)) and not UNCOUNTABLE.search(name) and not COLOURED.search(name)


def plural(name: str) -> str:
    """ "fox" -> "foxes", "cherry" -> "cherries", "cat" -> "cats"."""
    irregular = {"mouse": "mice", "goose": "geese", "fish": "fish", "sheep": "sheep", "tooth": "teeth", "foot": "feet",
                 "leaf": "leaves", "wolf": "wolves", "knife": "knives", "deer": "deer", "ox": "oxen"}  # fmt: skip
    *before, noun = name.split(" ")
    if noun in irregular:
        noun = irregular[noun]
    elif re.search(r"(ch|sh|x|s|z)$", noun):
        noun += "es"
    elif re.search(r"[^aeiou]y$", noun):
        noun = noun[:-1] + "ies"
    elif re.search(r"(to|go|ro)$", noun):
        noun += "es"
    else:
        noun += "s"
    return " ".join([*before, noun])
