"""metrics/judge.py: perfect and imperfect segments, the files of a prediction, AP without pycocotools."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from data import open_dataset
from images.panoptic import components, read_annotations
from loading.stream import EvaluationStream, Item
from metrics import judge
from metrics.judge import PanopticEvaluator, PanopticResult
from metrics.quality import Quality, compare
from run.ranks import Ranks

HERE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def dataset(segments):
    return open_dataset("panoptic", segments, "val")


def items(dataset) -> list[Item]:
    return list(EvaluationStream(dataset, None, None).items(range(len(dataset))))


def things_of(item: Item) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, scores and masks of the true things of an image."""
    things, ids = [s for s in item.segments if s.thing], torch.from_numpy(item.ids)
    labels = torch.tensor([s.label for s in things])
    return labels, torch.ones(len(things)), torch.stack([ids == s.id for s in things])


def evaluate_truth(dataset) -> PanopticResult:
    """The result of predictions that equal the ground truth."""
    evaluator = PanopticEvaluator(dataset, "by hand", instances=True)
    for item in items(dataset):
        evaluator.add(item, item.ids, item.segments, things_of(item))
    return finished(evaluator, HERE)


def finished(evaluator: PanopticEvaluator, ranks: Ranks) -> PanopticResult:
    result = evaluator.measure(ranks)
    evaluator.finish(ranks, result)
    return result


def test_perfect_segments_have_full_marks(dataset):
    numbers = evaluate_truth(dataset).as_json()
    names = [f"{name}{end}" for end in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")]
    assert [numbers[name] for name in names] == [1] * 9
    assert numbers["AP"] == pytest.approx(1)
    assert numbers["segments"] == "by hand"


def test_without_pycocotools_there_is_no_ap_with_its_reason(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    result = evaluate_truth(dataset)
    assert "need pycocotools: pip install pycocotools" in result.lacking
    assert (result.as_json()["AP"], result.as_json()["PQ"]) == (None, 1)


def test_ap_that_fails_leaves_all_else_with_its_reason(dataset, tmp_path, monkeypatch):
    """Until then the result says that AP is lacking; the files of the prediction are written all the same."""
    monkeypatch.setattr(judge, "mask_precision", lambda *a: max([1, "1"]))
    evaluator = PanopticEvaluator(dataset, "by hand", tmp_path / "panoptic", instances=True)
    for item in items(dataset):
        evaluator.add(item, item.ids, item.segments, things_of(item))
    result = evaluator.measure(HERE)
    assert (result.as_json()["PQ"], result.as_json()["AP"]) == (1, None) and "ended before" in result.lacking
    evaluator.finish(HERE, result)
    assert (result.as_json()["PQ"], result.as_json()["AP"]) == (1, None)
    assert result.lacking.startswith("AP is lacking: TypeError: '>' not supported")
    assert len(read_annotations(tmp_path / "panoptic.json")) == len(dataset)


def test_the_written_prediction_has_the_quality_that_was_counted(dataset, tmp_path):
    """Segments of shifted labels, so some match and some do not; PNGs appear under their name at the end."""
    folder = tmp_path / "panoptic"
    evaluator = PanopticEvaluator(dataset, "components", folder)
    for item in items(dataset):
        labels = np.roll(item.labels, 6, axis=1)
        evaluator.add(item, *components(labels, dataset.categories.things))
        assert not folder.exists() and (tmp_path / ".tmp-panoptic").is_dir()
    result = finished(evaluator, HERE)
    assert not (tmp_path / ".tmp-panoptic").exists()
    written = read_annotations(tmp_path / "panoptic.json")
    assert written.image_ids == dataset.image_ids
    assert sorted(path.name for path in folder.iterdir()) == written.pngs
    again = compare(dataset.annotations, dataset.pngs, written, folder)
    assert torch.equal(again.counts, result.quality.counts)
    assert 0 < result.quality.mean()["PQ"] < 1
    listed = json.loads((tmp_path / "panoptic.json").read_text())["images"][0]
    assert listed == {"id": 0, "file_name": "0.png", "height": 96, "width": 128}
    assert "AP" not in result.as_json()


def test_an_image_without_predicted_segments_is_counted(dataset):
    """All its true segments are then missed."""
    evaluator = PanopticEvaluator(dataset, "none")
    item = items(dataset)[0]
    evaluator.add(item, np.zeros_like(item.ids), [])
    counts = evaluator.measure(HERE).quality.counts
    assert counts[:, :3].sum() == 0
    assert counts[:, 3].sum() == sum(not s.crowd for s in item.segments)


class Second(Ranks):
    """Rank 1 of two with the same images; what collectives bring it is counted in bytes."""

    received = 0

    def all_reduce(self, x):
        return 2 * x

    def gather_object(self, part):
        return []

    def all_gather_object(self, part):
        whole = 2 * part or [({"AP": 1.0}, "")]
        Second.received += len(pickle.dumps(whole))
        return whole


def test_another_rank_receives_no_segments_of_others(dataset):
    """However many images are measured, it gets AP alone."""
    sizes = []
    for n in (1, 4):
        evaluator = PanopticEvaluator(dataset, "by hand", instances=True)
        for item in items(dataset)[:n]:
            evaluator.add(item, item.ids, item.segments, things_of(item))
        Second.received = 0
        result = finished(evaluator, Second(1, 2, torch.device("cpu")))
        sizes.append(Second.received)
        assert result.precision == {"AP": 1.0} and result.quality.mean()["PQ"] == 1
    assert sizes[0] == sizes[1]


def test_the_table_by_hand():
    """Sum of IoU, TP, FP, FN: one thing with PQ 1/2 of which SQ is 3/4; stuff does not occur."""
    quality = Quality(torch.tensor([[1.5, 2, 1, 1], [0, 0, 0, 0]]).double(), [True, False])
    assert PanopticResult("by hand", quality, precision=None).as_table() == [
        "Segments: by hand",
        "",
        "| classes | PQ % | SQ % | RQ % | how many occur |",
        "|---|--:|--:|--:|--:|",
        "| all | 50.00 | 75.00 | 66.67 | 1 |",
        "| things | 50.00 | 75.00 | 66.67 | 1 |",
        "| stuff | - | - | - | 0 |",
    ]
