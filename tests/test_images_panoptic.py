"""images/panoptic.py and images/instances.py: names and ids of a panoptic JSON; COCO's instances converted.

What the JSON's other fields must be is in tests/test_metrics_quality.py.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data import noise, save
from test_data_panoptic import own

from data import open_dataset
from errors import DataError
from images.panoptic import main, read_annotations
from loading.check import check

# ---- names and ids ---------------------------------------------------------------------------------------


def changed(root: Path, change) -> Path:
    """`own` data whose val JSON went through `change`."""
    file = own(root) / "annotations/panoptic_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def test_a_leading_dot_changes_no_name(tmp_path):
    def change(content):
        for entry in (*content["images"], *content["annotations"]):
            entry["file_name"] = f"./{entry['file_name']}"

    changed(tmp_path, change)
    dataset = open_dataset("panoptic", tmp_path, "val")
    assert dataset.paths == ["val/0.png", "val/1.png"] and dataset.png(1) == "1.png"
    check(dataset)


def test_ids_written_as_fractions_are_integers(tmp_path):
    """Spreadsheets and pandas write 1 as 1.0."""
    expected = read_annotations(own(tmp_path / "a") / "annotations/panoptic_val.json")

    def change(content):
        for entry in (*content["categories"], *content["images"], *content["annotations"]):
            entry |= {key: float(x) for key, x in entry.items() if isinstance(x, int)}
            for info in entry.get("segments_info", []):
                info |= {key: float(x) for key, x in info.items()}

    file = changed(tmp_path / "b", change)
    assert '"image_id": 1.0' in file.read_text() and '"iscrowd": 1.0' in file.read_text()
    found = read_annotations(file)
    assert found.image_ids == expected.image_ids == [0, 1]
    assert {type(x) for x in (*found.image_ids, *found.categories.ids)} == {int}
    assert found.segments(1) == expected.segments(1) and found.segments(1)[-1].crowd
    half = changed(tmp_path / "c", lambda content: content["images"][0].update(id=0.5))
    with pytest.raises(DataError, match=r'images\[0\] must have "id"'):
        read_annotations(half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(id="a"), r"has images with the ids 'a' and 1: write all as numbers"),
        (lambda c: c["images"][1].update(id=0), r"images\[1\]: the id 0 is a duplicate"),
        (
            lambda c: c["images"][0].update(file_name="../x.png"),
            r"images\[0\]: the file_name '\.\./x\.png' leads out of the images' folder: give one in it",
        ),
        (
            lambda c: c["images"][1].update(file_name="/x.png"),
            r"images\[1\]: the file_name '/x.png' leads out",
        ),
        (lambda c: c["annotations"][0].pop("segments_info"), r"images\.panoptic converts COCO's instances"),
    ],
)
def test_a_wrong_name_or_id_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(changed(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "deep/"])
def test_names_in_another_unicode_composition_are_the_same(tmp_path, below):
    """The JSON has one composition, the disk the other; what is on the disk is opened, and written anew."""
    composed, decomposed = f"{below}caf\u00e9.png", f"{below}cafe\u0301.png"

    def change(content):
        content["images"][1]["file_name"] = composed
        content["annotations"][1]["file_name"] = composed

    changed(tmp_path, change)
    for place in ("val", "annotations/panoptic_val"):
        (tmp_path / place / decomposed).parent.mkdir(exist_ok=True)
        (tmp_path / place / "1.png").rename(tmp_path / place / decomposed)
    dataset = open_dataset("panoptic", tmp_path, "val")
    assert dataset.paths == ["val/0.png", f"val/{decomposed}"]
    assert (dataset.png(1), dataset.missing) == (decomposed, [])
    assert len(dataset.names(1)) == 2
    check(dataset)


# ---- COCO's instances ------------------------------------------------------------------------------------


def box(x: int, y: int, w: int, h: int) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def counts(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, of zeros first."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    ends = np.flatnonzero(np.diff(flat))
    runs = np.diff([0, *ends, mask.size]).tolist()
    return runs[:-1] if runs[-1] == 0 else runs


H, W = 20, 30
CROWD = np.zeros((H, W), np.uint8)
CROWD[8:] = 1


def instances(root: Path) -> Path:
    """Two images. One: a crowd (RLE), a large and a small polygon that overlap on it, one below another, one
    of two parts; the other: a compressed RLE."""
    from pycocotools import mask

    round_ = np.hypot(*np.mgrid[-10:10, -15:15]) < 7
    packed = mask.encode(np.asfortranarray(round_, np.uint8))
    shapes = [
        (1, 90, [box(9, 9, 6, 6)], 0),
        (1, 18, [box(5, 5, 14, 12)], 0),
        (1, 90, {"size": [H, W], "counts": counts(CROWD)}, 1),
        (1, 18, [box(10, 10, 4, 3)], 0),
        (1, 18, [box(10, 10, 4, 3)], 0),  # covers the one before
        (1, 90, [box(1.5, 1.25, 3, 3), [25, 1, 29, 1, 27.5, 6], [1, 2, 3, 4]], 0),
        (1, 90, [[1, 1, 2, 2]], 0),  # no area
        (2, 18, {"size": [H, W], "counts": packed["counts"].decode()}, 0),
    ]
    keys = ("image_id", "category_id", "segmentation", "iscrowd")
    annotations = [dict(zip(keys, x, strict=True)) | {"id": i} for i, x in enumerate(shapes, 1)]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W, "license": 3} for i in (1, 2, 3)]
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 90, "name": "brush"}]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    root.mkdir(exist_ok=True)
    (root / "instances.json").write_text(json.dumps(content))
    return root / "instances.json"


def convert(file: Path, root: Path) -> int:
    out = root / "annotations/panoptic_train.json"
    return main(["--from-instances", str(file), "--out", str(out)])


def test_instances_become_segments_of_the_same_pixels(tmp_path, capsys):
    """As pycocotools decodes each; smaller ones on top, crowds at the bottom, what is covered left out."""
    from pycocotools.coco import COCO

    file = instances(tmp_path)
    assert convert(file, tmp_path / "set") == 0
    out = capsys.readouterr().out
    assert "3 images, 8 objects, 2 of them without a visible pixel\n" in out
    assert f"put the images into {tmp_path}/set/train, then train.py --dataset panoptic --data" in out
    for i in (1, 2, 3):
        save(noise(H, W, seed=i), tmp_path / f"set/train/{i}.jpg")
    dataset = open_dataset("panoptic", tmp_path / "set", "train")
    check(dataset)
    assert dataset.classes == ["dog", "brush"] and dataset.categories.things.tolist() == [True, True]
    assert dataset.categories.ids == [18, 90]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(file)
    masks = {i: coco.annToMask(coco.anns[i]) > 0 for i in (1, 2, 3, 4, 5, 8)}
    del coco.anns[6]["segmentation"][2]  # two points, which pycocotools takes for a box
    masks[6] = coco.annToMask(coco.anns[6]) > 0
    assert (masks[3] == CROWD).all() and masks[6].sum() > 12

    expected = np.zeros((H, W), int)
    for i in (3, 2, 1, 6, 5):  # from the bottom up
        expected[masks[i]] = i
    _, labels, ids, segments = dataset.load(0)
    found = {}
    for s in segments:
        (i,) = np.unique(expected[ids == s.id])
        found[int(i)] = s.label, s.crowd, s.thing
        assert ((ids == s.id) == (expected == i)).all()
    assert found == {3: (1, True, True), 2: (0, False, True), 1: (1, False, True), 6: (1, False, True),
                     5: (0, False, True)}  # fmt: skip
    assert ((ids == 0) == (expected == 0)).all() and (labels[ids == 0] == 255).all()
    assert ((dataset.load(1).ids > 0) == masks[8]).all()
    assert dataset.load(2).segments == [] and not dataset.load(2).ids.any()
    (entry,) = json.loads((tmp_path / "set/annotations/panoptic_train.json").read_text())["annotations"][1][
        "segments_info"
    ]
    assert entry["area"] == masks[8].sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "must be an object with the lists"),
        (lambda c: c["annotations"][3].update(image_id=9), r"annotations\[3\]: there is no image_id 9 in"),
        (lambda c: c["annotations"][3].update(category_id=2), r"annotations\[3\]: there is no category_id 2"),
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            r'annotations\[0\] must have "image_id", "category_id"',
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(size=[W, H]),
            r'annotations\[2\]: "segmentation" must be polygons .* or RLE of the image\'s size \(of the size',
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(counts=[1]),
            r"annotations\[2\].*of 1 pixels, the image has 600",
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(counts="PPP!"),
            r"annotations\[2\].*Invalid RLE",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[box(1, 1, 999, 9)]),
            r"annotations\[0\].*far outs",
        ),
        (
            lambda c: c["annotations"][2].update(segmentation={}),
            r"annotations\[2\].*image's size \(it is {}\)",
        ),
        (lambda c: c["annotations"][0].update(segmentation=[["a"] * 6]), r'annotations\[0\]: "segmentation"'),
        (lambda c: c["annotations"][0].update(segmentation=box(1, 1, 3, 3)), r'annotations\[0\]: "segmentat'),
        (lambda c: c["images"][1].pop("height"), 'image 2.jpg needs "height" and "width"'),
        (lambda c: c["images"][1].update(height=10**6, width=10**6), "at most 64,000,000 pixels"),
        (lambda c: c["images"][1].update(file_name="1.png"), "1.jpg and 1.png would share 1.png: rename one"),
        (lambda c: c["images"][1].update(file_name="../../x.jpg"), "leads out of the images' folder"),
    ],
)
def test_wrong_instances_are_refused_in_one_sentence(tmp_path, capsys, change, message):
    file = instances(tmp_path)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert convert(file, tmp_path / "set") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("images.panoptic: ") and str(file) in err
    assert re.search(message, err), err
    assert not (tmp_path / "set/annotations/panoptic_train.json").exists()


def test_without_pycocotools_the_sentence_names_it(tmp_path, capsys, monkeypatch):
    file = instances(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert convert(file, tmp_path / "set") == 2
    assert "need pycocotools: pip install pycocotools" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["panoptic_train.json", "annotations/panoptic_train"])
def test_the_output_lies_in_a_folder_and_is_json(tmp_path, capsys, out):
    with pytest.raises(SystemExit) as caught:
        main(["--from-instances", "x.json", "--out", out])
    assert caught.value.code == 2 and f"--out {out}: give ROOT/annotations/" in capsys.readouterr().err
