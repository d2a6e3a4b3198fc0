"""images/panoptic.py and metrics/quality.py: the format written and read, PQ as panopticapi counts, AP."""

import json
import re
import shutil
import sys
import tempfile
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from errors import DataError
from images.colours import complete_palette
from images.instances import paint
from images.panoptic import (
    LARGEST_ID,
    Annotations,
    Categories,
    Segment,
    annotation,
    components,
    from_colours,
    positions,
    read_annotations,
    read_map,
    semantic,
    to_colours,
    write_annotations,
    write_ids,
)
from metrics.quality import (
    Quality,
    coco_results,
    coco_truth,
    compare,
    count,
    main,
    mask_precision,
)

Instance = namedtuple("Instance", "score label mask")
THINGS = np.array([True, True, False])  # of the small examples
CATEGORIES = Categories(["cat", "dog", "grass"], [7, 3, 100], np.eye(3, dtype=np.uint8) * 200, THINGS)


@pytest.fixture(scope="module")
def golden(panopticapi_samples):
    """The samples' truth and the perturbed prediction, with what panopticapi itself says of them."""
    samples = panopticapi_samples
    truth = read_annotations(samples / "golden_pq/gt.json")
    predicted = read_annotations(samples / "golden_pq/pr.json")
    expected = json.loads((samples / "golden_pq/expected.json").read_text())["expected"]
    return truth, samples / "panoptic_examples", predicted, samples / "golden_pq", expected


def write(folder, truth: Annotations, source) -> Annotations:
    """The images of `truth` once more, by our own writers."""
    entries, images = [], []
    for i in range(len(truth)):
        ids, segments = truth.ids(i, source), truth.segments(i)
        write_ids(ids, folder / truth.pngs[i])
        entries.append(entry(truth.image_ids[i], truth.pngs[i], ids, segments, truth.categories))
        images.append({"id": truth.image_ids[i], "file_name": truth.file_names[i]})
    write_annotations(folder.with_suffix(".json"), truth.categories, images, entries)
    return read_annotations(folder.with_suffix(".json"))


def entry(image_id, png: str, ids, segments: list[Segment], categories: Categories) -> dict:
    return annotation(image_id, png, ids, segments, categories.ids)


# ---- the format ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_ids_and_colours(ids):
    ids = np.array([ids], np.int32)
    colours = to_colours(ids)
    assert colours.dtype == np.uint8
    assert (from_colours(colours) == ids).all()
    value = colours.astype(int)
    assert (value[..., 0] + 256 * value[..., 1] + 65536 * value[..., 2] == ids).all()


def test_every_id_has_a_colour_of_its_own():
    """All 2^24."""
    for first in range(0, LARGEST_ID, 2**20):
        ids = np.arange(first, first + 2**20, dtype=np.int32).reshape(1024, 1024)
        assert np.array_equal(from_colours(to_colours(ids)), ids)


EDGES = (1, 255, 256, 257, 65535, 65536, 65793, LARGEST_ID - 1, LARGEST_ID)


@st.composite
def maps_of_ids(draw):
    """A map of any size with void, and its segments in any order, of any class, some of them crowds."""
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(EDGES) | st.integers(1, LARGEST_ID), max_size=6, unique=True))
    cells = draw(st.lists(st.sampled_from([0, *names]), min_size=H * W, max_size=H * W))
    ids = np.array(cells, np.int32).reshape(H, W)
    segments = []
    for id in draw(st.permutations(sorted(set(cells) - {0}))):
        label = draw(st.integers(0, 2))
        segments.append(Segment(id, label, bool(THINGS[label]), draw(st.booleans())))
    return ids, segments


@given(st.lists(maps_of_ids(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_what_is_written_is_read(some):
    """PNG and JSON: ids, classes, crowds, the order of segments and of images."""
    with tempfile.TemporaryDirectory() as name:
        folder, entries, images = Path(name), [], []
        for i, (ids, segments) in enumerate(some):
            write_ids(ids, folder / f"{i}.png")
            entries.append(entry(i, f"{i}.png", ids, segments, CATEGORIES))
            images.append({"id": i, "file_name": f"{i}.jpg"})
        write_annotations(folder / "x.json", CATEGORIES, images, entries)
        again = read_annotations(folder / "x.json")
        assert again.image_ids == [*range(len(some))]
        assert again.categories.as_json() == CATEGORIES.as_json()
        for i, (ids, segments) in enumerate(some):
            assert again.segments(i) == segments
            assert np.array_equal(again.ids(i, folder), ids)


@given(maps_of_ids())
@settings(max_examples=30)
def test_run_lengths_are_their_pixels(image):
    """Things as COCO's RLE, painted again: the same regions, crowds too."""
    ids, segments = image
    things = [s for s in segments if s.thing]
    objects = [("here", x) for x in coco_truth(1, ids, segments, CATEGORIES.ids)]
    painted, visible = paint(objects, ids.shape, "here")
    assert len(visible) == len(things)
    for id, info in visible.items():
        (s,) = [s for s in things if s.id == info["id"]]
        assert np.array_equal(painted == id, ids == s.id)
        assert (info["iscrowd"], info["category_id"]) == (s.crowd, CATEGORIES.ids[s.label])


def test_the_official_samples(golden, panopticapi_samples):
    """133 classes, 80 of them things, in the official order and colours; every PNG fits its segments."""
    truth, folder, *_ = golden
    official = json.loads((panopticapi_samples / "panoptic_coco_categories.json").read_text())
    assert [c["name"] for c in official] == truth.categories.names
    assert [c["color"] for c in official] == truth.categories.palette.tolist()
    assert [c["id"] for c in official] == truth.categories.ids
    assert truth.categories.things.sum() == 80
    assert [len(truth.segments(i)) for i in range(2)] == [18, 32]
    raw = json.loads((panopticapi_samples / "golden_pq/gt.json").read_text())
    for i, official in enumerate(raw["annotations"]):
        ids, segments = truth.ids(i, folder), truth.segments(i)
        assert any(s.crowd for s in segments)
        again = entry(official["image_id"], official["file_name"], ids, segments, truth.categories)
        for ours, theirs in zip(again["segments_info"], official["segments_info"], strict=True):
            for key in ("id", "category_id", "iscrowd", "area"):
                assert ours[key] == theirs[key]


def test_positions_and_classes():
    ids = np.array([[9, 9, 0], [4, 5, 9]], np.int32)
    segments = [Segment(9, 2, False), Segment(4, 1, True, True)]
    assert positions(ids, segments).tolist() == [[0, 0, -1], [1, -1, 0]]
    assert semantic(ids, segments).tolist() == [[2, 2, 255], [1, 255, 2]]
    assert (positions(ids, []) == -1).all()
    infos = entry(1, "x.png", ids, [*segments, Segment(1, 0, True)], CATEGORIES)["segments_info"]
    assert [x["bbox"] for x in infos] == [[0, 0, 3, 2], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert [x["area"] for x in infos] == [3, 1, 0]


def test_what_is_written_is_read_back_with_the_same_quality(golden, tmp_path):
    truth, folder, predicted, predicted_folder, _ = golden
    again = write(tmp_path / "prediction", predicted, predicted_folder)
    before = compare(truth, folder, predicted, predicted_folder)
    after = compare(truth, folder, again, tmp_path / "prediction")
    assert torch.equal(before.counts, after.counts)
    assert again.categories.names == truth.categories.names
    assert (again.categories.palette == truth.categories.palette).all()
    assert [again.segments(i) for i in range(2)] == [predicted.segments(i) for i in range(2)]


def sample(**changes) -> dict:
    """A JSON of one image."""
    content = {
        "categories": [{"id": 7, "name": "cat", "isthing": 1, "color": [1, 2, 3]}],
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": annotated({"id": 5, "category_id": 7}),
    }
    return content | changes


def annotated(*infos: dict, image_id=1) -> list[dict]:
    return [{"image_id": image_id, "file_name": "a.png", "segments_info": [*infos]}]


def named(png: str) -> list[dict]:
    return [annotated({"id": 5, "category_id": 7})[0] | {"file_name": png}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object with the lists categories, images, annotations"),
        (sample(images=None), "must be an object with the lists"),
        (sample(annotations=[]), "has no annotation"),
        (sample(categories=[]), "has 0 categories: give 1 to 255"),
        (sample(categories=[{"id": 7, "name": "cat"}]), r"categories\[0\] must have .*isthing"),
        (sample(categories=2 * sample()["categories"]), r"categories\[1\]: the id 7 .* is a duplicate"),
        (
            sample(categories=[{"id": 7, "name": "c\ud83dt", "isthing": 1}]),
            "has half a character",
        ),
        (
            sample(categories=[{"id": 7, "name": "cat", "isthing": 1, "color": [1, 2, 300]}]),
            r"categories\[0\]: \"color\" must be .* not \[1, 2, 300\]",
        ),
        (sample(images=[{"id": 1}]), r"images\[0\] must have \"id\", \"file_name\""),
        (sample(annotations=annotated(image_id=2)), r"annotations\[0\]: there is no image with the id 2"),
        (sample(annotations=2 * annotated()), r"annotations\[1\]: the image 1 has two annotations"),
        (sample(annotations=[{"image_id": 1}]), r"annotations\[0\] must have \"image_id\", \"file_name\""),
        (
            sample(annotations=annotated({"id": 5, "category_id": 8})),
            r"annotations\[0\]: the category_id 8 of the segment 5 is not a category",
        ),
        (sample(annotations=annotated({"id": 0, "category_id": 7})), 'an "id" in 1..16777215'),
        (sample(annotations=annotated(*2 * [{"id": 5, "category_id": 7}])), "the id 5 is a duplicate"),
        (sample(annotations=named("/tmp/a.png")), r"annotations\[0\]: the file_name '/tmp/a.png' leads out"),
        (sample(annotations=named("b/../../a.png")), "'b/../../a.png' leads out of the PNGs' folder"),
    ],
)
def test_a_wrong_json_is_refused(tmp_path, content, message):
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(file)
    assert str(file) in str(caught.value)


def test_a_json_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="none.json cannot be read"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match="half.json is not JSON"):
        read_annotations(tmp_path / "half.json")


def test_a_json_with_little_in_it_is_enough(tmp_path):
    """No colours, areas, boxes, crowds, sizes; names of images decide the order."""
    content = sample(
        categories=[{"id": 7, "name": "cat", "isthing": 1}],
        images=[{"id": "b", "file_name": "b.jpg"}, {"id": "a", "file_name": "a.jpg"}],
        annotations=[
            {"image_id": "b", "file_name": "b.png", "segments_info": []},
            {"image_id": "a", "file_name": "a.png", "segments_info": [{"id": 5, "category_id": 7}]},
        ],
    )
    (tmp_path / "x.json").write_text(json.dumps(content))
    read = read_annotations(tmp_path / "x.json")
    assert read.file_names == ["a.jpg", "b.jpg"]
    assert read.image_ids == ["a", "b"]
    assert [read.segments(i) for i in range(2)] == [[Segment(5, 0, True)], []]
    assert read.categories.palette.tolist() == complete_palette([None]).tolist()


def test_a_png_that_does_not_fit_its_segments_is_refused(tmp_path):
    write_ids(np.array([[0, 5, 6]]), tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png holds the id 6, which its segments_info does not list"):
        read_map(tmp_path / "a.png", [Segment(5, 0, True)])
    with pytest.raises(DataError, match="a.png has no pixel of the id 8 that its segments_info lists"):
        read_map(tmp_path / "a.png", [Segment(5, 0, True), Segment(6, 0, True), Segment(8, 0, True)])
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(DataError, match="grey.png has mode L: a panoptic PNG is RGB"):
        read_map(tmp_path / "grey.png", [])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="broken.png"):
        read_map(tmp_path / "broken.png", [])


# ---- PQ --------------------------------------------------------------------------------------------------


def test_the_quality_is_that_of_panopticapi(golden):
    """Every number that its `pq_compute` printed, to the last digit but rounding of sums."""
    truth, folder, predicted, predicted_folder, expected = golden
    quality = compare(truth, folder, predicted, predicted_folder)
    for which, name in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        mean = quality.mean(which)
        assert mean["n"] == expected[name]["n"]
        for key in ("PQ", "SQ", "RQ"):
            assert mean[key] == pytest.approx(expected[name][key.lower()], abs=1e-12)
    rows = quality.classes
    for id, numbers in expected["per_class"].items():
        row = rows[truth.categories.ids.index(int(id))].tolist()
        assert row == pytest.approx([numbers[key] for key in ("pq", "sq", "rq")], abs=1e-12)
    assert quality.mean()["PQ"] == pytest.approx(0.539615, abs=1e-6)


def test_the_command_prints_what_panopticapi_prints(golden, tmp_path, capsys):
    """In percent; of a prediction too that has annotations alone, and PNGs in the folder of its name."""
    truth, folder, predicted, predicted_folder, expected = golden
    command = [str(truth.file), str(predicted.file), "--truth-folder", str(folder)]
    assert main([*command, "--prediction-folder", str(predicted_folder)]) == 0
    said = capsys.readouterr().out
    head, *rows = (line.split() for line in said.splitlines())
    assert head == ["PQ", "SQ", "RQ", "classes"]
    for row, name in zip(rows, ("All", "Things", "Stuff"), strict=True):
        numbers = [f"{100 * expected[name][key]:.2f}" for key in ("pq", "sq", "rq")]
        assert row == [name.lower(), *numbers, str(expected[name]["n"])]

    content = json.loads(predicted.file.read_text())
    (tmp_path / "few.json").write_text(json.dumps({"annotations": content["annotations"]}))
    shutil.copytree(predicted_folder, tmp_path / "few")
    assert main([command[0], str(tmp_path / "few.json"), *command[2:]]) == 0
    assert capsys.readouterr().out == said

    file = str(small(tmp_path, np.array([[1]]), [Segment(1, 0, True)]).file)
    assert main([file, file, "--truth-folder", str(tmp_path), "--prediction-folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "all     100.00  100.00  100.00        1",
        "things  100.00  100.00  100.00        1",
        "stuff        -       -       -        0",
    ]


def test_what_cannot_be_compared_gets_one_sentence(golden, tmp_path, capsys):
    truth, folder, predicted, predicted_folder, _ = golden
    (tmp_path / "half.json").write_text('{"images": [')
    (tmp_path / "list.json").write_text("[]")
    content = json.loads(predicted.file.read_text())
    del content["annotations"][0]
    (tmp_path / "less.json").write_text(json.dumps(content))
    left, right = str(truth.file), str(predicted.file)
    there = ["--truth-folder", str(folder), "--prediction-folder", str(predicted_folder)]
    cases = [
        (["none.json", right, *there], "none.json cannot be read"),
        ([left, str(tmp_path / "half.json"), *there], "half.json is not JSON"),
        ([left, str(tmp_path / "list.json"), *there], "list.json must be an object with the lists"),
        ([left, right], "golden_pq/gt is not a folder: give that of the PNGs of .* with --truth-folder"),
        ([left, right, *there[:2]], "golden_pq/pr is not a folder: .* with --prediction-folder"),
        ([left, str(tmp_path / "less.json"), *there], "less.json has no annotation for the image 142238"),
        ([left, right, *there[:3], str(tmp_path)], r".*\.png cannot be read \(No such file"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert re.match(f"metrics.quality: .*{message}", err) and err.count("\n") == 1 and not out, err


def test_the_truth_itself_is_perfect(golden):
    truth, folder, *_ = golden
    quality = compare(truth, folder, truth, folder)
    assert quality.counts[:, 2:].sum() == 0  # a crowd, predicted as one segment, lies on itself: no FP
    assert quality.mean() == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0, "n": int((quality.counts[:, 1] > 0).sum())}


def test_counting_by_hand():
    """A match at IoU 2/3 with void taken out of the union; a thing missed, one invented, one on a crowd."""
    truth = np.array([[1, 1, 1, 0, 0, 2, 2, 3, 3, 3]])
    truths = [Segment(1, 0, True), Segment(2, 1, True), Segment(3, 0, True, True)]
    predicted = np.array([[4, 4, 0, 4, 5, 6, 6, 7, 7, 0]])
    predictions = [Segment(4, 0, True), Segment(5, 1, True), Segment(6, 0, True), Segment(7, 0, True)]
    counts = count(truth, truths, predicted, predictions, 3)
    # 4 matches 1: 2 / (3 + 3 - 2 - 1). 5 lies on void, 7 on the crowd. 6 is FP of class 0, 2 FN of class 1.
    assert counts.tolist() == [[2 / 3, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    quality = Quality(counts, THINGS)
    assert quality.classes[0].tolist() == pytest.approx([2 / 3 / 1.5, 2 / 3, 1 / 1.5])
    assert quality.classes[1].tolist() == [0, 0, 0]
    assert quality.classes[2].isnan().all()
    assert quality.mean("things")["n"] == 2
    assert quality.mean("stuff")["n"] == 0
    assert np.isnan(quality.mean("stuff")["PQ"])


def test_a_crowd_of_another_class_excuses_nothing_and_half_is_not_more_than_half():
    crowd = [Segment(1, 0, True, True)]
    truth = np.array([[1, 1, 0, 0]])
    assert count(truth, crowd, np.array([[2, 2, 0, 0]]), [Segment(2, 1, True)], 2)[1].tolist() == [0, 0, 1, 0]
    half = [Segment(1, 1, True)]
    assert count(truth, half, np.array([[0, 2, 2, 0]]), [Segment(2, 0, True)], 2)[0].tolist() == [0, 0, 1, 0]


def test_predictions_must_list_their_ids():
    ids = np.array([[1, 2]])
    for listed in ([1], [1, 2, 3], [1, 1, 2]):
        with pytest.raises(ValueError, match="the prediction and of its segments differ, such as [123]"):
            count(ids, [], ids, [Segment(id, 0, True) for id in listed], 1)
    with pytest.raises(ValueError, match=r"the prediction is \(1, 2\), but the truth \(2, 1\)"):
        count(ids.T, [], ids, [], 1)


def brute_force(truth, truths, predicted, predictions, K) -> np.ndarray:
    """The definition with sets of pixels, one pair after the other."""
    truth, predicted = truth.ravel().tolist(), predicted.ravel().tolist()

    def of(ids, id):
        return {pixel for pixel, x in enumerate(ids) if x == id}

    void, counts = of(truth, 0), np.zeros((K, 4))
    partners = {}
    for p in predictions:
        for t in truths:
            a, b = of(predicted, p.id), of(truth, t.id)
            union = (a - void) | b
            if p.label == t.label and not t.crowd and union and len(a & b) / len(union) > 0.5:
                counts[t.label] += [len(a & b) / len(union), 1, 0, 0]
                partners[p.id] = t.id
    assert len(set(partners.values())) == len(partners)
    for t in truths:
        counts[t.label, 3] += not t.crowd and t.id not in partners.values()
    for p in predictions:
        area, crowds = of(predicted, p.id), [t for t in truths if t.crowd and t.label == p.label]
        excused = len(area & void) + (len(area & of(truth, crowds[-1].id)) if crowds else 0)
        counts[p.label, 2] += p.id not in partners and not 2 * excused > len(area)
    return counts


@st.composite
def pictures(draw):
    """Truth and prediction of one small image: void, crowds, empty maps, few ids so that many match."""
    H, W = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    cells = st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 70000]), min_size=H * W, max_size=H * W)
    truth = np.array(draw(cells)).reshape(H, W)
    predicted = draw(st.one_of(st.just(truth), cells.map(lambda x: np.array(x).reshape(H, W))))
    if draw(st.booleans()):
        predicted = np.where(predicted == 0, 0, predicted + 5)

    def segments(ids, crowds):
        present = draw(st.permutations(sorted(set(ids.ravel().tolist()) - {0})))
        return [Segment(id, draw(st.integers(0, 1)), True, crowds and draw(st.booleans())) for id in present]

    truths = segments(truth, True)
    if truths and draw(st.booleans()):
        truths.append(Segment(99, 1, True))  # without a pixel
    return truth, truths, predicted, segments(predicted, False)


@given(pictures())
@settings(max_examples=300, deadline=None)
def test_counting_equals_brute_force(picture):
    counts = count(*picture, 2)
    np.testing.assert_allclose(counts.numpy(), brute_force(*picture, 2), rtol=1e-12)


@given(st.lists(pictures(), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_sum_of_the_ranks_is_the_whole(some, world):
    """Counts add up, so processes may share the images in any way."""
    whole = sum(count(*picture, 2) for picture in some)
    parts = [[count(*p, 2) for p in some[rank::world]] for rank in range(world)]
    ranks = [sum(part, torch.zeros(2, 4, dtype=torch.float64)) for part in parts]
    torch.testing.assert_close(sum(ranks), whole, rtol=1e-12, atol=0)


@given(pictures(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_names_of_segments_do_not_count(picture, data):
    """Other ids on both sides, and the prediction's segments in another order."""
    sides = []
    for ids, segments in (picture[:2], picture[2:]):
        old = sorted({s.id for s in segments} | set(ids.ravel().tolist()) - {0})
        numbers = st.lists(st.integers(1, LARGEST_ID), min_size=len(old), max_size=len(old), unique=True)
        new = dict(zip(old, data.draw(numbers), strict=True)) | {0: 0}
        other = np.array([new[id] for id in ids.ravel().tolist()]).reshape(ids.shape)
        sides.append((other, [s._replace(id=new[s.id]) for s in segments]))
    (truth, truths), (predicted, predictions) = sides
    other = count(truth, truths, predicted, data.draw(st.permutations(predictions)), 2)
    np.testing.assert_allclose(other, count(*picture, 2), rtol=1e-12)


def peak_bytes(function, *arguments) -> int:
    """The most memory that a call held at once, of Python and numpy."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_counting_takes_memory_for_segments_and_not_for_their_pairs():
    """Four times the segments, as many as there are pixels: four times the bytes, not sixteen."""

    def peak(side: int) -> int:
        ids = np.arange(1, side**2 + 1).reshape(side, side)
        segments = [Segment(id, 0, True) for id in range(1, side**2 + 1)]
        return peak_bytes(count, ids, segments, ids, segments, 1)

    assert peak(64) < 6 * peak(32)


def test_comparing_files_that_do_not_belong_together(golden, tmp_path):
    truth, folder, predicted, predicted_folder, _ = golden
    more = Categories(["quokka"], [777], np.zeros((1, 3), np.uint8), np.array([True]))
    other = small(tmp_path, np.array([[1]]), [Segment(1, 0, True)], more)
    with pytest.raises(DataError, match="x.json has the category_id 777, which .*gt.json lacks"):
        compare(truth, folder, other, tmp_path)
    content = json.loads(predicted.file.read_text())
    del content["annotations"][0]
    (tmp_path / "less.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="less.json has no annotation for the image 142238"):
        compare(truth, folder, read_annotations(tmp_path / "less.json"), predicted_folder)
    first = small(tmp_path / "a", np.array([[1, 1]]), [Segment(1, 0, True)])
    second = small(tmp_path / "b", np.array([[1]]), [Segment(1, 0, True)])
    with pytest.raises(DataError, match=r"x.png: the prediction is \(1, 1\), but the truth \(1, 2\)"):
        compare(first, tmp_path / "a", second, tmp_path / "b")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_classes_are_matched_by_their_ids(tmp_path, order):
    """../shared/cases/pq_categories.py: a rug of IoU 1 and a false one, half of a road, a person: 55.56."""
    things = np.array([True, False, False])
    kinds = Categories(["person", "road", "rug"], [1, 7, 200], np.zeros((3, 3), np.uint8), things)
    other = Categories(*([column[k] for k in order] for column in (kinds.names, kinds.ids)),
                       kinds.palette, things[[*order]])  # fmt: skip
    ids = np.repeat([3, 3, 2, 1], 8).reshape(4, 8)
    found = ids.copy()
    found[2, :4] = 4
    truth = small(tmp_path / "truth", ids, [Segment(id, id - 1, id == 1) for id in (1, 2, 3)], kinds)
    label = {id: order.index(k) for id, k in ((1, 0), (2, 1), (3, 2), (4, 2))}
    predicted = small(tmp_path / "found", found, [Segment(id, label[id], False) for id in label], other)
    quality = compare(truth, tmp_path / "truth", predicted, tmp_path / "found")
    assert quality.mean()["PQ"] == pytest.approx((1 + 0 + 1 / 1.5) / 3)
    assert quality.classes[:, 0].tolist() == pytest.approx([1, 0, 1 / 1.5])


def test_names_may_be_composed_otherwise(tmp_path):
    """The JSON writes "é" as one letter, the disk as "e" and an accent, as macOS does; and the reverse."""
    ids, segments = scene_of_things()
    for written, other in (("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png")):
        truth = small(tmp_path, ids, segments)
        (tmp_path / "x.png").rename(tmp_path / other)
        truth.pngs[:] = [written]
        assert compare(truth, tmp_path, truth, tmp_path).mean()["PQ"] == 1
        (tmp_path / other).unlink()


def small(folder, ids: np.ndarray, segments: list[Segment], kinds: Categories = CATEGORIES) -> Annotations:
    """One written image."""
    write_ids(ids, folder / "x.png")
    entries = [entry(1, "x.png", ids, segments, kinds)]
    write_annotations(folder / "x.json", kinds, [{"id": 1, "file_name": "x.jpg"}], entries)
    return read_annotations(folder / "x.json")


# ---- AP --------------------------------------------------------------------------------------------------


def scene_of_things() -> tuple[np.ndarray, list[Segment]]:
    """A cat, two dogs, a crowd of dogs, grass."""
    ids = np.zeros((40, 60), np.int32)
    ids[20:] = 9
    for id, (top, left) in {1: (2, 2), 2: (2, 20), 3: (22, 2), 4: (22, 30)}.items():
        ids[top : top + 10, left : left + 12] = id
    labels = {1: 0, 2: 1, 3: 1, 4: 1, 9: 2}
    return ids, [Segment(id, k, bool(THINGS[k]), id == 4) for id, k in labels.items()]


def precision(instances: list[Instance]) -> dict[str, float]:
    ids, segments = scene_of_things()
    images = [{"id": 5, "height": 40, "width": 60}]
    truth = coco_truth(5, ids, segments, CATEGORIES.ids)
    return mask_precision(images, truth, coco_results(5, instances, CATEGORIES.ids), CATEGORIES)


def test_average_precision_by_hand():
    """All found: 1. A dog missed: recall 1/2 of its class, 51 of 101 recall levels, so (1 + 51/101) / 2."""
    ids, segments = scene_of_things()
    found = [Instance(0.9, s.label, ids == s.id) for s in segments if s.thing]
    assert precision(found)["AP"] == pytest.approx(1)  # what lies on the crowd counts neither way
    assert precision(found[:2])["AP"] == pytest.approx((1 + 51 / 101) / 2)
    assert precision(found[1:])["AP"] == pytest.approx(0.5)
    lower = [found[0], *[Instance(0.5, s.label, s.mask) for s in found[1:]], Instance(0.8, 1, ids == 1)]
    assert precision(lower)["AP"] < 0.9  # a false dog before the true ones
    assert precision([])["AP"] == 0
    shrunk = ids.copy()
    shrunk[2:5, 2:14] = 0  # the cat at IoU 0.7
    numbers = precision([Instance(0.9, 0, shrunk == 1), *found[1:]])
    assert numbers["AP50"] == pytest.approx(1)
    assert numbers["AP75"] == pytest.approx(0.5)
    assert np.isnan(numbers["APl"])


def test_measuring_leaves_the_results_as_they_are():
    """A file for COCO's server can be written of them after it, too."""
    ids, segments = scene_of_things()
    results = coco_results(5, [Instance(0.9, s.label, ids == s.id) for s in segments], CATEGORIES.ids)
    before = json.dumps(results)
    images, truth = [{"id": 5, "height": 40, "width": 60}], coco_truth(5, ids, segments, CATEGORIES.ids)
    mask_precision(images, truth, results, CATEGORIES)
    assert json.dumps(results) == before


def test_image_ids_may_be_numbers_and_texts():
    """pycocotools sorts them, which ends in a TypeError; annotations of images not evaluated do not count."""
    ids, segments = scene_of_things()
    found = [Instance(0.9, s.label, ids == s.id) for s in segments if s.thing]
    names = (5, "000005", "x")
    images = [{"id": id, "height": 40, "width": 60} for id in names[:2]]
    truth = [entry for id in names for entry in coco_truth(id, ids, segments, CATEGORIES.ids)]
    results = [entry for id in names[:2] for entry in coco_results(id, found, CATEGORIES.ids)]
    assert mask_precision(images, truth, results, CATEGORIES)["AP"] == pytest.approx(1)


def test_things_as_instances_are_cocos_own_conversion(golden, panopticapi_samples):
    """The samples in COCO's detection format, made by panopticapi: classes, areas, boxes, pixels."""
    from pycocotools import mask

    truth, folder, *_ = golden
    official = json.loads((panopticapi_samples / "panoptic_coco_detection_format.json").read_text())
    things = {c["id"] for c in truth.categories.as_json() if c["isthing"]}
    keys = ("image_id", "category_id", "area", "iscrowd", "bbox")
    rows = [[a[key] for key in keys] for a in official["annotations"] if a["category_id"] in things]
    for i, image_id in enumerate(truth.image_ids):
        ours = coco_truth(image_id, truth.ids(i, folder), truth.segments(i), truth.categories.ids)
        theirs = [row for row in rows if row[0] == image_id]
        assert sorted([a[key] for key in keys] for a in ours) == sorted(theirs)
        for a in ours:
            assert mask.area(a["segmentation"]) == a["area"]


def test_without_pycocotools_one_sentence_says_so(monkeypatch):
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="need pycocotools: pip install pycocotools"):
        coco_results(1, [Instance(1.0, 0, np.ones((2, 2), bool))], [1])


def test_things_as_instances_are_their_masks_encoded_one_by_one():
    """Things cut by others and by the edges, the last pixel too, and one without a pixel."""
    from pycocotools import mask

    ids = np.random.default_rng(0).integers(0, 5, (7, 9)).repeat(2, axis=0)
    ids[:, -1] = 4
    segments = [Segment(id, 0, True) for id in (3, 1, 9, 4)]
    for thing, s in zip(coco_truth(1, ids, segments, [1]), segments, strict=True):
        encoded = mask.encode(np.asfortranarray(ids == s.id, np.uint8))
        assert thing["segmentation"] == {"size": [14, 9], "counts": encoded["counts"].decode()}


class Counted(np.ndarray):
    """An array that counts the elements of all elementwise operations on it."""

    elements = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        Counted.elements += max(map(np.size, inputs))
        plain = (x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs)
        return getattr(ufunc, method)(*plain, **options)


@pytest.mark.parametrize(
    "work",
    [
        lambda ids, segments: annotation(1, "x.png", ids, segments, [1]),
        lambda ids, segments: coco_truth(1, ids, segments, [1]),
        lambda ids, segments: components((ids - 1).view(Counted), [True] * len(segments)),
    ],
    ids=["annotation", "coco_truth", "components"],
)
def test_no_segment_scans_the_whole_map(work):
    """Ten times the segments in as many pixels are nearly the same work."""

    def elements(n: int) -> int:
        ids = np.arange(1, n + 1, dtype=np.int32).repeat(800 // n)[:, None].repeat(16, axis=1)
        before = Counted.elements
        work(ids.view(Counted), [Segment(id, 0, True) for id in range(1, n + 1)])
        return Counted.elements - before

    assert elements(80) < 1.5 * elements(8)


# ---- segments from classes -------------------------------------------------------------------------------


def test_components_of_a_map_of_classes():
    labels = np.array([[0, 0, 2, 0], [2, 2, 255, 0], [0, 1, 1, 2]], np.uint8)
    ids, segments = components(labels, THINGS)
    assert semantic(ids, segments).tolist() == labels.tolist()
    assert [s.label for s in segments] == [0, 0, 0, 1, 2]
    assert [s.thing for s in segments] == [True, True, True, True, False]
    count(ids, segments, ids, segments, 3)  # every id is listed
    assert components(np.full((2, 2), 255, np.uint8), THINGS)[1] == []
