"""Compare what the bundled models draw with the pictures in tests/references, which were looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SAME = 36.0  # dB: rounding differs between CPUs and changes a few codes
REFERENCES = Path(__file__).parent / "references"


def pixels(image: Image.Image) -> np.ndarray:
    """[h, w, 3] uint8."""
    return np.asarray(image.convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of values in 0..255; at most 120."""
    error = ((a.astype(float) - b.astype(float)) ** 2).mean() / 255**2
    return float(-10 * np.log10(max(error, 1e-12)))


def near(drawn: Image.Image, name: str) -> float:
    """PSNR of a picture against the reference of this file name."""
    return psnr(pixels(drawn), pixels(Image.open(REFERENCES / name)))
