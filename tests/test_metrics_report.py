"""metrics/report.py and charts.py: counts against loops, numbers by hand, the report, its files, charts."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure
from PIL import Image

from images.read import IGNORE
from metrics.charts import confusion_matrix, curves
from metrics.judge import PanopticResult
from metrics.quality import Quality
from metrics.report import Result, average_precision, confusion

CLASSES = ("sky", "sea", "red boat", "a|b")


# ---- counting


def result_of(
    counts, classes=None, present=None, scores=None, tag_counts=(0, 0, 0), segments=None, **about
) -> Result:
    """A result of one image with these pixels [label, prediction]; `about` changes the protocol."""
    counts = torch.tensor(counts)
    K = len(counts)
    about = {
        "dataset": "folder",
        "split": "val",
        "split_images": 1,
        "model": "tiny",
        "decoder": "fpn",
        "condition": "tagging",
        "tags": "classes",
        "oracle": False,
        "random_weights": False,
        "tag_head": scores is not None,
        "scales": [1.0],
        "flip": False,
        "window": None,
        "stride": None,
    } | about
    classes = classes or [f"class {k}" for k in range(K)]
    present, scores = (torch.zeros(1, K) if x is None else torch.tensor(x) for x in (present, scores))
    return Result(classes, about, counts, present, scores, torch.tensor(tag_counts), 1.5, segments)


@given(st.data(), st.integers(1, 6), st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)))
@settings(max_examples=60, deadline=None)
def test_counts_and_iou_equal_a_loop_over_pixels(data, K, size):
    """Of one or two maps; also where every pixel is ignored, and where classes are empty."""
    truth = data.draw(hnp.arrays(np.uint8, size, elements=st.sampled_from([*range(K), IGNORE])))
    predicted = data.draw(hnp.arrays(np.int64, size, elements=st.integers(0, K - 1)))
    expected = [[0] * K for _ in range(K)]
    for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
        if t != IGNORE:
            expected[t][p] += 1
    assert confusion(torch.from_numpy(truth), torch.from_numpy(predicted), K).tolist() == expected

    kept = truth != IGNORE
    result = result_of(expected)
    ious = []
    for k in range(K):
        union = int(((truth == k) & kept | (predicted == k) & kept).sum())
        both = int(((truth == k) & (predicted == k)).sum())
        ious += [both / union] if union else []
        assert result.iou[k].isnan() if not union else result.iou[k] == both / union
    right = int((truth == predicted)[kept].sum())
    assert result.mIoU == pytest.approx(sum(ious) / len(ious)) if ious else np.isnan(result.mIoU)
    assert result.pixel_accuracy == pytest.approx(right / kept.sum()) if ious else not right


HAND = [  # truth down, prediction across; class 2 is only predicted, class 3 nowhere
    [6, 2, 0, 0],
    [1, 8, 3, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
]


def test_numbers_by_hand():
    """IoU 6/9, 8/14, 0/3, none; 14 of 20 pixels; 6/8 and 8/12 of the classes' pixels."""
    result = result_of(HAND, CLASSES)
    assert result.iou[:3].tolist() == [6 / 9, 8 / 14, 0.0]
    assert result.iou[3].isnan()
    assert result.mIoU == pytest.approx((6 / 9 + 8 / 14 + 0) / 3)
    numbers = result.as_json()
    assert numbers["classes"] == {"sky": 6 / 9, "sea": 8 / 14, "red boat": 0.0, "a|b": None}
    assert numbers["pixel_accuracy"] == 14 / 20
    assert numbers["class_accuracy"] == pytest.approx((6 / 8 + 8 / 12) / 2)
    assert numbers["images"] == 1
    assert [numbers[key] for key in ("tag_mAP", "words_precision", "words_recall")] == [None] * 3


def test_absent_classes_count_as_in_mmsegmentation():
    """A perfect prediction in which 15 of 150 classes occur: mIoU 1; ADE20K's own script gives 15/150 = 0.1.

    Source: demoEvaluation.m on sampleData, github.com/CSAILVision/sceneparsing at e202229.
    """
    truth = torch.arange(0, 150, 10, dtype=torch.uint8).repeat(4, 3)
    truth[0, :5] = IGNORE
    predicted = truth.long().clamp(max=149)
    result = result_of(confusion(truth, predicted, 150).tolist())
    assert float(result.iou.nan_to_num().mean()) == pytest.approx(0.1)
    assert (result.mIoU, result.pixel_accuracy, int((~result.iou.isnan()).sum())) == (1.0, 1.0, 15)


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.6, 0.7, 0.8, 0.9], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),
        ([1.0, 1.0, 0.0], [1, 0, 1], (1 / 2 + 2 / 3) / 2),  # equal scores
        ([0.0, 0.0], [0, 1], 1 / 2),
        ([-3.0], [1], 1.0),
    ],
)
def test_average_precision_by_hand(scores, positive, expected):
    assert average_precision(torch.tensor(scores), torch.tensor(positive) > 0) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_area_below_the_curve(pairs):
    """sum (R_n - R_{n-1}) P_n over thresholds, and the order of the images plays no part."""
    positives = sum(positive for _, positive in pairs)
    if not positives:
        return
    area, before = 0.0, 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [positive for score, positive in pairs if score >= threshold]
        recall = sum(taken) / positives
        area, before = area + (recall - before) * sum(taken) / len(taken), recall
    for ordered in (pairs, pairs[::-1]):
        scores, positive = (torch.tensor(column) for column in zip(*ordered, strict=True))
        assert average_precision(scores.float(), positive) == pytest.approx(area, abs=1e-6)


def test_map_is_the_mean_over_classes_with_a_positive():
    """Classes: 5/6 and 1/2; the third is in no image. Without a head, or any class, there is no mAP."""
    scores = [[0.9, 0.1, 5.0], [0.8, 0.9, 5.0], [0.7, 0.0, 5.0], [0.6, -1.0, 5.0]]
    present = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    zeros = [[0] * 3] * 3
    assert result_of(zeros, None, present, scores).tag_mAP == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert result_of(zeros, None, present, scores, tag_head=False).tag_mAP is None
    assert result_of(zeros, None, [[0.0] * 3] * 4, scores).tag_mAP is None


# ---- the report and its files


def test_the_report_by_hand():
    """Every class in order with the class it is most often predicted as, the worst again, a line to paste."""
    result = result_of(HAND, CLASSES, split_images=5, window=[64, 128], stride=[43, 85], tag_counts=(3, 4, 6))
    lines = result.as_markdown().splitlines()
    assert "**PART: 1 of the split's 5 images.**" in lines
    start = lines.index("|--:|---|--:|--:|--:|---|")
    assert lines[start - 1 : start + 5] == [
        "| id | class | IoU % | recall % | share of the pixels % | most often predicted as |",
        "|--:|---|--:|--:|--:|---|",
        "| 0 | sky | 66.7 | 75.0 | 40.00 | sea (25.0%) |",
        "| 1 | sea | 57.1 | 66.7 | 60.00 | red boat (25.0%) |",
        "| 2 | red boat | 0.0 | - | 0.00 | - |",
        "",
    ]
    assert lines[start + 5] == "Left out: 1 of 4 classes, which do not occur."
    assert lines[start + 7] == "The 3 worst by IoU %: red boat 0.0, sea 57.1, sky 66.7"
    assert lines[2] == (
        "    mIoU 41.3% on folder val, 3 of 4 classes occur, pixel accuracy 70.0%, class accuracy 70.8%, "
        "words' precision 75.0%, recall 50.0%, 1 images, scale 1, windows 64x128 by 43x85, "
        "tiny fpn tagging, tags classes"
    )


def test_classes_that_do_not_occur_are_left_out_of_the_table():
    """Of 133 classes two are labelled and a third is predicted; the numbers stay those of the list."""
    counts = torch.zeros(133, 133, dtype=torch.int64)
    counts[7, 7], counts[7, 40], counts[99, 99] = 5, 2, 3
    lines = result_of(counts.tolist()).as_markdown().splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert rows == ["| id", "| 7", "| 40", "| 99"]
    assert "Left out: 130 of 133 classes, which do not occur." in lines
    assert "Left out" not in result_of([[1, 0], [0, 1]]).as_markdown()


def test_the_report_of_segments_by_hand():
    """PQ, SQ and RQ of each class in the same table, and of things and of stuff in a second one."""
    counts = torch.tensor([[1.5, 2, 1, 1], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    quality = Quality(counts.double(), [True, False, True, False])
    segments = PanopticResult("mask2former", quality, precision=None, lacking="AP needs more")
    result = result_of(HAND, CLASSES, segments=segments)
    lines = result.as_markdown().splitlines()
    assert "**AP needs more**" in lines
    start = lines.index("|--:|---|--:|--:|--:|--:|--:|--:|---|")
    assert lines[start + 1] == "| 0 | sky | 66.7 | 75.0 | 40.00 | 50.0 | 75.0 | 66.7 | sea (25.0%) |"
    assert lines[start + 2] == "| 1 | sea | 57.1 | 66.7 | 60.00 | 0.0 | 0.0 | 0.0 | red boat (25.0%) |"
    assert lines[start + 3] == "| 2 | red boat | 0.0 | - | 0.00 | - | - | - | - |"
    assert "\n".join(segments.as_table()) in result.as_markdown()
    assert ", PQ 25.0%, SQ 37.5%, RQ 33.3%, PQ of things 50.0%, PQ of stuff 0.0%, AP of things -" in lines[2]
    numbers = result.as_json()
    assert numbers["classes_PQ"] == {"sky": 0.5, "sea": 0.0, "red boat": None, "a|b": None}
    assert (numbers["PQ"], numbers["AP"], numbers["segments"]) == (0.25, None, "mask2former")


def test_only_the_ten_worst_are_named_again():
    """Class k of 30 has k + 1 pixels, one of them predicted as the next class; class 0 loses its only one."""
    counts = torch.diag(torch.arange(30)) + torch.diag(torch.ones(29, dtype=torch.int64), 1)
    lines = result_of(counts.tolist()).as_markdown().splitlines()
    assert lines[lines.index("|--:|---|--:|--:|--:|---|") + 1].endswith("| class 1 (100.0%) |")
    (worst,) = [line for line in lines if line.startswith("The 10 worst by IoU %: ")]
    assert worst.split(": ")[1].startswith("class 0 0.0, class 1 33.3, ")  # 1 of 1 + 1 + 1
    assert re.findall(r"class \d+", worst) == [f"class {k}" for k in range(10)]


def test_files_hold_the_numbers(tmp_path):
    """Non-English names too; the sha256 is that of the model's file."""
    result, out = result_of([[3, 1], [0, 2]], ["größe", 'a "b", c'], random_weights=True), tmp_path
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    result.write(out, checkpoint=tmp_path / "model", sha256=sha256)
    result.write_confusion(out)
    stored = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert stored == result.as_json() | {"checkpoint": str(tmp_path / "model"), "sha256": sha256}
    text = (out / "result.md").read_text(encoding="utf-8")
    assert text.startswith(result.as_markdown())
    assert sha256 in text
    assert "**RANDOM WEIGHTS: " in text
    with (out / "confusion.csv").open(newline="", encoding="utf-8") as f:
        rows = [*csv.reader(f)]
    assert rows == [["truth \\ prediction", "größe", 'a "b", c'], ["größe", "3", "1"], ['a "b", c', "0", "2"]]
    assert sorted(path.name for path in out.iterdir()) == [
        "confusion.csv",
        "confusion.png",
        "result.json",
        "result.md",
    ]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda x, *args, **how: figures.append(x) or save(x, *args, **how))
    return figures


@pytest.mark.parametrize("K", [3, 45])
def test_the_confusion_matrix_has_the_names_of_all_classes_that_occur(K, figures, tmp_path):
    """All of row 0 is right, a quarter of row 1 is predicted as class 0, class 2 is only predicted, the last
    nowhere. Every class has 24 pixels; the names of many stand on both sides.
    """
    counts = torch.eye(K + 1, dtype=torch.int64) * 4
    counts[1, :2], counts[2, 2], counts[1, 2] = torch.tensor([2, 5]), 0, 1
    counts[K] = 0
    names = [f"${k}$ Straße" for k in range(K)]
    confusion_matrix(tmp_path / "x.png", counts, [*names, "absent"])
    (axes,) = figures[0].axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [x.get_text() for x in labels] == names * (1 + (K > 40))
        assert not any(x.get_parse_math() for x in labels)
    shade = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shade.shape == (K, K) and np.isnan(shade[2]).all()
    assert shade[:2, :3] == pytest.approx(np.sqrt([[1, 0, 0], [0.25, 0.625, 0.125]]))
    texts = {x.get_position(): x.get_text() for x in axes.texts}
    assert len(texts) == K + 1
    assert [texts[place] for place in ((0, 0), (0, 1), (1, 1), (2, 1))] == ["100", "25", "62", "12"]
    box = axes.get_window_extent()
    assert (box.width, box.height) == pytest.approx((24 * K, 24 * K))
    heights = [x.get_window_extent().height for x in axes.get_yticklabels()]
    assert max(heights) < 24 and min(heights) >= 10


def test_a_confusion_matrix_without_a_pixel_is_grey(figures, tmp_path):
    confusion_matrix(tmp_path / "x.png", torch.zeros(3, 3, dtype=torch.int64), ["a", "空", "c"])
    (axes,) = figures[0].axes
    assert [x.get_text() for x in axes.get_yticklabels()] == ["a", "Kong", "c"]
    assert axes.images[0].get_array().mask.all() and axes.get_xlabel().startswith("Names in scripts")


def test_the_curves_are_those_of_the_log(figures, tmp_path):
    """Losses, measures of the validations in percent, the learning rate."""
    log = tmp_path / "log.jsonl"
    entries = [{"step": i, "loss": 3.0 / i, "seg": 2.0 / i, "lr": 0.1 * i, "mem": 1.0} for i in (1, 2, 4)]
    entries[1:1] = [{"step": 1, "val": {"mIoU": 0.5, "pixel_accuracy": 0.8}}]
    entries += [{"step": 4, "val": {"mIoU": 0.25, "pixel_accuracy": 0.9}}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curves(tmp_path / "curve.png", log)
    assert Image.open(tmp_path / "curve.png").size == (900, 900)
    lines = {x.get_label(): x.get_xydata().tolist() for axes in figures[0].axes for x in axes.lines}
    assert lines.pop("loss") == [[1, 3], [2, 1.5], [4, 0.75]]
    assert lines.pop("seg") == [[1, 2], [2, 1], [4, 0.5]]
    assert lines.pop("mIoU") == [[1, 50], [4, 25]]
    assert lines == {"lr": [[1, 0.1], [2, 0.2], [4, 0.4]]}


def test_the_commands_start_without_matplotlib():
    """Its import takes a second: only what draws waits for it."""
    code = "import sys, train; sys.exit('matplotlib' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert process.returncode == 0
