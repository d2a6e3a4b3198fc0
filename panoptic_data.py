"""Panoptic data sets: COCO's in its official layout, the user's own in the same form, the drawn scenes.

    dataset = open_panoptic("coco-panoptic", "data/coco", "train")
    print(check(dataset))                                # of data.py, as for every data set
    picture, ids, segments = dataset.panoptic(0)
    picture, labels = dataset.load(0)                    # the classes alone: all of data.py's ways work too

COCO (cocodataset.org, panoptic_annotations_trainval2017.zip and its inner zips) lies as

    coco/annotations/panoptic_train2017.json    coco/annotations/panoptic_train2017/000000000009.png
    coco/train2017/000000000009.jpg             and the same of val2017

Your own data, `panoptic`, is a folder with `panoptic_train.json`, `train/` and so on in these places. Say a
street, 4 x 2 pixels, with two cars side by side, on it; and a picture with the street alone. The ids are your
choice within a picture; 0 is void: pixels of which nothing is known.

    annotations/panoptic_train/one.png      1 1 2 2      annotations/panoptic_train/two.png      7 7 7 7
    (R; G and B are 0)                      3 3 3 3                                              7 7 0 0

    annotations/panoptic_train.json, beside the pictures train/one.jpg and train/two.jpg:
    {"categories": [{"id": 1, "name": "car", "isthing": 1, "color": [0, 0, 142]},
                    {"id": 2, "name": "street", "isthing": 0, "color": [128, 64, 128]}],
     "images": [{"id": 1, "file_name": "one.jpg", "height": 2, "width": 4},
                {"id": 2, "file_name": "two.jpg", "height": 2, "width": 4}],
     "annotations": [{"image_id": 1, "file_name": "one.png", "segments_info":
                      [{"id": 1, "category_id": 1},
                       {"id": 2, "category_id": 1},
                       {"id": 3, "category_id": 2}]},
                     {"image_id": 2, "file_name": "two.png", "segments_info":
                      [{"id": 7, "category_id": 2}]}]}

Training and evaluation need `train` and `val`. A segment may say `"iscrowd": 1`; "color" may be left out.

Top to bottom: what every panoptic data set offers, the one on disk, the scenes, what opens them.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import Dataset, Sample, prompt
from errors import DataError
from images.panoptic import Categories, Segment, read_annotations, semantic
from images.read import PICTURES, read_picture


class PanopticSample(NamedTuple):
    """One picture and its truth."""

    image: Image.Image  # RGB, perhaps reduced (`read_picture`)
    ids: np.ndarray  # (H, W) int32 at the picture's own size, 0 = void
    segments: list[Segment]


class PanopticDataset(Dataset):
    """One split, in order of its pictures' names, which is the order of `image_ids`."""

    def __init__(self, name: str, split: str, categories: Categories, image_ids: list[int | str]):
        super().__init__(name, split, categories.names, categories.palette)
        self.categories, self.image_ids = categories, image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def panoptic(self, i: int, short: int | None = None, long: int | None = None) -> PanopticSample:
        """Picture `i` and its segments; a large JPEG comes reduced as in `load`. Raises DataError."""
        raise NotImplementedError

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        """Picture `i` and its classes alone `(H, W)` uint8, 255 = void; crowds have their class."""
        image, ids, segments = self.panoptic(i, short, long)
        return image, semantic(ids, segments)


# ---- on disk ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanopticLayout:
    """How a data set lies on disk; its JSON and PNGs are annotations/panoptic_{split}."""

    root: str  # the folder's official name
    splits: dict[str, str]  # our name of a split -> that of its pictures' folder


PANOPTIC_LAYOUTS = {
    "coco-panoptic": PanopticLayout("coco", {"train": "train2017", "val": "val2017"}),
    "panoptic": PanopticLayout(
        "the folder that holds annotations, train and val", {"train": "train", "val": "val"}
    ),
}


class PanopticFiles(PanopticDataset):
    """A panoptic data set that lies on disk. Its JSON is read at once, pictures and PNGs when asked for."""

    def __init__(self, name: str, root: Path, split: str):
        self.root, self.folder = root, PANOPTIC_LAYOUTS[name].splits[split]
        self.pngs = root / "annotations" / f"panoptic_{self.folder}"
        self.annotations = read_annotations(self.pngs.with_name(self.pngs.name + ".json"))
        super().__init__(name, split, self.annotations.categories, self.annotations.image_ids)
        if name == "coco-panoptic":  # COCO-Stuff's names, where several of its classes are merged into one
            self.prompts = [prompt(c.removesuffix("-merged"), "cocostuff") for c in self.classes]
        on_disk = {folder: set(os.listdir(folder)) for folder in (root / self.folder, self.pngs)}
        both = [file for i in range(len(self)) for file in self.pair(i)]
        self.lost = {
            file
            for file in both
            if not (file.name in on_disk[file.parent] if file.parent in on_disk else file.exists())
        }
        self.missing = [self.without(file) for file in both if file in self.lost]
        self.missing += [
            f"{root / self.folder / name} has no annotation in {self.annotations.file}"
            for name in sorted(on_disk[root / self.folder].difference(self.annotations.pictures))
            if name.lower().endswith(PICTURES) and not name.startswith(".")
        ]

    def path(self, i: int) -> str:
        return f"{self.folder}/{self.annotations.pictures[i]}"

    def pair(self, i: int) -> tuple[Path, Path]:
        """The picture and its PNG."""
        return self.root / self.path(i), self.pngs / self.annotations.pngs[i]

    def without(self, file: Path) -> str:
        return f"{file} is not there, but {self.annotations.file} lists it"

    def files(self, i: int) -> list[Path]:
        return [file for file in self.pair(i) if file not in self.lost]

    def panoptic(self, i: int, short: int | None = None, long: int | None = None) -> PanopticSample:
        picture, png = self.pair(i)
        for file in self.lost.intersection((picture, png)):
            raise DataError(self.without(file))
        image, size = read_picture(picture, short, long)
        segments = self.annotations.segments(i)
        ids = self.annotations.ids(i, self.pngs)
        if ids.shape != size:
            (H, W), (h, w) = size, ids.shape
            raise DataError(
                f"{png} is {w}x{h} and its picture, turned as its EXIF tag says, {W}x{H}: "
                "both need the same size"
            )
        return PanopticSample(image, ids, segments)


# ---- drawn -----------------------------------------------------------------------------------------------


class PanopticScenes(PanopticDataset):
    """The drawn data set with its instances as segments and each class of stuff as one; nothing is void."""

    def __init__(self, split: str):
        from images import scenes

        if split not in scenes.SPLITS:
            raise DataError(f"scenes has no split {split!r}: choose {', '.join(scenes.SPLITS)}")
        names = list(scenes.CLASSES)
        things = np.array([name in scenes.THINGS for name in names])
        categories = Categories(names, [*range(1, len(names) + 1)], np.array(scenes.PALETTE), things)
        super().__init__("scenes", split, categories, list(scenes.SPLITS[split]))

    def path(self, i: int) -> str:
        return f"scenes/{self.image_ids[i]:06d}"

    def files(self, i: int) -> list[Path]:
        return []

    def panoptic(self, i: int, short: int | None = None, long: int | None = None) -> PanopticSample:
        from images import scenes

        scene = scenes.draw(self.image_ids[i])
        n = int(scene.instances.max())  # the instances are 1..n; stuff comes after them, by class
        ids = np.where(scene.instances > 0, scene.instances, n + 1 + scene.labels.astype(np.int32))
        found, first = np.unique(ids, return_index=True)
        labels = scene.labels.ravel()[first].tolist()
        segments = [Segment(id, k, id <= n) for id, k in zip(found.tolist(), labels, strict=True)]
        return PanopticSample(Image.fromarray(scene.image), ids.astype(np.int32), segments)


def open_panoptic(name: str, root: str | Path, split: str) -> PanopticDataset:
    """The split "train" or "val" of "coco-panoptic" or "panoptic"; of "scenes" also "test".

    `root` is the folder that holds `annotations` (scenes need none). The JSON is read and checked; files are
    listed, not opened. Raises DataError if this is not the data set.
    """
    if name == "scenes":
        return PanopticScenes(split)
    if name not in PANOPTIC_LAYOUTS:
        raise DataError(
            f"there is no panoptic data set {name!r}: choose {', '.join(PANOPTIC_LAYOUTS)} or scenes"
        )
    layout, root = PANOPTIC_LAYOUTS[name], Path(root)
    if split not in layout.splits:
        raise DataError(f"{name} has no annotated split {split!r}: choose {' or '.join(layout.splits)}")
    folder = layout.splits[split]
    needed = [folder, f"annotations/panoptic_{folder}.json", f"annotations/panoptic_{folder}"]
    absent = [part for part in needed if not (root / part).exists()]
    if absent:
        inside = root / layout.root
        cure = f"give --data {inside}" if inside.is_dir() else f"--data must be {layout.root}"
        if f"annotations/panoptic_{folder}" in absent and len(absent) == 1:
            cure = f"unpack annotations/panoptic_{folder}.zip there"
        raise DataError(f"{root} is not {name}: {' and '.join(absent)} not found there; {cure}")
    return PanopticFiles(name, root, split)
