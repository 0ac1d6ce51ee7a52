"""Contact sheets of samples and of their amplified difference, as pictures that a page holds itself."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from .markup import Html, tag

GAP = 1  # transparent pixels between tiles
PANEL_WIDTH = 396  # CSS pixels of a third of the page; sheets are enlarged by whole numbers up to it
FACTORS = (64, 32, 16, 8, 4, 2)
CLIPPED_SHARE = 0.02  # of the difference's values that may saturate


def amplification(
    reference: np.ndarray,  # [N, H, W, C] uint8
    quantized: np.ndarray,  # same shape
) -> int:
    """The largest power of two from 2 to 64 at which at most 2 % of the differences leave the grey scale."""
    magnitude = np.abs(reference.astype(np.int16) - quantized.astype(np.int16))
    limit = float(np.quantile(magnitude, 1 - CLIPPED_SHARE))
    return next((f for f in FACTORS if f * limit <= 127), FACTORS[-1])


def difference(
    reference: np.ndarray,  # [N, H, W, C] uint8
    quantized: np.ndarray,  # same shape
    factor: int,
) -> np.ndarray:
    """128 + factor * (quantized - reference), clipped, [N, H, W, C] uint8."""
    change = quantized.astype(np.int32) - reference.astype(np.int32)
    return np.clip(128 + factor * change, 0, 255).astype(np.uint8)


def sheet(
    images: np.ndarray,  # [N, H, W, 1 or 3] uint8
) -> np.ndarray:
    """Tiles in rows, transparent gaps between them, [rows, columns, 4] uint8."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[y : y + height, x : x + width, :3] = image if channels == 3 else np.repeat(image, 3, axis=2)
        canvas[y : y + height, x : x + width, 3] = 255
    return canvas


def data_uri(
    pixels: np.ndarray,  # [H, W, 4] uint8
) -> str:
    """PNG bytes in a URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shown_width(pixels: int) -> int:
    """CSS width of a sheet: the largest whole multiple of its pixels that a panel holds."""
    return pixels * max(1, PANEL_WIDTH // pixels)


def picture(
    pixels: np.ndarray,  # [H, W, 4] uint8
    alt: str,
) -> Html:
    """A sheet, and what it shows in words."""
    height, width = pixels.shape[:2]
    return tag("img", src=data_uri(pixels), alt=alt, width=width, height=height, style=_shown(width))


class SharedPictures:
    """Sheets that a page shows several times: it holds each once, and every further picture points there.

    As SVG, because an <img> can point at no other part of its page.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[tuple[int, ...], bytes], str] = {}

    def picture(
        self,
        pixels: np.ndarray,  # [H, W, 4] uint8
        alt: str,
    ) -> Html:
        """A sheet, and what it shows in words; "" where other words beside it say so."""
        height, width = pixels.shape[:2]
        key, name = (pixels.shape, pixels.tobytes()), f"sheet-{len(self._ids)}"
        if key in self._ids:
            drawn = tag("use", href=f"#{self._ids[key]}")
        else:
            drawn = tag("image", href=data_uri(pixels), width=width, height=height, id=name)
            self._ids[key] = name
        said = {"role": "img", "aria_label": alt} if alt else {"aria_hidden": "true"}
        return tag("svg", drawn, viewBox=f"0 0 {width} {height}", style=_shown(width), **said)


def _shown(pixels: int) -> str:
    return f"width:{shown_width(pixels)}px"
