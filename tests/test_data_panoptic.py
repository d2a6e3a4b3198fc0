"""data.py: COCO's official panoptic layout, one's own data in that form, drawn scenes, every refusal."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_data import damage, noise, save

from data import open_dataset
from errors import DataError, Unreadable
from images import scenes
from images.panoptic import to_colours
from loading.check import check
from metrics.quality import count


def own(root: Path, pictures: int = 2, size: tuple[int, int] = (24, 36)) -> Path:
    """A `panoptic` data set: two cars on a street under void, and every second time a crowd of cars."""
    content = {
        "categories": [
            {"id": 5, "name": "car", "isthing": 1, "color": [0, 0, 142]},
            {"id": 2, "name": "street", "isthing": 0, "color": [128, 64, 128]},
        ]
    }
    H, W = size
    for split in ("train", "val"):
        content |= {"images": [], "annotations": []}
        for i in range(pictures):
            ids = np.zeros(size, np.int32)
            ids[H // 4 :] = 70_000
            ids[H // 2 :, : W // 3], ids[H // 2 :, W // 3 : W // 2] = 1, 300
            labels = {70_000: 2, 1: 5, 300: 5}
            if i % 2:
                ids[-3:, -6:], labels[4] = 4, 5
            infos = [{"id": id, "category_id": k, "iscrowd": int(id == 4)} for id, k in labels.items()]
            save(noise(*size, seed=i), root / f"{split}/{i}.png")
            save(to_colours(ids), root / f"annotations/panoptic_{split}/{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png", "height": H, "width": W})
            entry = {"image_id": i, "file_name": f"{i}.png", "segments_info": infos}
            content["annotations"].append(entry)
        (root / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def coco(panopticapi_samples, tmp_path_factory) -> Path:
    """The official samples in the official layout, as val2017."""
    root, samples = tmp_path_factory.mktemp("coco"), panopticapi_samples
    shutil.copytree(samples / "input_images", root / "val2017")
    shutil.copytree(samples / "panoptic_examples", root / "annotations/panoptic_val2017")
    shutil.copy(samples / "golden_pq/gt.json", root / "annotations/panoptic_val2017.json")
    return root


# ---- COCO ------------------------------------------------------------------------------------------------


def test_coco_in_its_official_layout(coco):
    dataset = open_dataset("coco-panoptic", coco, "val")
    assert len(dataset) == 2
    assert len(dataset.classes) == 133
    assert dataset.paths[0] == "val2017/000000142238.jpg"
    assert dataset.image_ids == [142238, 439180]
    assert dataset.palette.tolist()[0] == [220, 20, 60]
    picture, _, ids, segments = dataset.load(0)
    assert picture.size == (640, 427)
    assert ids.shape == (427, 640)
    assert ids.dtype == np.int32
    assert {s.id for s in segments} == set(np.unique(ids).tolist()) - {0}
    assert [s.thing for s in segments] == [bool(dataset.categories.things[s.label]) for s in segments]
    assert any(s.crowd for s in segments)
    labels = dataset.load(0).labels
    assert (labels == 255).sum() == (ids == 0).sum() > 0
    for s in segments:
        assert (labels[ids == s.id] == s.label).all()
    assert "133" not in str(check(dataset))
    assert check(dataset).sizes == [(427, 640), (360, 640)]


def test_coco_prompts_are_words(coco):
    """Without "-merged", and otherwise as those of COCO-Stuff, whose classes they are."""
    dataset = open_dataset("coco-panoptic", coco, "val")
    prompts = dict(zip(dataset.classes, dataset.prompts, strict=True))
    assert prompts["sky-other-merged"] == "sky"
    assert prompts["tree-merged"] == "tree"
    assert prompts["floor-wood"] == "wood floor"
    assert prompts["wall-brick"] == "brick wall"
    assert prompts["window-blind"] == "window blind"
    assert prompts["door-stuff"] == "door"
    assert prompts["playingfield"] == "playing field"
    assert prompts["dining table"] == "dining table"
    assert len(set(dataset.prompts)) == 133
    assert all(re.fullmatch("[a-z ]+", p) for p in dataset.prompts)


def test_a_large_jpeg_comes_reduced_and_its_ids_never(coco):
    picture, _, ids, _ = open_dataset("coco-panoptic", coco, "val").load(0, 40, 60)
    assert picture.size == (320, 214)
    assert ids.shape == (427, 640)


# ---- one's own -------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_works(tmp_path):
    """Its JSON is parsed out of docs/using.md, its ids are the numbers drawn there."""
    text = (Path(__file__).parents[1] / "docs/using.md").read_text(encoding="utf-8")
    content = json.loads(text[text.index('{"categories"') :].partition("```")[0])
    for split in ("train", "val"):
        for name, ids in (("one", [[1, 1, 2, 2], [3, 3, 3, 3]]), ("two", [[7, 7, 7, 7], [7, 7, 0, 0]])):
            save(to_colours(np.array(ids)), tmp_path / f"annotations/panoptic_{split}/{name}.png")
            save(noise(2, 4), tmp_path / f"{split}/{name}.jpg")
        (tmp_path / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))
    dataset = open_dataset("panoptic", tmp_path, "train")
    assert dataset.classes == dataset.prompts == ["car", "street"]
    check(dataset)
    assert dataset.load(0)[1].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert dataset.load(1)[1].tolist() == [[1, 1, 1, 1], [1, 1, 255, 255]]
    assert [(s.id, s.label, s.thing) for s in dataset.load(0).segments] == [
        (1, 0, True),
        (2, 0, True),
        (3, 1, False),
    ]


def test_ones_own_data(tmp_path):
    dataset = open_dataset("panoptic", own(tmp_path), "val")
    *_, ids, segments = dataset.load(1)
    assert [(s.id, s.label, s.thing, s.crowd) for s in segments] == [
        (70_000, 1, False, False),
        (1, 0, True, False),
        (300, 0, True, False),
        (4, 0, True, True),
    ]
    assert count(ids, segments, ids, segments, 2)[:, 1].tolist() == [2, 1]
    assert dataset.names(0) == [f"{tmp_path}/val/0.png", f"{tmp_path}/annotations/panoptic_val/0.png"]


def test_missing_files_are_told_by_name(tmp_path):
    own(tmp_path, pictures=4)
    (tmp_path / "val/0.png").unlink()
    (tmp_path / "annotations/panoptic_val/2.png").unlink()
    save(noise(8, 8), tmp_path / "val/more.jpg")
    dataset = open_dataset("panoptic", tmp_path, "val")
    json_file = f"{tmp_path}/annotations/panoptic_val.json"
    assert dataset.missing == [
        f"{tmp_path}/val/0.png does not exist, but {json_file} lists it",
        f"{tmp_path}/annotations/panoptic_val/2.png does not exist, but {json_file} lists it",
        f"{tmp_path}/val/more.jpg has no annotation in {json_file}",
    ]
    assert [len(dataset.names(i)) for i in range(4)] == [1, 2, 1, 2]
    for i in (0, 2):
        with pytest.raises(DataError, match="does not exist, but .* lists it"):
            dataset.load(i)
    with pytest.raises(DataError, match="panoptic val has 3 faults") as caught:
        check(dataset)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == dataset.missing


def test_images_in_folders_below(tmp_path):
    own(tmp_path)
    (tmp_path / "val/deep").mkdir()
    (tmp_path / "val/1.png").rename(tmp_path / "val/deep/1.png")
    file = tmp_path / "annotations/panoptic_val.json"
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = "deep/1.png"
    file.write_text(json.dumps(content))
    dataset = open_dataset("panoptic", tmp_path, "val")
    assert dataset.paths[:2] == ["val/0.png", "val/deep/1.png"]
    assert dataset.names(1) == [f"{tmp_path}/val/deep/1.png", f"{tmp_path}/annotations/panoptic_val/1.png"]


def test_files_that_do_not_fit(tmp_path):
    own(tmp_path)
    save(noise(25, 36), tmp_path / "val/0.png")
    dataset = open_dataset("panoptic", tmp_path, "val")
    with pytest.raises(DataError, match=r"panoptic_val/0.png is 36x24 and its image, .* 36x25: both need"):
        dataset.load(0)
    save(to_colours(np.full((24, 36), 9)), tmp_path / "annotations/panoptic_val/1.png")
    with pytest.raises(DataError, match="panoptic_val/1.png holds the id 9"):
        dataset.load(1)
    damage(tmp_path / "annotations/panoptic_val/1.png", "cut")
    with pytest.raises(Unreadable, match="panoptic_val/1.png"):
        dataset.load(1)


def test_what_is_not_such_a_data_set_is_refused(tmp_path, coco):
    with pytest.raises(DataError, match="no data set 'coco': choose ade20k.* coco-panoptic, panoptic or sc"):
        open_dataset("coco", coco, "val")
    with pytest.raises(DataError, match="coco-panoptic has no labelled split 'test': choose train, val"):
        open_dataset("coco-panoptic", coco, "test")
    with pytest.raises(DataError, match=r"is not coco-panoptic: train2017 and .*; --data must be coco\n"):
        open_dataset("coco-panoptic", coco, "train")
    own(tmp_path / "coco")
    with pytest.raises(DataError, match=f"; give --data {tmp_path}/coco$"):
        open_dataset("coco-panoptic", tmp_path, "val")
    shutil.rmtree(tmp_path / "coco/annotations/panoptic_val")
    with pytest.raises(DataError, match="unpack annotations/panoptic_val.zip there"):
        open_dataset("panoptic", tmp_path / "coco", "val")
    with pytest.raises(DataError, match="scenes has no labelled split 'all'"):
        open_dataset("scenes", "", "all")


# ---- drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_in_panoptic_form(split):
    """Each instance is one thing of one class, each class of stuff one segment; every pixel has one."""
    dataset = open_dataset("scenes", "", split)
    things = dataset.categories.things
    for i in range(40):
        picture, _, ids, segments = dataset.load(i)
        scene = scenes.draw(scenes.SPLITS[split][i])
        assert (np.asarray(picture) == scene.image).all()
        assert sorted(s.id for s in segments) == np.unique(ids).tolist()
        assert ids.min() > 0
        assert (dataset.load(i)[1] == scene.labels).all()
        stuff = [s.label for s in segments if not s.thing]
        assert len(stuff) == len(set(stuff))
        for s in segments:
            assert s.thing == things[s.label]
            assert not s.crowd
            instances = np.unique(scene.instances[ids == s.id])
            assert len(instances) == 1
            assert (instances[0] > 0) == s.thing
        assert sum(s.thing for s in segments) == scene.instances.max()
    assert len(dataset) == len(scenes.SPLITS[split])
    assert dataset.paths[0] == f"scenes/{scenes.SPLITS[split][0]:06d}"
    assert dataset.names(0) == []
