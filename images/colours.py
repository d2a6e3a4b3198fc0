"""Colours for classes that have none: far apart where an overlay shows them over an image."""

from collections.abc import Sequence
from itertools import product

import numpy as np

COVER = 0.55  # of a class's colour over the image
GREY = 128  # the image below, as far from dark as from bright ones
LEVELS = range(0, 256, 17)  # of each channel of the colours to choose from


def complete_palette(colours: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The palette `(K, 3)` uint8 of these RGB colours, each None replaced.

    Each is the colour whose covered form is farthest from those of all others so far, of the given colours,
    and of black, white and the bare image. The same on every machine: ties go to the first.
    """
    candidates = np.array([*product(LEVELS, repeat=3)])  # (4096, 3)
    known = [colour for colour in colours if colour is not None]
    start = np.array([[0] * 3, [GREY] * 3, [255] * 3, *known])
    points, nearest = cielab(covered(candidates)), np.full(len(candidates), np.inf)

    def exclude(point: np.ndarray) -> None:
        np.minimum(nearest, np.linalg.norm(points - point, axis=1), out=nearest)

    for point in cielab(covered(start)):
        exclude(point)
    palette = []
    for colour in colours:
        if colour is None:
            farthest = int(nearest.round(6).argmax())
            colour = candidates[farthest]
            exclude(points[farthest])
        palette.append(colour)
    return np.array(palette, np.uint8)


def covered(colours: np.ndarray) -> np.ndarray:
    """The colours `(n, 3)` as an overlay shows them over grey."""
    return COVER * colours + (1 - COVER) * GREY


def cielab(colours: np.ndarray) -> np.ndarray:
    """sRGB `(n, 3)`, 0..255, in CIELAB under D65: IEC 61966-2-1 and CIE 15."""
    x = colours / 255
    x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    xyz = x @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz /= [0.9505, 1, 1.089]  # white
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
