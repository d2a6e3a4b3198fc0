"""data.py: official tables and layouts, every kind of file and every refusal."""

import hashlib
import os
import re
import shutil
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from errors import DataError, Unreadable
from images.colours import complete_palette
from images.read import fit, label_table, read_image, read_labels
from loading.augment import Augment
from loading.check import check
from loading.stream import TrainStream

ANY = label_table(range(255), ())  # a table that refuses nothing

# ---- material --------------------------------------------------------------------------------------------


def save(content, path: Path, **options) -> Path:
    """An array or an image as a file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = content if isinstance(content, Image.Image) else Image.fromarray(np.asarray(content))
    image.save(path, **options)
    return path


def noise(H: int, W: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured image (H, W, 3) uint8 that survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(H // 8, 2), max(W // 8, 2), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BICUBIC))


def folder(root: Path, pictures: int = 4, size: tuple[int, int] = (24, 36), classes=("a", "b")) -> Path:
    """A `folder` data set: image i is noise with seed i, its labels are 0 above and 1 below."""
    labels = np.zeros(size, np.uint8)
    labels[size[0] // 2 :] = 1
    for split in ("train", "val"):
        for i in range(pictures):
            save(noise(*size, seed=i), root / f"images/{split}/{i:03}.png")
            save(labels, root / f"labels/{split}/{i:03}.png")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def names(dataset) -> list[str]:
    return [*dataset.paths]


# ---- tables ----------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    """Open a data set of a given kind with one image, to read its tables."""

    def make(name: str):
        picture, label = {
            "ade20k": ("images/validation/x.jpg", "annotations/validation/x.png"),
            "cocostuff": ("images/val2017/x.jpg", "annotations/val2017/x.png"),
            "cityscapes": ("leftImg8bit/val/c/x_leftImg8bit.png", "gtFine/val/c/x_gtFine_labelIds.png"),
        }[name]
        save(noise(20, 30), tmp_path / picture)
        save(np.full((20, 30), 255, np.uint8), tmp_path / label)
        return open_dataset(name, tmp_path, "val"), tmp_path / label

    return make


def sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def test_ade20k_names_and_palette_are_the_official_ones(official):
    """First synonyms of objectInfo150.txt ("bed " without its blank), colours of color150.mat.

    Source of the digests: github.com/CSAILVision/sceneparsing at e202229, names joined by line feeds.
    """
    dataset, _ = official("ade20k")
    names = "ffd47f2fcbad6c484a3e320702ff1278dae14e78d443d81987142210b70c5032"
    assert sha256("\n".join(dataset.classes)) == names
    assert len(dataset.classes) == 150
    assert dataset.classes[7] == "bed"
    assert dataset.prompts == dataset.classes
    colours = "ce475c9151035eff51f4cf27fd7d906959b1480f6d15b9423ae2417c1b23a0ed"
    assert sha256(dataset.palette.astype(np.uint8).tobytes()) == colours
    assert dataset.raw_ids[:152].tolist() == [255, *range(150), -1]


def test_cocostuff_names_and_values_are_the_official_ones(official):
    """Value = label id - 1, without the 11 unused ones; train ids are ranks.

    Source of the digest: labels.txt of github.com/nightrome/cocostuff, lines "value name".
    """
    dataset, _ = official("cocostuff")
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    used = [value for value in range(182) if value not in unused]
    assert len(used) == 171
    table = "\n".join(f"{value} {name}" for value, name in zip(used, dataset.classes, strict=True))
    assert sha256(table) == "39e686fcb1a9ef57f0a0e2ee72ec89ebf92cfe4effca30d98467356a88d8a589"
    expected = {value: rank for rank, value in enumerate(used)} | {255: 255}
    assert dataset.raw_ids.tolist() == [expected.get(value, -1) for value in range(256)]
    assert len({tuple(colour) for colour in dataset.palette.tolist()}) == 171


# Of cityscapesScripts' labels.py: the train id of each label id, and the colour of each train id.
CITYSCAPES_IDS = [*[255] * 7, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255]
CITYSCAPES_IDS += [*range(6, 16), 255, 255, 16, 17, 18]
CITYSCAPES_COLOURS = {
    "road": [128, 64, 128],
    "sidewalk": [244, 35, 232],
    "building": [70, 70, 70],
    "wall": [102, 102, 156],
    "fence": [190, 153, 153],
    "pole": [153, 153, 153],
    "traffic light": [250, 170, 30],
    "traffic sign": [220, 220, 0],
    "vegetation": [107, 142, 35],
    "terrain": [152, 251, 152],
    "sky": [70, 130, 180],
    "person": [220, 20, 60],
    "rider": [255, 0, 0],
    "car": [0, 0, 142],
    "truck": [0, 0, 70],
    "bus": [0, 60, 100],
    "train": [0, 80, 100],
    "motorcycle": [0, 0, 230],
    "bicycle": [119, 11, 32],
}


def test_cityscapes_names_palette_and_ids_are_the_official_ones(official):
    """Ids without a class are ignored."""
    dataset, _ = official("cityscapes")
    assert len(CITYSCAPES_IDS) == 34
    assert dataset.classes == [*CITYSCAPES_COLOURS]
    assert dataset.palette.tolist() == [*CITYSCAPES_COLOURS.values()]
    assert dataset.raw_ids[:35].tolist() == [*CITYSCAPES_IDS, -1]


def test_prompts_of_cocostuff_are_english(official):
    """ "thing-kind" is turned round, what says nothing is dropped, and no two classes become one."""
    dataset, _ = official("cocostuff")
    of = dict(zip(dataset.classes, dataset.prompts, strict=True))
    shown = {
        "floor-wood": "wood floor",
        "sky-other": "sky",
        "desk-stuff": "desk",
        "wall-brick": "brick wall",
        "window-blind": "window blind",
        "tree": "tree",
    }
    assert {name: of[name] for name in shown} == shown
    assert len(set(dataset.prompts)) == 171
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", prompt) for prompt in dataset.prompts)


def test_classes_of_a_folder(tmp_path):
    """Names, with a colour if the user gives one; BOM and CRLF do no harm; other colours still differ."""
    root = folder(tmp_path, classes=["traffic_light, 250 170 30", "road", "a b"])
    text = (root / "classes.txt").read_text()
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ["traffic_light", "road", "a b"]
    assert dataset.prompts == ["traffic light", "road", "a b"]
    assert dataset.palette.tolist() == complete_palette([[250, 170, 30], None, None]).tolist()
    assert dataset.palette[0].tolist() == [250, 170, 30] and len(np.unique(dataset.palette, axis=0)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no class"),
        (b"a\n\nb\n", "line 2: expected a class"),
        (b"a\nb, route\n", "line 2: expected a class"),
        (b"a, 1 2 256\n", "line 1: expected a class"),
        (b"a\na\n", "line 2: 'a' repeats"),
        (b"a, 1 2 3, 7\nb, 1 2 3, 7\n", "line 2: .* repeats"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b"a, 0 0 0, 256\n", "line 1: expected a class"),
        (b", 0 0 0\n", "line 1: expected a class"),
        (b"a, %s\n" % (b"9" * 4300), "line 1: expected a class"),
        (b"ignore\nignore, 0\na\n", "line 2: .* repeats"),
        (b"ignore\n", "lists no class"),
        (
            b"\n".join(b"c%d" % i for i in range(300)),
            "line 256 is class 256 of 300: 255 classes are the most",
        ),
        (b"names:\n  0: cat\n  1: dog\n", "line 1: 'names:' is YAML or JSON: write one class name a line"),
        (b"path: x\nnames: [cat, dog]\n", "line 2: .* is YAML"),
        (b"- cat\n- dog\n", "line 1: '- cat' is YAML"),
        (b"0: cat\n1: dog\n", "line 1: '0: cat' is YAML"),
        (b'["cat", "dog"]\n', "line 1: .* is YAML or JSON"),
        (b'{"cat": 0}\n', "line 1: .* is YAML or JSON"),
        (b"0 cat\n1 dog\n", "numbers its lines, such as '0 cat': write the names alone"),
        (b"1 cat\n2 dog\n", "numbers its lines"),
        *(
            (f"a\nb{x}c\n".encode(), rf"line 2 holds the control character {re.escape(repr(x))}: remove it")
            for x in "\r\v\f\0\x1c\x85\u2028\u2029"
        ),
    ],
)
def test_a_wrong_list_of_classes_is_refused(tmp_path, content, message):
    root = folder(tmp_path)
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"classes\.txt.*{message}"):
        open_dataset("folder", root, "train")


def test_a_list_that_is_long_is_read_at_once(tmp_path):
    """Blanks before a comma took seconds: the time was quadratic in them."""
    root = folder(tmp_path)
    (root / "classes.txt").write_text(" " * 100_000 + ",\n" + "\n" * 100_000 + "b\n")
    start = time.process_time()
    with pytest.raises(DataError, match="line 1: expected a class"):
        open_dataset("folder", root, "train")
    assert time.process_time() - start < 0.5


def test_values_that_are_ignored(tmp_path):
    """Line i is the value i - 1; a line `ignore` is not a class, wherever it stands; 255 may be one."""
    root = folder(tmp_path, pictures=1)
    save(np.arange(24 * 36).reshape(24, 36).astype(np.uint8) % 4, root / "labels/train/000.png")
    for text, expected in {
        "ignore\ncat\ndog\ncow\n": [255, 0, 1, 2],
        "cat, 1\ndog, 1 2 3, 2\ncow, 3\nIgnore, 0 0 0, 0\n": [255, 0, 1, 2],
        "cat\nignore\nignore\ndog": [0, 255, 255, 1],
    }.items():
        (root / "classes.txt").write_text(text)
        dataset = open_dataset("folder", root, "train")
        assert dataset.load(0).labels[0, :4].tolist() == expected
        assert len(dataset.classes) == len(dataset.palette) == 1 + max({*expected} - {255})
    (root / "classes.txt").write_text("sky\nbuilding, 0 0 0, 255\n")
    save(np.repeat(np.array([0, 255], np.uint8), 12 * 36).reshape(24, 36), root / "labels/train/000.png")
    assert open_dataset("folder", root, "train").load(0).labels[:, 0].tolist() == [0] * 12 + [1] * 12


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("cat\ndog\n", "classes begin at 1, write `(ignore)` above them"),
        ("cat, 1\ndog, 2\n", "if 0 means unlabelled, add the line `(.*)` to classes.txt"),
    ],
)
def test_where_0_is_unlabelled_the_error_says_what_to_write(tmp_path, text, advice):
    """And what it says helps."""
    root = folder(tmp_path, pictures=1)
    save(np.arange(24 * 36).reshape(24, 36).astype(np.uint8) % 3, root / "labels/train/000.png")
    (root / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=advice) as caught:
        open_dataset("folder", root, "train").load(0)
    line = re.search(advice, str(caught.value))[1] + "\n"
    (root / "classes.txt").write_text(line + text if "above" in advice else text + line)
    assert open_dataset("folder", root, "train").load(0).labels[0, :3].tolist() == [255, 0, 1]


def test_labels_in_colours(tmp_path):
    """Looked up in classes.txt; refused unless each class has a colour of its own, written out."""
    root = folder(tmp_path, pictures=1)
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 0, 128], [9, 9, 9]], np.uint8)
    pattern = np.arange(24 * 36).reshape(24, 36) % 4
    save(colours[pattern], root / "labels/train/000.png")
    table = "sea, 0 0 128\nignore, 0 0 0, 7\nignore, 9 9 9, 8\nred, 128 0 0\n"
    (root / "classes.txt").write_text(table)
    assert open_dataset("folder", root, "train").load(0).labels[0, :4].tolist() == [255, 1, 0, 255]
    for wrong in ("sea\n" + table.partition("\n")[2], table.replace("9 9 9", "128 0 0"),
                  table.replace("128 0 0", "0 0 128")):  # fmt: skip
        (root / "classes.txt").write_text(wrong)
        with pytest.raises(
            DataError, match="has mode RGB: .* if each class has a colour of its own, add the"
        ):
            open_dataset("folder", root, "train").load(0)
    (root / "classes.txt").write_text(table.replace("ignore, 9 9 9, 8\n", ""))
    with pytest.raises(DataError, match="000.png has .*often 9 9 9 in 216 pixels"):
        open_dataset("folder", root, "train").load(0)


# ---- layouts ---------------------------------------------------------------------------------------------


def test_ade20k_samples_read_as_published(ade20k_samples, tmp_path):
    """Three images, 15 classes present (the samples' README); 0 -> ignore, 1..150 -> 0..149."""
    samples = ade20k_samples / "sampleData"
    shutil.copytree(samples / "images", tmp_path / "images/validation")
    shutil.copytree(samples / "annotations", tmp_path / "annotations/validation")
    dataset = open_dataset("ade20k", tmp_path, "val")
    assert names(dataset) == [f"images/validation/ADE_val_0000000{i}.jpg" for i in (1, 2, 3)]
    present = set()
    for i, (W, H) in enumerate([(683, 512), (500, 364), (400, 300)]):
        image, labels, *_ = dataset.load(i)
        raw = np.asarray(Image.open(samples / f"annotations/ADE_val_0000000{i + 1}.png")).astype(int)
        assert (image.size, image.mode, labels.dtype) == ((W, H), "RGB", np.uint8)
        assert (labels == np.where(raw == 0, 255, raw - 1)).all()
        present |= set(np.unique(labels).tolist()) - {255}
    assert len(present) == 15
    report = check(dataset)
    assert report.sizes == [(512, 683), (364, 500), (300, 400)]
    assert report.pixels.sum() == 512 * 683 + 364 * 500 + 300 * 400
    assert "height 300 to 512, median 364" in str(report)
    assert "absent (135): " in str(report)


def test_the_full_ade20k_format_is_refused(ade20k_samples, tmp_path):
    """Its RGB label images would be misread; the same image's challenge label is accepted."""
    raw = ade20k_samples / "convertFromADE/ADE_train_00000970_raw.png"
    with pytest.raises(DataError, match=r"x\.png has mode RGB.*full ADE20K"):
        label = tmp_path / "annotations/training/x.png"
        save(noise(768, 1024), tmp_path / "images/training/x.jpg")
        label.parent.mkdir(parents=True)
        shutil.copy(raw, label)
        open_dataset("ade20k", tmp_path, "train").load(0)
    shutil.copy(raw.with_name("ADE_train_00000970_challenge.png"), label)
    save(noise(512, 683), tmp_path / "images/training/x.jpg")
    assert set(np.unique(open_dataset("ade20k", tmp_path, "train").load(0)[1])) == {1, 4, 9, 13, 17, 60, 255}


def test_cocostuff_reads_every_value(official):
    """All 171 raw values and 255, in a grey PNG; train ids where a converted file lies alone."""
    dataset, label = official("cocostuff")
    raw = np.flatnonzero(dataset.raw_ids >= 0)
    save(np.resize(raw, (20, 30)).astype(np.uint8), label)
    assert (dataset.load(0)[1] == np.resize([*range(171), 255], (20, 30))).all()
    converted = np.resize(np.arange(171), (20, 30)).astype(np.uint8)
    save(converted, label.with_name("x_labelTrainIds.png"))
    again = open_dataset("cocostuff", dataset.root, "val")
    assert (again.paths, again.labels) == (dataset.paths, dataset.labels)  # the raw file stays preferred
    label.unlink()
    assert (open_dataset("cocostuff", dataset.root, "val").load(0)[1] == converted).all()


def test_cocostuff_palette_images(coco_stuff, official):
    """The examples' ids (92..183) are refused with a hint; as raw values (id - 1) they are read intact."""
    dataset, label = official("cocostuff")
    example = coco_stuff / "results/segmentations/examples/000000000934.png"  # 640x480, mode P
    shutil.copy(example, label)
    with pytest.raises(
        DataError, match=r"x\.png holds the value 182, 183: labels here are 0\.\.10, .*10k version"
    ):
        dataset.load(0)
    ids = np.asarray(Image.open(example))
    picture = Image.fromarray(np.where(ids == 183, 255, ids - 1).astype(np.uint8), "P")
    picture.putpalette(Image.open(example).getpalette())
    save(picture, label)
    save(noise(480, 640), dataset.root / dataset.paths[0])
    assert Image.open(label).mode == "P"
    labels = dataset.load(0)[1]
    shown = {dataset.classes[k] for k in np.unique(labels) if k != 255}
    rows = dict(row.split(": ") for row in (coco_stuff / "labels.txt").read_text().splitlines())
    assert shown == {rows[str(i)].strip() for i in np.unique(ids) if i != 183}
    assert ((labels == dataset.classes.index("clouds")) == (ids == 106)).all()


def test_cityscapes_maps_label_ids_itself(official):
    """Every id by the official table; converted files are preferred; colour images are left alone."""
    dataset, label = official("cityscapes")
    ids = np.resize(np.arange(34), (20, 30)).astype(np.uint8)
    save(ids, label)
    save(noise(20, 30), label.with_name("x_gtFine_color.png"))
    dataset = open_dataset("cityscapes", dataset.root, "val")
    assert dataset.missing == []
    assert names(dataset) == ["leftImg8bit/val/c/x_leftImg8bit.png"]
    expected = np.array(CITYSCAPES_IDS)[ids]
    assert (dataset.load(0)[1] == expected).all()
    save(expected.astype(np.uint8), label.with_name("x_gtFine_labelTrainIds.png"))
    label.write_bytes(b"")
    assert (open_dataset("cityscapes", dataset.root, "val").load(0)[1] == expected).all()


def test_camvid_is_a_folder(camvid):
    """367 / 101 frames of 480x360 with 11 classes (its README)."""
    train, val = (open_dataset("folder", camvid, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    assert train.classes == (camvid / "classes.txt").read_text().split()
    image, labels, *_ = val.load(100)
    assert image.size == (480, 360)
    raw = np.asarray(Image.open(camvid / val.paths[100].replace("images", "labels").replace("jpg", "png")))
    assert (labels == raw).all()
    report = check(val, samples=5)
    expected = sum(np.bincount(val.load(i)[1].ravel(), minlength=256) for i in (0, 25, 50, 75, 100))
    assert (report.pixels == expected).all()
    head = "folder val: 101 images, 5 of them decoded with their labels\n  height 360 to 360, median 360\n"
    assert str(report).startswith(head)
    assert f"{expected[1] / expected[:255].sum():.2%} building" in str(report)


def test_folders_may_have_folders_and_any_name(tmp_path):
    """Matched by relative path without extension: blanks, umlauts, long names, links, upper case, dots."""
    root, long = folder(tmp_path / "a set ü", pictures=1), "n" * 200
    for path in ("b c/ä.JPG", f"b c/deep/{long}.jpeg", "b.c/1.5.png"):
        save(noise(24, 36), root / "images/train" / path, **({"format": "JPEG"} if "png" not in path else {}))
        save(np.zeros((24, 36), np.uint8), (root / "labels/train" / path).with_suffix(".png"))
    (root / "images/train/.hidden.jpg").write_bytes(b"")
    (root / "images/train/notes.md").write_bytes(b"")
    (tmp_path / "linked").symlink_to(root)
    dataset = open_dataset("folder", tmp_path / "linked", "train")
    expected = ["000.png", "b c/deep/" + long + ".jpeg", "b c/ä.JPG", "b.c/1.5.png"]
    assert names(dataset) == [f"images/train/{path}" for path in expected]
    check(dataset)


def test_two_images_of_one_name_are_refused(tmp_path):
    root = folder(tmp_path)
    save(noise(24, 36), root / "images/train/000.jpg")
    with pytest.raises(DataError, match=r"000\.jpg and .*000\.png differ only in their extension"):
        open_dataset("folder", root, "train")


def test_the_wrong_root_is_refused(tmp_path):
    """In one sentence that names what is absent and the folder to give."""
    root = folder(tmp_path / "mine")
    with pytest.raises(
        DataError, match=r"mine is not ade20k: images/training and annotations/training not found"
    ):
        open_dataset("ade20k", root, "train")
    with pytest.raises(DataError, match=r"give --data .*/ADEChallengeData2016"):
        (tmp_path / "ADEChallengeData2016").mkdir()
        open_dataset("ade20k", tmp_path, "train")
    with pytest.raises(DataError, match="no data set 'voc': choose ade20k, .*scenes"):
        open_dataset("voc", root, "train")
    with pytest.raises(DataError, match="no labelled split 'test': choose train, val"):
        open_dataset("folder", root, "test")
    shutil.rmtree(root / "images/val")
    (root / "images/val").mkdir()
    with pytest.raises(DataError, match="images/val holds no image"):
        open_dataset("folder", root, "val")
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt not found"):
        open_dataset("folder", root, "train")


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (["images/train", "images/valid", "labels/train", "labels/valid"], None),
        (["images", "labels"], None),
        (["img_dir/train", "img_dir/val", "ann_dir/train", "ann_dir/val"],
         "ann_dir/train/  ann_dir/val/  img_dir/train/  img_dir/val/  classes.txt"),
        (["Annotations", "ImageSets/Segmentation", "JPEGImages", "SegmentationClass"], None),
        ([f"{i:02}" for i in range(12)], "  ".join(f"{i:02}/" for i in range(10)) + "  ..."),
    ],
)  # fmt: skip
def test_another_tree_is_shown_beside_the_expected_one(tmp_path, there, found):
    for folder_ in there:
        save(noise(8, 8), tmp_path / folder_ / "a.jpg")
    (tmp_path / "classes.txt").touch()
    (tmp_path / ".git/objects").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_dataset("folder", tmp_path, "val")
    expected = "images/train/  images/val/  labels/train/  labels/val/  classes.txt"
    found = found or "  ".join([*(f"{x}/" for x in there), "classes.txt"])
    assert str(caught.value).splitlines()[1:] == [f"  expected: {expected}", f"  found:    {found}"]
    for root, found in (
        (".git/objects", "found:    nothing$"),
        ("absent", "absent does not exist: --data must be [^\n]*$"),
    ):
        with pytest.raises(DataError, match=found):
            open_dataset("folder", tmp_path / root, "val")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("labels/train/000.jpg", "which changes class numbers: save labels as PNG"),
        ("labels/train/000.GIF", "which changes class numbers: save labels as PNG"),
        ("labels/train/000.npy", "which holds an array: save labels as PNG"),
        ("labels/train/000.txt", "which holds boxes or polygons: export label images"),
        ("images/train/000.json", "which holds boxes or polygons: export label images"),
    ],
)
def test_a_label_file_that_is_not_read_is_named(tmp_path, file, reason):
    root = folder(tmp_path)
    (root / "labels/train/000.png").rename(root / file)
    expected = f"{root}/images/train/000.png has no label file that is read, only {root / file}, {reason}"
    dataset = open_dataset("folder", root, "train")
    (sentence,) = dataset.missing
    assert sentence.startswith(expected)
    with pytest.raises(DataError, match=re.escape(sentence)):
        dataset.load(0)


def test_names_in_another_unicode_composition_are_the_same(tmp_path):
    """macOS stores "é" as "e" and an accent where a program wrote one character."""
    root = folder(tmp_path, pictures=1)
    (root / "images/train/000.png").rename(root / "images/train/caf\u00e9.png")
    (root / "labels/train/000.png").rename(root / "labels/train/cafe\u0301.png")
    dataset = open_dataset("folder", root, "train")
    check(dataset)
    assert dataset.paths[0] == "images/train/caf\u00e9.png"
    save(noise(24, 36), root / "images/train/cafe\u0301.png")
    with pytest.raises(DataError, match=r"cafe\\u0301.* and .*caf\\xe9.* differ only in their Unicode"):
        open_dataset("folder", root, "train")


# ---- files -----------------------------------------------------------------------------------------------


def png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes]) -> bytes:
    """A PNG written out by hand: what Pillow cannot write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", size[0], size[1], depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Grey, 16 bits (grey and RGB: the high bytes), palette, RGBA, CMYK."""
    colours = noise(6, 9)
    grey = colours[..., 0]
    for mode in ("L", "LA", "1", "P", "RGBA", "RGB"):
        path = save(Image.fromarray(colours).convert(mode), tmp_path / f"{mode}.png")
        image, size = read_image(path)
        assert (image.mode, image.size, size) == ("RGB", (9, 6), (6, 9))
    assert (np.asarray(read_image(tmp_path / "RGBA.png")[0]) == colours).all()
    assert (
        np.asarray(read_image(tmp_path / "L.png")[0])[..., 2]
        == np.asarray(Image.fromarray(colours).convert("L"))
    ).all()

    wide = (grey.astype(np.uint16) << 8) + 77
    save(Image.fromarray(wide), tmp_path / "16.png")
    save(Image.fromarray(wide), tmp_path / "16.tif")
    for name in ("16.png", "16.tif"):
        assert (np.asarray(read_image(tmp_path / name)[0]) == grey[..., None]).all()
    rows = [((colours[y].astype(">u2") << 8) + 200).astype(">u2").tobytes() for y in range(6)]
    (tmp_path / "48.png").write_bytes(png((9, 6), 16, 2, rows))
    assert (np.asarray(read_image(tmp_path / "48.png")[0]) == colours).all()

    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(read_image(save(ink, tmp_path / "cmyk.jpg", quality=95))[0])[8, 8]
    assert red[0] > 240 and red[1] < 16 and red[2] < 16
    with pytest.raises(Unreadable, match=r"float\.tif holds floating-point"):
        read_image(save(Image.new("F", (4, 4)), tmp_path / "float.tif"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(save(Image.fromarray(grey, "P"), tmp_path / "t.png", transparency=b"\x80\x40"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    """Stored as a camera does for each EXIF orientation; decoded whole and reduced."""
    upright = noise(160, 96)
    stored = {  # the transformation that the tag's reader undoes
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(np.ascontiguousarray(stored), tmp_path / "x.jpg", exif=exif, quality=98, subsampling=0)
    image, size = read_image(path)
    assert size == (160, 96)
    assert np.abs(np.asarray(image).astype(int) - upright).mean() < 2
    small, size = read_image(path, 15, 160)  # 96 is 6.4 times 15: half is enough
    assert (small.size, size) == ((48, 80), (160, 96))
    half = np.asarray(Image.fromarray(upright).reduce(2)).astype(int)
    assert np.abs(np.asarray(small).astype(int) - half).mean() < 4


def test_labels_belong_to_the_upright_image(tmp_path):
    """A label of the stored size is refused with both sizes."""
    root = folder(tmp_path, pictures=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(noise(24, 36), root / "images/train/000.png", exif=exif)
    with pytest.raises(DataError, match=r"labels/train/000\.png is 36x24 and its image.* 24x36"):
        open_dataset("folder", root, "train").load(0)
    save(np.zeros((36, 24), np.uint8), root / "labels/train/000.png")
    assert open_dataset("folder", root, "train").load(0)[1].shape == (36, 24)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "page": b"<!DOCTYPE html><title>404</title>",
            "bits": content[:40] + bytes(x ^ 0xFF for x in content[40:90]) + content[90:],
        }[how]
    )


def test_an_odd_exif_entry_stops_nothing(tmp_path):
    """A negative number of bits, which Pillow reads and cannot write: the image is turned all the same."""
    turned, odd = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHIhh", 0x0102, 8, 1, -5, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + odd + struct.pack(">I", 0)
    for name in ("x.jpg", "x.png", "x.webp"):
        path = save(noise(8, 12), tmp_path / name, exif=exif)
        assert read_image(path)[0].size == (8, 12) and read_image(path)[1] == (12, 8)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Nothing is left out silently."""
    root, real = folder(tmp_path), os.scandir
    save(noise(8, 12), root / "images/train/deep/1.png")

    def refuses(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match=r"train/deep cannot be listed \(Permission denied\): "):
        open_dataset("folder", root, "train")


def test_a_link_that_leads_back_multiplies_nothing(tmp_path):
    root = folder(tmp_path)
    for part in ("images", "labels"):
        (root / part / "train/back").symlink_to(root / part / "train")
    assert len(open_dataset("folder", root, "train")) == 4


@pytest.mark.parametrize("how", ["empty", "cut", "page", "bits"])
@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_damaged_file_is_named(tmp_path, part, how):
    root = folder(tmp_path, pictures=2)
    damage(root / part / "train/001.png", how)
    reason = {"empty": "is empty", "page": "is a web page"}.get(how, "(is not an image|cannot be read)")
    with pytest.raises(Unreadable, match=rf"{part}/train/001\.png {reason}"):
        open_dataset("folder", root, "train").load(1)


def test_huge_images_are_refused_unread(tmp_path, monkeypatch):
    """13400x13400 in 22 kB and 9460x9460: in a moment, without the memory."""
    for side in (13_400, 9_460):
        (tmp_path / "huge.png").write_bytes(png((side, side), 1, 0, [bytes(-(-side // 8))] * side))
        start = time.process_time()
        with (
            warnings.catch_warnings(),
            pytest.raises(Unreadable, match=r"huge\.png is too large .*at most 64,000,000"),
        ):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            read_image(tmp_path / "huge.png")
        assert time.process_time() - start < 1
    path = save(noise(20, 30), tmp_path / "small.png")
    monkeypatch.setattr("images.read.MAX_PIXELS", 600)
    assert read_image(path)[1] == (20, 30)
    monkeypatch.setattr("images.read.MAX_PIXELS", 599)
    with pytest.raises(Unreadable, match=r"too large \(30x20\): at most 599 pixels"):
        read_image(path)


def test_label_modes(tmp_path):
    """L, P and I;16 hold class numbers; images of colours are refused with path and mode."""
    ids = np.arange(200, dtype=np.uint8).reshape(10, 20)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    for name, picture in {
        "L.png": Image.fromarray(ids),
        "P.png": palette,
        "16.png": Image.fromarray(ids.astype(np.uint16)),
        "16.tif": Image.fromarray(ids.astype(np.uint16)),
        "big.tif": Image.frombytes("I;16B", (20, 10), ids.astype(">u2").tobytes()),
        "32.tif": Image.fromarray(ids.astype(np.int32)),
    }.items():
        found = read_labels(save(picture, tmp_path / name), ANY)
        assert found.dtype == np.uint8 and found.flags.writeable
        assert (found == ids).all(), name
    for mode in ("LA", "RGB", "RGBA"):
        path = save(Image.fromarray(ids).convert(mode), tmp_path / f"{mode}.png")
        with pytest.raises(
            DataError, match=rf"{mode}\.png has mode {mode}: labels are class numbers"
        ) as caught:
            read_labels(path, ANY)
        assert not isinstance(caught.value, Unreadable)


@pytest.mark.parametrize(
    ("value", "kind"), [(2, np.uint8), (200, np.uint8), (254, np.uint8), (256, np.uint16), (65535, np.uint16)]
)
def test_label_values_out_of_range(tmp_path, value, kind):
    """Named with value, path and range; 255 is always accepted."""
    root = folder(tmp_path, pictures=1)
    labels = np.full((24, 36), 255, kind)
    labels[0, 0], labels[1, 1] = 1, value
    save(labels, root / "labels/train/000.png")
    dataset = open_dataset("folder", root, "train")
    with pytest.raises(
        DataError, match=rf"000\.png holds the value {value}: labels here are 0\.\.1, 255(; if 0 .*)?$"
    ) as caught:
        dataset.load(0)
    assert not isinstance(caught.value, Unreadable)
    labels[1, 1] = 255
    save(labels, root / "labels/train/000.png")
    assert np.bincount(dataset.load(0)[1].ravel())[[1, 255]].tolist() == [1, 24 * 36 - 1]


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((512, 683), 512, 2048, (512, 683)),
        ((300, 400), 512, 2048, (512, 683)),  # 400 x 512 / 300 = 682.67
        ((683, 512), 256, 1024, (342, 256)),  # 341.5 is rounded up
        ((100, 1000), 512, 2048, (205, 2048)),  # the long side decides
        ((1024, 2048), 512, 1024, (512, 1024)),
        ((1, 4000), 256, 1024, (1, 1024)),
        ((4000, 1), 256, 1024, (1024, 1)),
        ((1, 1), 512, 2048, (512, 512)),
    ],
)
def test_fit_rounds_as_mmcv(size, short, long, expected):
    assert fit(size, short, long) == expected


# ---- the drawn data set ----------------------------------------------------------------------------------


def test_scenes_are_a_data_set(tmp_path):
    """Paths hold the index that `scenes.draw` takes; images, labels, names and colours are its own."""
    from images import scenes

    for split in ("train", "val", "test"):
        dataset = open_dataset("scenes", tmp_path, split)
        assert len(dataset) == len(scenes.SPLITS[split])
        last = len(dataset) - 1
        assert dataset.paths[last] == f"scenes/{scenes.SPLITS[split][-1]:06d}"
        image, labels, *_ = dataset.load(last)
        drawn = scenes.draw(scenes.SPLITS[split][-1])
        assert (np.asarray(image) == drawn.image).all()
        assert (labels == drawn.labels).all()
    assert (len(dataset.classes), len(dataset.palette)) == (24, 24)
    assert dataset.classes == list(scenes.CLASSES)
    report = check(dataset, samples=8)
    assert report.sizes == [(128, 128)] * 8
    batch = next(TrainStream(dataset, Augment((128, 128), 128, 512), batch=4, seed=5).batches())
    assert set(batch.labels.unique().tolist()) <= {*range(24), 255}
    with pytest.raises(DataError, match="scenes has no labelled split 'all'"):
        open_dataset("scenes", tmp_path, "all")
