"""loading/check.py: every kind of fault is listed before training starts."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from test_data import damage, folder, noise, save
from test_data_panoptic import own

from data import open_dataset
from errors import DataError
from loading.check import check


def test_check_names_every_kind_of_fault(tmp_path):
    root = folder(tmp_path, pictures=8)
    (root / "labels/train/000.png").unlink()
    (root / "images/train/001.png").unlink()
    (root / "labels/train/002.png").write_bytes(b"")
    damage(root / "images/train/003.png", "cut")
    save(noise(24, 36), root / "labels/train/004.png")
    save(np.full((24, 36), 19, np.uint8), root / "labels/train/005.png")
    save(np.zeros((36, 24), np.uint8), root / "labels/train/006.png")
    with pytest.raises(DataError) as caught:
        check(open_dataset("folder", root, "train"))
    message, *faults = str(caught.value).splitlines()
    assert message.startswith("folder train has 7 faults (7 images, 6 of them opened), repair")
    assert len(faults) == 7
    for expected in (
        r"images/train/000\.png has no label file",
        r"labels/train/001\.png has no image",
        r"labels/train/002\.png is empty or missing",
        r"images/train/003\.png cannot be read \(.*truncated.*\)",
        r"labels/train/004\.png has mode RGB",
        r"labels/train/005\.png holds the value 19: labels here are 0\.\.1, 255",
        r"labels/train/006\.png is 24x36 and its image.*36x24",
    ):
        assert len([fault for fault in faults if re.search(expected, fault)]) == 1, expected


def test_check_lists_at_most_ten(tmp_path):
    root = folder(tmp_path, pictures=14)
    for i in range(13):
        (root / f"labels/train/{i:03}.png").unlink()
    with pytest.raises(DataError) as caught:
        check(open_dataset("folder", root, "train"))
    assert len(str(caught.value).splitlines()) == 12
    assert str(caught.value).endswith("and 3 more")


def test_check_refuses_labels_that_say_nothing(tmp_path):
    root = folder(tmp_path, pictures=2)
    for i in range(2):
        save(np.full((24, 36), 255, np.uint8), root / f"labels/train/{i:03}.png")
    with pytest.raises(DataError, match="all 2 label files that were read hold only ignored pixels"):
        check(open_dataset("folder", root, "train"))


def test_check_decodes_a_sample_and_looks_at_everything(tmp_path, monkeypatch):
    """Of 2,000 images 50 are read, always the same; the one empty file among the others is found."""
    root = folder(tmp_path, pictures=1)
    for part in ("images", "labels"):
        for i in range(1, 2000):
            os.link(root / part / "train/000.png", root / part / f"train/{i:04}.png")
    dataset, read = open_dataset("folder", root, "train"), []
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda i: (read.append(i), load(i))[1])
    start = time.process_time()
    check(dataset, samples=50)
    check(dataset, samples=50)
    assert time.process_time() - start < 3
    assert read[:50] == read[50:]
    assert (read[0], read[49], len(set(read[:50]))) == (0, 1999, 50)
    spoilt = root / "labels/train/0777.png"
    spoilt.unlink()
    spoilt.write_bytes(b"")
    assert 777 not in read
    with pytest.raises(DataError, match=r"0777\.png is empty"):
        check(dataset, samples=50)


@pytest.fixture
def calls(monkeypatch):
    """How often `os.stat` and `os.scandir` were called and a Path was joined."""
    counts = dict.fromkeys(("stat", "scandir", "__truediv__"), 0)

    def count(owner, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in zip((os, os, Path), counts, strict=True):
        count(owner, name)
    return counts


def test_a_start_looks_up_each_file_once(tmp_path, calls):
    """At ten times as many pairs ten times as many `stat`, and no more listed folders or Path objects."""
    found = []
    for pairs in (30, 300):
        root = folder(tmp_path / str(pairs), pictures=1)
        for i in range(1, pairs):
            for part in ("images", "labels"):
                os.link(root / part / "train/000.png", root / part / f"train/{i:04}.png")
        calls.update(dict.fromkeys(calls, 0))
        check(open_dataset("folder", root, "train"), samples=10)
        found.append(dict(calls))
    few, many = found
    assert many["stat"] - few["stat"] == 2 * (300 - 30)
    assert (many["scandir"], many["__truediv__"]) == (few["scandir"], few["__truediv__"])


def masks(root: Path, values: tuple[int, int], pictures: int = 2, classes=("background", "building")) -> Path:
    """A `folder` whose labels are the first value, the lower half the second."""
    root = folder(root, pictures=pictures, classes=classes)
    for file in root.glob("labels/*/*.png"):
        save(np.repeat(np.array(values, np.uint8), 12 * 36).reshape(24, 36), file)
    return root


def test_a_mask_of_0_and_255_is_not_one_class(tmp_path):
    """It would train to mIoU 1. The line that is advised makes it two; so do the values 0 and 1."""
    root = masks(tmp_path, (0, 255))
    with pytest.raises(DataError, match="all labels are 'background', which leaves nothing to learn") as e:
        check(open_dataset("folder", root, "train"))
    (line,) = re.findall(r"255 is read as unlabelled: if it means 'building', write `(.*)` in", str(e.value))
    report = check(open_dataset("folder", root, "val"))  # some few images may show one class
    assert str(report).splitlines()[-1].startswith("  WARNING: all labels are 'background'")
    (root / "classes.txt").write_text(f"background\n{line}\n")
    report = check(open_dataset("folder", root, "train"))
    assert (report.pixels[[0, 1]] == 2 * 12 * 36).all() and report.pixels.sum() == report.pixels[:2].sum()
    assert "WARNING" not in str(report)
    assert "WARNING" not in str(check(open_dataset("folder", masks(tmp_path / "01", (0, 1)), "train")))


@pytest.mark.parametrize(("values", "told"), [((0, 0), False), ((0, 255), True)])
def test_a_list_of_one_class_is_refused(tmp_path, values, told):
    root = masks(tmp_path, values, classes=["building"])
    with pytest.raises(DataError, match="nothing to learn: label a second class") as e:
        check(open_dataset("folder", root, "train"))
    assert ("write `background, 0 0 0, 255` in" in str(e.value)) == told


def test_a_rare_class_is_looked_for_in_all_files(tmp_path):
    """The sample holds one class; the only image with another is found, and what it holds counted."""
    root = masks(tmp_path, (0, 0), pictures=12)
    save(np.eye(24, 36, dtype=np.uint8), root / "labels/train/004.png")
    report = check(open_dataset("folder", root, "train"), samples=2)
    assert report.pixels[1] == 24 and len(report.sizes) == 6  # 0 and 11, then 1 to 4


def test_a_class_that_is_absent_while_much_is_ignored_is_told(tmp_path):
    """CamVid's 4 % of unlabelled pixels are no such case."""
    root = masks(tmp_path, (0, 1), classes=["sky", "road", "car, 1 2 3"])
    assert "WARNING" not in str(check(open_dataset("folder", root, "train")))
    labels = np.repeat(np.array([0, 1, 255], np.uint8), 8 * 36).reshape(24, 36)
    save(labels, root / "labels/train/000.png")
    warning = str(check(open_dataset("folder", root, "train"))).splitlines()[-1]
    assert warning.startswith("  WARNING: 17% of the pixels are ignored and none is 'car'")
    assert warning.endswith("if it means 'car', write `car, 1 2 3, 255` in classes.txt")


def test_one_class_of_things_may_be_learnt(tmp_path):
    """Cells, say: Mask2Former learns where each is."""
    own(tmp_path)
    for file in tmp_path.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:1]
        for segment in (s for entry in content["annotations"] for s in entry["segments_info"]):
            segment["category_id"] = 5
        file.write_text(json.dumps(content))
    assert "WARNING: all labels are 'car'" in str(check(open_dataset("panoptic", tmp_path, "train")))


def test_the_fingerprint_names_what_changed(tmp_path):
    """Another list, size, time or table of classes; another place of the data set is no change."""
    root = folder(tmp_path / "data", pictures=3)
    before = check(open_dataset("folder", root, "train")).fingerprint

    def changed(where: Path = root) -> set[str]:
        after = check(open_dataset("folder", where, "train")).fingerprint
        return {name for name in before | after if before.get(name) != after.get(name)}

    assert changed() == changed(Path(shutil.copytree(root, tmp_path / "copy"))) == set()
    label, image = root / "labels/train/001.png", root / "images/train/001.png"
    os.utime(label, ns=(1, 1))
    assert changed() == {"a time among the training labels"}
    label.write_bytes(label.read_bytes() + b" ")
    os.utime(image, ns=(1, 1))
    labels = {f"a {what} among the training labels" for what in ("size", "time")}
    assert changed() == labels | {"a time among the training images"}
    (root / "classes.txt").write_text("a, 1\nb, 0\n")
    assert "the table of the training labels" in changed()
    label.unlink(), image.unlink()
    assert "the list of training pictures" in changed()
    validated = check(open_dataset("folder", root, "val")).fingerprint
    assert "the list of validation pictures" in validated and not validated.keys() & before.keys()


def test_the_fingerprint_has_the_classes_of_segments(segments, tmp_path):
    """The PNGs stay, their JSON gives a segment another class."""
    root = Path(shutil.copytree(segments, tmp_path / "data"))
    before = check(open_dataset("panoptic", root, "train")).fingerprint
    file = root / "annotations/panoptic_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 24
    file.write_text(json.dumps(content))
    after = check(open_dataset("panoptic", root, "train")).fingerprint
    assert [name for name in before if before[name] != after[name]] == ["the table of the training labels"]
