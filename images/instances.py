"""COCO's instances: polygons or run lengths (RLE), which may overlap, painted into one map of ids."""

from collections.abc import Sequence

import numpy as np

from errors import DataError
from images.read import MAX_PIXELS, Size


def pycocotools(module: str):
    """A module of pycocotools."""
    try:
        return __import__(f"pycocotools.{module}", fromlist=[module])
    except ImportError:
        raise DataError("AP and COCO's instances need pycocotools: pip install pycocotools") from None


def paint(objects: Sequence[tuple[str, dict]], size: Size, where: str) -> tuple[np.ndarray, dict[int, dict]]:
    """The objects of one image as a map of ids `(H, W)` int32, 0 where none is, and each visible id's object.

    objects: a place for messages, and the entry of COCO's JSON. Of those that overlap the smaller one is on
    top, and any is above a crowd. Raises DataError.
    """
    mask, (H, W) = pycocotools("mask"), size
    if not all(isinstance(x, int) and x > 0 for x in size) or H * W > MAX_PIXELS:
        raise DataError(f'{where} needs "height" and "width", at most {MAX_PIXELS:,} pixels, not {H} and {W}')
    painted = []
    for place, entry in objects:
        shape = entry["segmentation"]
        try:
            if isinstance(shape, list):
                polygons = [x for x in shape if len(x) >= 6]  # pycocotools takes four numbers for a box
                if not all(abs(x) <= 2 * (H + W) for polygon in polygons for x in polygon):
                    raise ValueError(f"with a point far outside of {W}x{H} pixels")  # it would trace the way
                shape = mask.merge(mask.frPyObjects(polygons, H, W)) if polygons else None
            elif [*shape["size"]] != [H, W]:
                raise ValueError(f"of the size {shape['size']}, the image has {[H, W]}")
            elif isinstance(shape["counts"], list):
                if sum(shape["counts"]) != H * W:
                    raise ValueError(f"of {sum(shape['counts'])} pixels, the image has {H * W}")
                shape = mask.frPyObjects(shape, H, W)
            painted.append((entry, np.flatnonzero(mask.decode(shape)) if shape else []))
        except Exception as error:  # noqa: BLE001 - pycocotools raises anything
            form = "polygons [[x, y, x, y, ...], ...] or RLE of the image's size"
            fault = error if isinstance(error, ValueError) else f"it is {str(shape)[:80]}"
            raise DataError(f'{place}: "segmentation" must be {form} ({fault})') from None
    painted.sort(key=lambda x: (x[0].get("iscrowd", 0) != 1, -len(x[1])))
    ids = np.zeros(H * W, np.int32)
    for id, (_, pixels) in enumerate(painted, 1):
        ids[pixels] = id
    visible = {id: painted[id - 1][0] for id in np.unique(ids).tolist() if id}
    return ids.reshape(size), visible
