"""PQ, AP and mIoU against hotcoco and vernier, two evaluators in Rust: equal to the last digits."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import hotcoco
import hotcoco.panoptic
import hotcoco.semantic
import numpy as np
import pytest
import torch
import vernier.instance
import vernier.panoptic
import vernier.semantic
from pycocotools import mask
from test_metrics_report import result_of

from images.panoptic import (
    Annotations,
    Categories,
    Segment,
    annotation,
    read_annotations,
    semantic,
    write_annotations,
    write_ids,
)
from images.read import IGNORE
from metrics.quality import GROUPS, coco_results, coco_truth, compare, mask_precision
from metrics.report import confusion

Instance = namedtuple("Instance", "score label mask")
THINGS = np.array([True, True, True, False, False])
KINDS = Categories([*"abcde"], [7, 3, 100, 1, 42], np.eye(5, 3, dtype=np.uint8) * 200, THINGS)
SIZES = [(40, 60), (61, 37), (48, 48), (24, 90)]
BAR = {"rel": 1e-12, "abs": 0}


def blobs(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, list[Segment]]:
    """Stuff in bands and rectangles of things over it, some of them crowds, with void around them."""
    H, W = size
    ids, segments = np.zeros(size, np.int32), []
    ids[H // 3 : -3] = 70_000
    ids[H // 3 : H // 2, : W // 2] = 300
    for id in range(1, 13):
        top, left = rng.integers(0, H - 8), rng.integers(0, W - 8)
        ids[top : top + rng.integers(4, 24), left : left + rng.integers(4, 24)] = id
    for id in sorted(set(ids.ravel().tolist()) - {0}):
        label = {70_000: 3, 300: 4}.get(id, id % 3)
        segments.append(Segment(id, label, bool(THINGS[label]), id in (3, 4)))  # crowds of two classes
    return ids, segments


def guess(ids: np.ndarray, segments: list[Segment], rng) -> tuple[np.ndarray, list[Segment]]:
    """The truth with what predictions do to it: moved, torn, missing, of another class."""
    found = np.roll(ids, int(rng.integers(0, 3)), axis=1)
    found[rng.random(ids.shape) < 0.05] = 0
    found = np.where(np.isin(found, rng.integers(1, 13, 2)), 0, found)
    found = np.where(found > 0, found + 5, 0)
    labels = {s.id + 5: s.label if rng.random() < 0.8 else (s.label + 1) % 3 for s in segments}
    present = sorted(set(found.ravel().tolist()) - {0})
    return found, [Segment(id, labels[id], bool(THINGS[labels[id]])) for id in present]


def written(root: Path, name: str, some: list[tuple[np.ndarray, list[Segment]]]) -> Annotations:
    entries, images = [], []
    for i, (ids, segments) in enumerate(some, 1):
        write_ids(ids, root / name / f"{i}.png")
        entries.append(annotation(i, f"{i}.png", ids, segments, KINDS.ids))
        images.append({"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
    write_annotations(root / f"{name}.json", KINDS, images, entries)
    return read_annotations(root / f"{name}.json")


@pytest.fixture(scope="module")
def scenes() -> tuple[list, list]:
    rng = np.random.default_rng(18)
    truth = [blobs(size, rng) for size in SIZES]
    return truth, [guess(*pair, rng) for pair in truth]


@pytest.fixture(scope="module")
def root(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("panoptic")
    for name, some in zip(("truth", "found"), scenes, strict=True):
        written(folder, name, some)
    return folder


# ---- PQ: of each class, by its category_id, PQ, SQ, RQ and TP, FP, FN; and the means


def our_pq(root: Path) -> tuple[dict, list[float]]:
    truth, predicted = read_annotations(root / "truth.json"), read_annotations(root / "found.json")
    quality = compare(truth, root / "truth", predicted, root / "found")
    rows = zip(truth.categories.ids, quality.classes.tolist(), quality.counts[:, 1:].tolist(), strict=True)
    return {id: [*x, *n] for id, x, n in rows}, [x for g in GROUPS for x in quality.mean(g).values()]


def pq_of_hotcoco(root: Path) -> tuple[dict, list[float]]:
    result = hotcoco.panoptic.pq_compute(root / "truth.json", root / "found.json")
    classes = {
        id: [x[key] for key in ("pq", "sq", "rq", "tp", "fp", "fn")] for id, x in result["per_class"].items()
    }
    groups = [result[name] for name in ("All", "Things", "Stuff")]
    return classes, [group[key] for group in groups for key in ("pq", "sq", "rq", "n")]


def pq_of_vernier(root: Path) -> tuple[dict, list[float]]:
    arguments = []
    for name in ("truth", "found"):
        content = json.loads((root / f"{name}.json").read_bytes())
        pngs = {x["image_id"]: root / name / x["file_name"] for x in content["annotations"]}
        maps = {id: vernier.panoptic.decode_label_map_png(png) for id, png in pngs.items()}
        infos = {x["image_id"]: x["segments_info"] for x in content["annotations"]}
        arguments.append((maps, json.dumps(infos).encode()))
    truth = vernier.panoptic.Dataset.from_arrays(*arguments[0], json.dumps(KINDS.as_json()).encode())
    predicted = vernier.panoptic.Predictions.from_arrays(*arguments[1])
    s = vernier.panoptic.Evaluator(parity_mode="strict").evaluate(truth, predicted)
    classes = {id: [x.pq, x.sq, x.rq, x.n_tp, x.n_fp, x.n_fn] for id, x in s.per_class().items()}
    things = s.pq_things, s.sq_things, s.rq_things, s.n_things
    return classes, [s.pq, s.sq, s.rq, s.n, *things, s.pq_stuff, s.sq_stuff, s.rq_stuff, s.n_stuff]


PQ = pytest.mark.parametrize("peer", [pq_of_hotcoco, pq_of_vernier], ids=["hotcoco", "vernier"])


@PQ
def test_pq(root, peer):
    """Of each class to the last bit; the means are sums in another order."""
    classes, means = peer(root)
    ours, our_means = our_pq(root)
    assert ours == classes
    assert our_means == pytest.approx(means, **BAR)
    assert all(min(row[3:]) > 0 for id, row in ours.items() if id != 1)  # TP, FP and FN are all there


@PQ
def test_pq_counts_the_pixels_of_the_truth_and_not_its_json(root, peer, tmp_path):
    """Areas in the JSON that are a fifth too large: ours is the same; theirs, as panopticapi's, is less."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    for name in ("found", "truth"):  # of the prediction all count the pixels
        content = json.loads((root / f"{name}.json").read_text())
        for info in (info for entry in content["annotations"] for info in entry["segments_info"]):
            info["area"] = info["area"] * 6 // 5
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert our_pq(tmp_path) == our_pq(root)
        assert (peer(tmp_path) == peer(root)) == (name == "found")
    assert peer(tmp_path)[1][0] < peer(root)[1][0] - 0.01


# ---- AP


def ap_of_hotcoco(truth: dict, results: list[dict]) -> list[float]:
    reference = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(reference, reference.load_res(results), "segm")
    evaluation.run()
    return [*evaluation.stats[:6]]


def ap_of_vernier(truth: dict, results: list[dict]) -> list[float]:
    evaluator = vernier.instance.Evaluator(iou=vernier.instance.Segm(), parity_mode="strict")
    results = [x | {"bbox": mask.toBbox(x["segmentation"]).tolist()} for x in results]  # it needs one
    return evaluator.evaluate(json.dumps(truth).encode(), json.dumps(results).encode()).stats[:6]


@pytest.mark.parametrize("peer", [ap_of_hotcoco, ap_of_vernier], ids=["hotcoco", "vernier"])
def test_ap(scenes, peer):
    """AP, AP50, AP75 and those by area, of instances that overlap, some of one score, and crowds."""
    rng, images, results, truth = np.random.default_rng(5), [], [], []
    for i, ((ids, segments), (found, guesses)) in enumerate(zip(*scenes, strict=True), 1):
        images.append({"id": i, "height": ids.shape[0], "width": ids.shape[1]})
        masks = [Instance(rng.integers(1, 9) / 10, s.label, found == s.id) for s in guesses if s.thing]
        masks += [Instance(x.score / 2, x.label, np.roll(x.mask, 1, axis=0)) for x in masks[::2]]
        results += coco_results(i, masks, KINDS.ids)
        truth += coco_truth(i, ids, segments, KINDS.ids)
    ours = mask_precision(images, truth, results, KINDS)
    entries = [entry | {"id": i} for i, entry in enumerate(truth, 1)]
    kinds = [kind for kind in KINDS.as_json() if kind["isthing"]]
    theirs = peer({"images": images, "annotations": entries, "categories": kinds}, results)
    assert [-1 if np.isnan(x) else x for x in ours.values()] == theirs
    assert 0.1 < ours["AP"] < ours["AP50"] < 1


# ---- mIoU


def miou_of_hotcoco(truth: list, predicted: list, K: int) -> tuple[list, list[float]]:
    evaluation = hotcoco.semantic.SemanticEval(K, ignore_index=IGNORE)
    for maps in zip(truth, predicted, strict=True):
        evaluation.update(*maps)
    result = evaluation.results()
    means = [result[key] for key in ("mIoU", "aAcc", "mAcc")]
    return [x["IoU"] for x in result["per_class"]], means


def miou_of_vernier(truth: list, predicted: list, K: int) -> tuple[list, list[float]]:
    reference = vernier.semantic.Dataset.from_arrays(dict(enumerate(truth)), n_classes=K, ignore_label=IGNORE)
    predictions = vernier.semantic.Predictions.from_arrays(dict(enumerate(predicted)))
    summary = vernier.semantic.Evaluator(parity_mode="strict").evaluate(reference, predictions)
    classes = [-1 if np.isnan(x.iou) else x.iou for _, x in sorted(summary.per_class().items())]
    return classes, [summary.miou, summary.pixel_accuracy, summary.mean_accuracy]


@pytest.mark.parametrize("peer", [miou_of_hotcoco, miou_of_vernier], ids=["hotcoco", "vernier"])
def test_miou(scenes, peer):
    """Void is ignored, one class is only predicted, one is nowhere."""
    K = len(KINDS.ids) + 2
    truth = [semantic(*pair) for pair in scenes[0]]
    predicted = [np.where(x == IGNORE, 1, x) for x in (semantic(*pair) for pair in scenes[1])]
    predicted[0][0, :9] = K - 2
    predicted[0][-9:, :9] = K - 2
    pairs = zip(truth, predicted, strict=True)
    result = result_of(sum(confusion(*map(torch.from_numpy, pair), K) for pair in pairs).tolist())
    classes, means = peer(truth, predicted, K)
    assert result.iou.nan_to_num(-1).tolist() == classes
    assert classes[-2:] == [0, -1]
    assert [result.mIoU, result.pixel_accuracy, result.class_accuracy] == pytest.approx(means, **BAR)
