"""Colours for classes that have none: far apart where an overlay shows them over an image."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.spatial.distance import cdist

COVER = 0.55  # of a class's colour over the image
GREY = 128  # the image below, as far from dark as from bright ones


def complete_palette(colours: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The palette `(K, 3)` uint8 of these RGB colours, each None replaced.

    In order, by the colour that is farthest, covering grey in CIELAB, from the nearest of all others: the
    given ones, those before, black, white and the bare image. The first of equally far ones, on any machine.
    """
    palette = np.array([[GREY] * 3 if colour is None else colour for colour in colours], np.uint8)
    candidates = np.array([*product(range(0, 256, 17), repeat=3)])  # (4096, 3)
    points, given = covered_lab(candidates), [colour for colour in colours if colour is not None]
    nearest = cdist(points, covered_lab(np.array([[0] * 3, [GREY] * 3, [255] * 3, *given]))).min(axis=1)
    for i in [i for i, colour in enumerate(colours) if colour is None]:
        farthest = nearest.round(6).argmax()
        palette[i] = candidates[farthest]
        nearest = np.minimum(nearest, cdist(points, points[[farthest]])[:, 0])
    return palette


def covered_lab(colours: np.ndarray) -> np.ndarray:
    """sRGB `(n, 3)` 0..255, covering grey, in CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    x = (COVER * colours + (1 - COVER) * GREY) / 255  # above 0.04, where sRGB is a power
    linear = ((x + 0.055) / 1.055) ** 2.4
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089]).T  # shares of white above 0.009, where CIELAB is a root
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
