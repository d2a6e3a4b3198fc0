"""Images with dense labels: data sets as their authors publish them, and one's own.

    dataset = open_dataset("ade20k", "data/ADEChallengeData2016", "train")
    image, labels, ids, segments = dataset.load(0)  # ids and segments where the data set has instances

Images are 8-bit RGB; labels are uint8 `(H, W)` with classes 0..K-1 and 255 = ignore.

docs/using.md describes the layout of one's own, `folder` and `panoptic`, with examples.

Top to bottom: the layouts, the data sets, what opens them. Decoding is in images/read.py, tables of classes
in images/classes.py, the check before training in loading/check.py, augmentation in loading/augment.py.
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from errors import DataError
from images import scenes
from images.classes import read_classes
from images.panoptic import Categories, Segment, read_annotations, read_map, semantic
from images.read import LOSSLESS, SHOWN, SUFFIXES, Size, label_table, read_image, read_labels, scan, spelling

TRAIN_IDS = "_labelTrainIds"  # label files with this ending already hold 0..K-1


class Sample(NamedTuple):
    """One image and its labels; ids and segments where the data set has instances."""

    image: Image.Image  # RGB, perhaps reduced (`read_image`)
    labels: np.ndarray  # (H, W) uint8 at the image's own size, 255 = ignore
    ids: np.ndarray | None = None  # (H, W) int32, 0 = void
    segments: Sequence[Segment] = ()


@dataclass(frozen=True)
class Layout:
    """A data set's folders as published (mmsegmentation's docs/en/dataset_prepare.md; cocodataset.org)."""

    root: str  # its official name
    images: str  # folders below the root, with {} for the split
    labels: str
    splits: dict[str, str]  # our name of a split -> theirs
    image: str = ""  # the ending of an image's name before its extension
    label: tuple[str, ...] = ("",)  # the endings of a label's name, the preferred one first
    ignored: range = range(0)  # raw values that are legal although no class has them
    hint: str = ""  # what a label file that does not fit usually is
    panoptic: bool = False  # a JSON and PNGs of COCO's panoptic format


SAME, COCO = {"train": "train", "val": "val"}, {"train": "train2017", "val": "val2017"}
PNGS = "annotations/panoptic_{}"
LAYOUTS = {
    "ade20k": Layout(
        root="ADEChallengeData2016",
        images="images/{}",
        labels="annotations/{}",
        splits={"train": "training", "val": "validation"},
        ignored=range(1),  # 0: other objects
        hint="; the RGB *_seg.png of the full ADE20K are another format, use ADEChallengeData2016",
    ),
    "cocostuff": Layout(
        root="coco_stuff164k",
        images="images/{}",
        labels="annotations/{}",
        splits=COCO,
        label=("", TRAIN_IDS),
        hint="; the 10k version and the API's examples number otherwise, use stuffthingmaps_trainval2017.zip",
    ),
    "cityscapes": Layout(
        root="cityscapes",
        images="leftImg8bit/{}",
        labels="gtFine/{}",
        splits=SAME,
        image="_leftImg8bit",
        label=(f"_gtFine{TRAIN_IDS}", "_gtFine_labelIds"),
        ignored=range(34),  # the labelIds; labels/cityscapes.txt lists the 19 that are evaluated
    ),
    "folder": Layout("the folder that holds images, labels and classes.txt", "images/{}", "labels/{}", SAME),
    "coco-panoptic": Layout("coco", "{}", PNGS, COCO, panoptic=True),
    "panoptic": Layout("the folder of annotations, train and val", "{}", PNGS, SAME, panoptic=True),
}

# COCO-Stuff's compounds are "thing-kind"; these are not, or would read badly.
IRREGULAR = {
    "window-blind": "window blind",
    "structural-other": "structure",
    "playingfield": "playing field",
    "waterdrops": "water drops",
}

# Label files that are not read -> why, and the cure.
LOSSY = "which changes class numbers: save labels as PNG"
DRAWN = "which holds boxes or polygons: export label images (PNG) from the label tool"
ARRAY = "which holds an array: save labels as PNG"
UNREAD = dict.fromkeys((".jpg", ".jpeg", ".gif", ".webp", ".avif"), LOSSY)
UNREAD |= dict.fromkeys((".json", ".txt", ".xml"), DRAWN) | dict.fromkeys((".npy", ".npz", ".mat"), ARRAY)


@dataclass(eq=False)
class Dataset:
    """One split: `classes` as shown, `prompts` as a text tower reads them, `palette (K, 3)`, its images.

    `paths` are relative to the root, with "/": the keys of tag files. `categories` are the classes as things
    and stuff, None without instances; `image_ids` then name the images in COCO's files.
    """

    name: str
    split: str
    classes: list[str]
    palette: np.ndarray
    paths: Sequence[str]
    categories: Categories | None = None
    image_ids: Sequence[int | str] = ()

    def __post_init__(self) -> None:
        self.prompts = [prompt(c, self.name) for c in self.classes]
        self.missing: list[str] = []  # a sentence for each image or label file without its counterpart
        self.tables: list[str] = []  # the files that describe all samples

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, i: int) -> list[str]:
        """The files of sample `i` that exist, as text: a Path takes longer to make than to look up."""
        return []

    def png(self, i: int) -> str:
        """The name of sample `i`'s PNG in COCO's panoptic files."""
        return "/".join(self.paths[i].split("/")[1:]) + ".png"

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        """Sample `i`. Raises DataError with the path.

        With the box (short, long) that it will be resized into, a large JPEG comes reduced (see
        `read_image`). The labels never do: their shape is the image's own.
        """
        raise NotImplementedError


class SemanticFiles(Dataset):
    """A data set on disk: an image and a label map per sample."""

    def __init__(self, name: str, root: Path, split: str):
        layout = LAYOUTS[name]
        table = root / "classes.txt" if name == "folder" else Path(__file__).parent / "labels" / f"{name}.txt"
        classes = read_classes(table)
        self.root, self.hint = root, layout.hint
        self.raw_ids = label_table(classes.values, classes.ignored or layout.ignored)
        self.train_ids = label_table(range(len(classes.names)), ())
        self.colours = classes.colours if name == "folder" else None
        folder = layout.images.format(layout.splits[split])
        images = composed(scan(root, folder, SUFFIXES, (layout.image,)))
        place = layout.labels.format(layout.splits[split])
        labels = composed(scan(root, place, LOSSLESS, layout.label))
        if not images:
            raise DataError(f"{root / folder} holds no image *{layout.image}.jpg, .png, ...: check --data")
        keys = sorted(images)
        self.labels = [labels.get(key) for key in keys]
        super().__init__(name, split, classes.names, classes.palette, [images[key] for key in keys])
        self.tables = [f"{table}"] if name == "folder" else []
        self.unread: dict[str, str] = {}  # image -> a label file that is not read
        for suffix in UNREAD if None in self.labels else ():
            others = scan(root, place, (suffix,), layout.label)
            if UNREAD[suffix] == DRAWN:
                others = scan(root, folder, (suffix,), (layout.image,)) | others  # labelme's place
            self.unread |= {images[key]: file for key, file in composed(others).items() if key in images}
        self.missing = [self.unlabelled(i) for i, label in enumerate(self.labels) if label is None]
        self.missing += [f"{root / labels[key]} has no image" for key in sorted(labels) if key not in images]

    def unlabelled(self, i: int) -> str:
        sentence = f"{self.root / self.paths[i]} has no label file"
        if (file := self.unread.get(self.paths[i])) is None:
            return sentence
        return f"{sentence} that is read, only {self.root / file}, {UNREAD[Path(file).suffix.lower()]}"

    def names(self, i: int) -> list[str]:
        return [f"{self.root}/{file}" for file in (self.paths[i], self.labels[i]) if file]

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        path, label = self.paths[i], self.labels[i]
        if label is None:
            raise DataError(self.unlabelled(i))
        image, size = read_image(self.root / path, short, long)
        table = self.train_ids if Path(label).stem.endswith(TRAIN_IDS) else self.raw_ids
        labels = read_labels(self.root / label, table, self.hint, self.colours)
        require_size(self.root / label, labels, size)
        return Sample(image, labels)


class PanopticFiles(Dataset):
    """A panoptic data set on disk, in order of its images' names. The JSON is read at once."""

    def __init__(self, name: str, root: Path, split: str):
        folder = LAYOUTS[name].splits[split]
        self.root, self.pngs = root, root / LAYOUTS[name].labels.format(folder)
        self.annotations = a = read_annotations(self.pngs.with_name(self.pngs.name + ".json"))
        images, pngs = ({*os.listdir(place)} for place in (root / folder, self.pngs))
        files = [spelling(name, root / folder, images) for name in a.file_names]
        self.png_names = [spelling(name, self.pngs, pngs) for name in a.pngs]
        paths, kinds = [f"{folder}/{file}" for file in files], a.categories
        super().__init__(name, split, kinds.names, kinds.palette, paths, kinds, a.image_ids)
        self.tables = [f"{a.file}"]
        if name == "coco-panoptic":  # COCO-Stuff's names, where several of its classes are merged into one
            self.prompts = [prompt(c.removesuffix("-merged"), "cocostuff") for c in self.classes]
        names = enumerate(zip(files, self.png_names, strict=True))
        unseen = [i for i, (image, png) in names if image not in images or png not in pngs]
        listed = [file for i in unseen for file in self.pair(i)]  # these may be in subfolders
        self.lost = {file for file in listed if not file.exists()}
        self.missing = [self.without(file) for file in listed if file in self.lost]
        self.missing += [
            f"{root / folder / name} has no annotation in {a.file}"
            for name in sorted(images.difference(files))
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]

    def png(self, i: int) -> str:
        return self.png_names[i]

    def pair(self, i: int) -> tuple[Path, Path]:
        """The image and its PNG."""
        return self.root / self.paths[i], self.pngs / self.png(i)

    def without(self, file: Path) -> str:
        return f"{file} does not exist, but {self.annotations.file} lists it"

    def names(self, i: int) -> list[str]:
        names = f"{self.root}/{self.paths[i]}", f"{self.pngs}/{self.png(i)}"
        return [name for name in names if not self.lost or Path(name) not in self.lost]

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        path, png = self.pair(i)
        for file in self.lost.intersection((path, png)):
            raise DataError(self.without(file))
        image, size = read_image(path, short, long)
        segments = self.annotations.segments(i)
        ids = read_map(png, segments)
        require_size(png, ids, size)
        return Sample(image, semantic(ids, segments), ids, segments)


class Scenes(Dataset):
    """The drawn data set, without files; `path` is "scenes/" and the index that `scenes.draw` takes.

    Its instances are segments, each class of stuff is one; nothing is void.
    """

    def __init__(self, split: str):
        names, palette = list(scenes.CLASSES), np.array(scenes.PALETTE, np.uint8)
        things = np.array([name in scenes.THINGS for name in names])
        categories = Categories(names, [*range(1, len(names) + 1)], palette, things)
        indices = list(scenes.SPLITS[split])
        paths = [f"scenes/{index:06d}" for index in indices]
        super().__init__("scenes", split, names, palette, paths, categories, indices)

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        scene = scenes.draw(self.image_ids[i])
        n = int(scene.instances.max())  # the instances are 1..n; stuff comes after them, by class
        ids = np.where(scene.instances > 0, scene.instances, n + 1 + scene.labels.astype(np.int32))
        unique, first = np.unique(ids, return_index=True)
        labels = scene.labels.ravel()[first].tolist()
        segments = [Segment(id, k, id <= n) for id, k in zip(unique.tolist(), labels, strict=True)]
        return Sample(Image.fromarray(scene.image), np.array(scene.labels), ids.astype(np.int32), segments)


def composed(files: dict[str, str]) -> dict[str, str]:
    """`scan`'s files with their keys in one Unicode composition: "é" may be written as "e" and an accent."""
    result = {}
    for key, file in files.items():
        if (other := result.setdefault(unicodedata.normalize("NFC", key), file)) != file:
            raise DataError(f"{other!a} and {file!a} differ only in their Unicode composition: rename one")
    return result


def require_size(file: Path, labels: np.ndarray, size: Size) -> None:
    """Raise DataError unless labels `(H, W)` have the size of their image."""
    if labels.shape != size:
        (H, W), (h, w) = size, labels.shape
        image = f"its image, turned as its EXIF tag says, {W}x{H}"
        raise DataError(f"{file} is {w}x{h} and {image}: both need the same size")


def open_dataset(name: str, root: str | Path, split: str) -> Dataset:
    """Open the split "train" or "val" of a data set of `LAYOUTS`; of "scenes" also "test".

    `root` is the folder that the data set's authors name (scenes need none). Files are listed, not opened,
    except tables of classes and a panoptic JSON. Raises DataError if this is not the data set, or a table
    cannot be read.
    """
    if name != "scenes" and name not in LAYOUTS:
        raise DataError(f"no data set {name!r}: choose {', '.join(LAYOUTS)} or scenes; your own is a folder")
    splits = scenes.SPLITS if name == "scenes" else LAYOUTS[name].splits
    if split not in splits:
        raise DataError(f"{name} has no labelled split {split!r}: choose {', '.join(splits)}")
    if name == "scenes":
        return Scenes(split)
    layout, root = LAYOUTS[name], Path(root)
    images, labels = (part.format(layout.splits[split]) for part in (layout.images, layout.labels))
    needed = [images, f"{labels}.json", labels] if layout.panoptic else [images, labels]
    needed += ["classes.txt"] if name == "folder" else []
    absent = [part for part in needed if not (root / part).exists()]
    if absent:
        inside = root / layout.root
        cure = f"give --data {inside}" if inside.is_dir() else f"--data must be {layout.root}"
        if layout.panoptic and absent == [labels]:
            cure = f"unpack {labels}.zip there"
        elif root.is_dir() and not inside.is_dir():
            parts = {part.replace(layout.splits[split], x) for x in layout.splits.values() for part in needed}
            expected = listing(part if "." in part else f"{part}/" for part in parts)
            cure += f"\n  expected: {expected}\n  found:    {tree(root)}"
        fault = (
            f"is not {name}: {' and '.join(absent)} not found there;" if root.exists() else "does not exist:"
        )
        raise DataError(f"{root} {fault} {cure}")
    return (PanopticFiles if layout.panoptic else SemanticFiles)(name, root, split)


def tree(root: Path) -> str:
    """What a folder holds in two levels, without what is hidden and files below."""
    paths = {x for form in ("[!.]*", "[!.]*/[!.]*/", "[!.]*/[!.]*.json") for x in root.glob(form)}
    leaves = paths - {x.parent for x in paths}
    return listing(f"{x.relative_to(root).as_posix()}{'/' * x.is_dir()}" for x in leaves) or "nothing"


def listing(names: Iterable[str]) -> str:
    """Names in order, folders first; at most SHOWN."""
    names = sorted(names, key=lambda name: (not name.endswith("/"), name))
    return "  ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN))


def default_data(name: str) -> str:
    """The default folder of a data set; "" for one's own data, which has none."""
    own = {"scenes": "scenes", "folder": "", "panoptic": ""}
    return own[name] if name in own else f"data/{LAYOUTS[name].root}"


def prompt(name: str, dataset: str) -> str:
    """A class name as a text tower should read it: "floor-wood" -> "wood floor", "sky-other" -> "sky"."""
    if dataset == "cocostuff" and name in IRREGULAR:
        return IRREGULAR[name]
    if dataset == "cocostuff" and "-" in name:
        thing, kind = name.split("-")
        return thing if kind in ("other", "stuff") else f"{kind} {thing}"
    return name.replace("_", " ")
