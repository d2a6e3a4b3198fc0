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

from data import open_dataset
from loading.check import CheckError, check


def test_check_names_every_kind_of_fault(tmp_path):
    root = folder(tmp_path, pictures=8)
    (root / "labels/train/000.png").unlink()
    (root / "images/train/001.png").unlink()
    (root / "labels/train/002.png").write_bytes(b"")
    damage(root / "images/train/003.png", "cut")
    save(noise(24, 36), root / "labels/train/004.png")
    save(np.full((24, 36), 19, np.uint8), root / "labels/train/005.png")
    save(np.zeros((36, 24), np.uint8), root / "labels/train/006.png")
    with pytest.raises(CheckError) as caught:
        check(open_dataset("folder", root, "train"))
    message, faults = str(caught.value), caught.value.report.faults
    assert message.startswith("folder train has 7 faults")
    assert message.count("\n") == 7
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
    assert str(caught.value.report).startswith("folder train: 7 images, 1 of them read")


def test_check_lists_at_most_ten(tmp_path):
    root = folder(tmp_path, pictures=14)
    for i in range(13):
        (root / f"labels/train/{i:03}.png").unlink()
    with pytest.raises(CheckError) as caught:
        check(open_dataset("folder", root, "train"))
    assert len(str(caught.value).splitlines()) == 12
    assert str(caught.value).endswith("and 3 more")


def test_check_refuses_labels_that_say_nothing(tmp_path):
    root = folder(tmp_path, pictures=2)
    for i in range(2):
        save(np.full((24, 36), 255, np.uint8), root / f"labels/train/{i:03}.png")
    with pytest.raises(CheckError, match="all 2 label files that were read hold only ignored pixels"):
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
    with pytest.raises(CheckError, match=r"0777\.png is empty"):
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
        assert check(open_dataset("folder", root, "train"), samples=10).faults == []
        found.append(dict(calls))
    few, many = found
    assert many["stat"] - few["stat"] == 2 * (300 - 30)
    assert (many["scandir"], many["__truediv__"]) == (few["scandir"], few["__truediv__"])


def test_the_fingerprint_names_what_changed(tmp_path):
    """Another list, size, time or meaning of a raw value; another place of the data set is no change."""
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
    assert "the meaning of the training labels" in changed()
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
    assert [name for name in before if before[name] != after[name]] == ["the meaning of the training labels"]
