"""images/colours.py: own classes' colours as an overlay shows them, measured by LittleCMS."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from images.colours import complete_palette


def distances(palette: np.ndarray) -> np.ndarray:
    """CIELAB distances `(K, K)` of the colours at 55 % over mid grey; the diagonal is infinite."""
    covered = (0.55 * palette + 0.45 * 128).round().astype(np.uint8)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(covered[None]), *profiles, outputMode="LAB")
    lab = np.asarray(image)[0].astype(np.float64)
    lab = np.stack([lab[:, 0] / 2.55, *(np.where(x > 127, x - 256, x) for x in lab[:, 1:].T)], axis=1)
    return np.linalg.norm(lab[:, None] - lab, axis=2) + np.diag(np.full(len(lab), np.inf))


@pytest.mark.parametrize(("n", "least"), [(2, 60), (20, 25), (60, 14), (255, 6)])
def test_colours_of_own_classes_stay_apart_under_cover(n, least):
    """PASCAL VOC's first 20 come as near as 10, its first 60 as 8.6; 2.3 is just noticeable."""
    palette = complete_palette([None] * n)
    assert palette.shape == (n, 3) and palette.dtype == np.uint8
    assert distances(palette).min() >= least


def test_colours_do_not_depend_on_the_classes_that_follow():
    assert np.array_equal(complete_palette([None] * 60)[:20], complete_palette([None] * 20))


def test_given_colours_stay_and_are_avoided():
    """Also those of later lines; black, white and the bare image are taken from the start."""
    first = complete_palette([None] * 12).tolist()
    palette = complete_palette([None] * 12 + first)
    assert palette[12:].tolist() == first
    assert distances(palette).min() >= 20
    bare = np.array([[0] * 3, [128] * 3, [255] * 3], np.uint8)
    assert distances(np.concatenate([bare, palette])).min() >= 20
