"""Panoptic segmentation: its format on disk.

A panoptic image (Kirillov et al. 2019, arXiv:1801.00868) is a map of ids `(H, W)` int32 and a list of
segments. Each pixel has the id of one segment, or 0 = void: unlabelled. A segment of a thing
is one object; a segment of stuff is all that the image shows of its class; a crowd is a group of things
that were not separated. COCO writes the ids of an image as the colours of a PNG,

    id = R + 256 G + 65536 B,

and the segments of all images into one JSON: `images`, `categories`, and for each image an annotation
{"image_id", "file_name": PNG, "segments_info": [{"id", "category_id", "iscrowd", "area", "bbox"}, ...]}.

Other objects that overlap, COCO's instances, become such images by

    python -m images.panoptic --from-instances INSTANCES.json --out ROOT/annotations/panoptic_train.json

Top to bottom: segments, the ids of a PNG, the JSON read and written, panoptic segments from a map of classes,
and from COCO's instances. The measures are in metrics/quality.py.
"""

import json
import os
import posixpath
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import DataError, Parser, run_command
from images.colours import complete_palette
from images.instances import paint
from images.read import IGNORE, decode, reading, spelling
from run.files import read_bytes, replace_text

VOID = 0  # the id of pixels without a segment
LARGEST_ID = 256**3 - 1  # that a colour can hold


class Segment(NamedTuple):
    """One segment of an image, of the truth or of a prediction."""

    id: int  # in the map of ids, 1..LARGEST_ID
    label: int  # class 0..K-1
    thing: bool
    crowd: bool = False


def runs(*maps: np.ndarray) -> list[np.ndarray]:
    """Of maps of one size, the runs of pixels along the rows where none of them changes.

    Returns the values of each map, one a run, and the lengths of the runs. An image of 2,000 segments has a
    fifth as many runs as pixels: they are quick to sort, to count and to look up.
    """
    flat = [x.ravel() for x in maps]
    changes = np.logical_or.reduce([x[1:] != x[:-1] for x in flat])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])[: flat[0].size]
    return [*(x[starts] for x in flat), np.diff(starts, append=flat[0].size)]


def positions(ids: np.ndarray, segments: Sequence) -> np.ndarray:
    """`(H, W)` int32: the index into `segments` of each pixel's segment, -1 for none of them."""
    values, lengths = runs(ids)
    return np.repeat(index(values, segments), lengths).reshape(ids.shape)


def index(ids: np.ndarray, segments: Sequence) -> np.ndarray:
    """`positions` of a list of ids, without a look at runs."""
    known = np.array([s.id for s in segments] or [-1])  # no id is negative
    order = known.argsort()
    place = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[place] == ids, place, -1).astype(np.int32)


def semantic(ids: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """The classes `(H, W)` uint8 of a map of ids, crowds included; 255 = ignore where no segment is."""
    labels = np.array([s.label for s in segments] + [IGNORE], np.uint8)  # the last is that of -1
    return labels[positions(ids, segments)]


def from_colours(colours: np.ndarray) -> np.ndarray:
    """RGB `(H, W, 3)` uint8 -> ids `(H, W)` int32."""
    r, g, b = np.moveaxis(colours, 2, 0)
    return r | g.astype(np.int32) << 8 | b.astype(np.int32) << 16


def to_colours(ids: np.ndarray) -> np.ndarray:
    """Ids `(H, W)` in 0..LARGEST_ID -> RGB `(H, W, 3)` uint8."""
    return np.stack([ids, ids >> 8, ids >> 16], axis=2).astype(np.uint8)


def read_map(path: Path, segments: Sequence[Segment]) -> np.ndarray:
    """The ids `(H, W)` int32 of a PNG. Raises DataError if `segments` differ."""
    with reading(path) as file:
        image, *_ = decode(file, labels=True)
    if image.mode != "RGB":
        form = "a panoptic PNG is RGB, its id is R + 256 G + 65536 B"
        raise DataError(f"{path} has mode {image.mode}: {form}")
    ids = from_colours(np.asarray(image))
    found, listed = set(np.unique(runs(ids)[0]).tolist()), [s.id for s in segments]
    if unlisted := found.difference(listed, [VOID]):
        raise DataError(f"{path} holds the id {min(unlisted)}, which its segments_info does not list: add it")
    if absent := [id for id in listed if id not in found]:
        raise DataError(f"{path} has no pixel of the id {absent[0]} that its segments_info lists: remove it")
    return ids


@dataclass(frozen=True)
class Categories:
    """The K classes of a panoptic JSON in its order, which is that of the labels 0..K-1."""

    names: list[str]
    ids: list[int]  # `category_id`: COCO's go to 200 with gaps
    palette: np.ndarray  # (K, 3) uint8
    things: np.ndarray  # (K,) bool

    def as_json(self) -> list[dict]:
        return [
            {"id": id, "name": name, "isthing": int(thing), "color": list(map(int, colour))}
            for id, name, thing, colour in zip(self.ids, self.names, self.things, self.palette, strict=True)
        ]


@dataclass(frozen=True)
class Annotations:
    """A panoptic JSON: n images that have an annotation, by the names of the images' files.

    The segments of all of them are one array: millions of small objects would be copied into every process
    that loads images.
    """

    file: Path
    categories: Categories
    image_ids: list[int | str]
    file_names: list[str]  # of the images
    pngs: list[str]  # `file_name` of the annotation
    table: np.ndarray  # (all segments, 3) int32: id, label, crowd
    starts: np.ndarray  # (n + 1,) where the segments of an image begin

    def __len__(self) -> int:
        return len(self.file_names)

    def segments(self, i: int) -> list[Segment]:
        ids, labels, crowds = self.table[self.starts[i] : self.starts[i + 1]].T
        columns = ids, labels, self.categories.things[labels], crowds > 0
        return [*map(Segment, *(x.tolist() for x in columns))]

    def ids(self, i: int, folder: Path) -> np.ndarray:
        """The map of ids of image i, `(H, W)` int32."""
        return read_map(folder / spelling(self.pngs[i], folder), self.segments(i))


def read_annotations(file: str | Path, truth: Annotations | None = None) -> Annotations:
    """Read a panoptic JSON of COCO's form. Raises DataError with the file, the value and the cure.

    A prediction may have annotations alone: its categories and images are then those of the `truth`.
    """
    file, given = Path(file), {}
    if truth is not None:
        names = zip(truth.image_ids, truth.file_names, strict=True)
        given["images"] = [{"id": id, "file_name": name} for id, name in names]
        given["categories"] = truth.categories.as_json()
    content = read_lists(file, given)
    categories = read_categories(content, file)
    names = {id: entry["file_name"] for id, entry in read_images(content, file).items()}
    label_of = {id: k for k, id in enumerate(categories.ids)}
    annotated = {}  # the id of an image -> its name, PNG and segments
    for where, entry in entries_of(content, "annotations", file):
        id, png = entry["image_id"], entry["file_name"]
        if id not in names:
            raise DataError(f"{where}: there is no image with the id {id!r}")
        if id in annotated:
            raise DataError(f"{where}: the image {id!r} has two annotations")
        png = inside(png, where, "PNGs")
        annotated[id] = names[id], png, read_segments(entry["segments_info"], label_of, where)
    if not annotated:
        raise DataError(f"{file} has no annotation: it needs one for each image")
    image_ids = sorted(annotated, key=lambda id: (annotated[id][0], str(id)))
    file_names, pngs, tables = map(list, zip(*(annotated[id] for id in image_ids), strict=True))
    starts = np.cumsum([0, *map(len, tables)])
    return Annotations(file, categories, image_ids, file_names, pngs, np.concatenate(tables), starts)


def read_lists(file: Path, given: dict | None = None) -> dict:
    """The lists of a JSON, or those `given` where it has none. A number such as 1.0 is the int 1."""
    try:
        content = json.loads(read_bytes(file), parse_float=whole)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): give a panoptic JSON") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}): give a panoptic JSON") from None
    content = (given or {}) | content if isinstance(content, dict) else {}
    if not all(isinstance(content.get(key), list) for key in ENTRIES):
        raise DataError(f"{file} must be an object with the lists {', '.join(ENTRIES)}")
    return content


def whole(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def inside(name: str, where: str, what: str) -> str:
    """A `file_name` without "./". Raises DataError if it leads out of the folder of images or PNGs."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{where}: the file_name {name!r} leads out of the {what}' folder: give one in it")
    return posixpath.normpath(name)


ENTRIES = {  # what the entries of each list must have
    "categories": {"id": int, "name": str, "isthing": int | float},
    "images": {"id": int | str, "file_name": str},
    "annotations": {"image_id": int | str, "file_name": str, "segments_info": list},
}
INSTANCE = {"image_id": int | str, "category_id": int, "segmentation": list | dict}


def entries_of(content: dict, key: str, file: Path, form=None) -> Iterator[tuple[str, dict]]:
    """The entries of one list, each after its place as messages name it."""
    form = form or ENTRIES[key]
    for i, entry in enumerate(content[key]):
        where = f"{file}, {key}[{i}]"
        complete = isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in form.items())
        if not complete or entry.get("isthing", 0) not in (0, 1):
            needed = ", ".join(f'"{name}"' + " 0 or 1" * (name == "isthing") for name in form)
            cure = "; images.panoptic converts COCO's instances" * ("segments_info" in form)
            raise DataError(f"{where} must have {needed}, not {str(entry)[:80]}{cure}")
        yield where, entry


def read_images(content: dict, file: Path) -> dict[int | str, dict]:
    """The `images` by their ids, all numbers or all texts."""
    images = {}
    for where, entry in entries_of(content, "images", file):
        id = entry["id"]
        if id in images:
            raise DataError(f"{where}: the id {id!r} is a duplicate")
        entry["file_name"] = inside(entry["file_name"], where, "images")
        images[id] = entry
    if len(kinds := {type(id): id for id in images}) > 1:
        ids = " and ".join(map(repr, kinds.values()))
        raise DataError(f"{file} has images with the ids {ids}: write all as numbers, or all as texts")
    return images


def read_categories(content: dict, file: Path) -> Categories:
    """The `categories`; a class without a "color" gets its own."""
    classes, palette = {}, []
    for where, entry in entries_of(content, "categories", file):
        id, name, colour = entry["id"], entry["name"], entry.get("color") or None
        match colour:
            case None | [int(), int(), int()] if all(0 <= x <= 255 for x in colour or ()):
                palette.append(colour)
            case _:
                raise DataError(f'{where}: "color" must be [r, g, b] in 0..255, not {colour}')
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # no file or drawing could hold it
            raise DataError(f"{where}: the name {name!r} has half a character: write it anew")
        if id in classes or name in [other for other, _ in classes.values()]:
            raise DataError(f"{where}: the id {id} or the name {name!r} is a duplicate")
        classes[id] = name, bool(entry["isthing"])
    if not 1 <= len(classes) <= IGNORE:
        raise DataError(f"{file} has {len(classes)} categories: give 1 to {IGNORE}")
    names, things = zip(*classes.values(), strict=True)
    return Categories([*names], [*classes], complete_palette(palette), np.array(things))


def read_segments(infos: list, label_of: dict[int, int], where: str) -> np.ndarray:
    """`segments_info` as rows (id, label, crowd) int32."""
    rows, form = {}, f'a segment needs "category_id" and an "id" in 1..{LARGEST_ID}'
    for info in infos:
        match info:
            case {"id": int(id), "category_id": int(k)} if 1 <= id <= LARGEST_ID:
                if k not in label_of:
                    raise DataError(f"{where}: the category_id {k} of the segment {id} is not a category")
                if id in rows:
                    raise DataError(f"{where}: the id {id} is a duplicate")
                rows[id] = id, label_of[k], info.get("iscrowd", 0) == 1
            case _:
                raise DataError(f"{where}: {form}: {str(info)[:80]}")
    return np.array([*rows.values()], np.int32).reshape(-1, 3)


def write_ids(ids: np.ndarray, path: Path) -> None:
    """The map of ids as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a link
    Image.fromarray(to_colours(ids)).save(path)


def annotation(
    image_id: int | str, png: str, ids: np.ndarray, segments: Sequence, category_ids: Sequence[int]
) -> dict:
    """The JSON entry of one image whose ids `write_ids` wrote as `png`.

    `segments` is anything with `id` and `label`, such as a decoder's segments, where nothing is a crowd.
    """
    from scipy.ndimage import find_objects

    infos, place, nothing = [], positions(ids, segments) + 1, (slice(0), slice(0))
    areas = np.bincount(place.ravel(), minlength=len(segments) + 1)[1:].tolist()
    for s, area, box in zip(segments, areas, find_objects(place, len(segments)), strict=True):
        (top, bottom), (left, right) = ((side.start or 0, side.stop) for side in box or nothing)
        info = {"id": int(s.id), "category_id": int(category_ids[s.label]), "area": area}
        info |= {"iscrowd": int(getattr(s, "crowd", 0)), "bbox": [left, top, right - left, bottom - top]}
        infos.append(info)
    return {"image_id": image_id, "file_name": png, "segments_info": infos}


def write_annotations(file: Path, categories: Categories, images: list[dict], entries: list[dict]) -> None:
    """A panoptic JSON: `images` {"id", "file_name", "height", "width"}, `entries` from `annotation`.

    This and the folder of PNGs with the JSON's name are what COCO's server takes.
    """
    content = {"images": images, "annotations": entries, "categories": categories.as_json()}
    replace_text(Path(file), json.dumps(content))


def components(labels: np.ndarray, things: Sequence[bool]) -> tuple[np.ndarray, list[Segment]]:
    """A map of classes `(H, W)` as a panoptic prediction: every connected part of a thing is an instance.

    Stuff is one segment a class; pixels of 255 become void. This is what a semantic decoder can say, and what
    a panoptic one must beat. Things that touch are one to it.
    """
    from scipy.ndimage import find_objects
    from scipy.ndimage import label as connected

    ids, segments = np.zeros(labels.shape, np.int32), []
    for k, box in enumerate(find_objects(np.where(labels == IGNORE, 0, labels.astype(np.int32) + 1))):
        if box is None:
            continue
        mask = labels[box] == k
        parts, n = connected(mask) if things[k] else (mask.astype(np.int32), 1)  # 0 outside, then 1..n
        ids[box] += (len(segments) + parts) * mask
        segments += [Segment(len(segments) + i, k, bool(things[k])) for i in range(1, n + 1)]
    return ids, segments


def from_instances(file: Path, out: Path) -> tuple[int, int, int]:
    """Write COCO's instances in the panoptic form: the JSON `out`, and PNGs in the folder of its name.

    Every class is one of things, and pixels of no object are void; see `paint` for objects that overlap.
    Returns the numbers of images, of objects, and of those without a visible pixel. Raises DataError.
    """
    content = read_lists(file)
    content["categories"] = [x | {"isthing": 1} if isinstance(x, dict) else x for x in content["categories"]]
    categories, images = read_categories(content, file), read_images(content, file)
    label_of = {id: k for k, id in enumerate(categories.ids)}
    objects = {id: [] for id in images}
    for where, entry in entries_of(content, "annotations", file, INSTANCE):
        for key, known in (("image_id", images), ("category_id", label_of)):
            if entry[key] not in known:
                raise DataError(f"{where}: there is no {key} {entry[key]!r} in this file")
        objects[entry["image_id"]].append((where, entry))
    entries, pngs, hidden = [], {}, 0
    for id, image in tqdm(images.items(), "writing PNGs", disable=None):
        name, png = image["file_name"], f"{os.path.splitext(image['file_name'])[0]}.png"
        if (other := pngs.setdefault(png, name)) is not name:
            raise DataError(f"{file}: the images {other} and {name} would share {png}: rename one")
        size = image.get("height"), image.get("width")
        ids, visible = paint(objects[id], size, f"{file}: the image {name}")
        things = ((i, label_of[x["category_id"]], x.get("iscrowd", 0) == 1) for i, x in visible.items())
        segments = [Segment(i, label, True, crowd) for i, label, crowd in things]
        write_ids(ids, out.with_suffix("") / png)
        entries.append(annotation(id, png, ids, segments, categories.ids))
        hidden += len(objects[id]) - len(segments)
    kept = [{key: x[key] for key in ("id", "file_name", "height", "width")} for x in images.values()]
    write_annotations(out, categories, kept, entries)
    return len(images), sum(map(len, objects.values())), hidden


def main(argv: list[str] | None = None) -> int:
    """Convert COCO's instances."""
    about = "COCO's instances, as polygons or RLE, in the panoptic form: for train.py --dataset panoptic."
    parser = Parser("python -m images.panoptic", description=about)
    source, out = "such as instances_train2017.json", "its name is that of the PNGs' folder, too"
    parser.add_argument("--from-instances", metavar="INSTANCES.json", required=True, help=source)
    parser.add_argument("--out", metavar="ROOT/annotations/panoptic_train.json", required=True, help=out)
    options = parser.parse_args(argv)
    out = Path(options.out)
    if out.suffix != ".json" or len(out.parents) < 2:
        parser.error(f"--out {out}: give ROOT/annotations/panoptic_train.json, or panoptic_val.json")

    def work() -> None:
        images, objects, hidden = from_instances(Path(options.from_instances), out)
        print(f"{out}: {images} images, {objects} objects, {hidden} of them without a visible pixel")
        place = out.parents[1] / out.stem.removeprefix("panoptic_")
        print(f"next: put the images into {place}, then train.py --dataset panoptic --data {out.parents[1]}")

    return run_command("images.panoptic", work)


if __name__ == "__main__":
    sys.exit(main())
