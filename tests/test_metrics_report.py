"""metrics/report.py: counts against loops and numbers worked out by hand, the report, its files."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from images.draw import confusion_matrix
from images.read import IGNORE
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


@given(st.data(), st.integers(1, 6), st.tuples(st.integers(1, 7), st.integers(1, 7)))
@settings(max_examples=60, deadline=None)
def test_counts_and_iou_equal_a_loop_over_pixels(data, K, size):
    """Also where every pixel is ignored, and where classes are empty."""
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
        "| 0 | sky | 66.67 | 75.00 | 40.00 | sea (25.00 %) |",
        "| 1 | sea | 57.14 | 66.67 | 60.00 | red boat (25.00 %) |",
        "| 2 | red boat | 0.00 | - | 0.00 | - |",
        r"| 3 | a\|b | - | - | 0.00 | - |",
    ]
    assert lines[start + 6] == "The 3 worst by IoU %: red boat 0.00, sea 57.14, sky 66.67"
    assert lines[-1] == (
        "    folder val mIoU 41.27, 3 of 4 classes occur, pixel accuracy 70.00, class accuracy 70.83, "
        "words' precision 75.00, recall 50.00, 1 images, scale 1, windows 64x128 by 43x85, "
        "tiny fpn tagging, tags classes"
    )


def test_the_report_of_segments_by_hand():
    """PQ, SQ and RQ of each class in the same table, and of things and of stuff in a second one."""
    counts = torch.tensor([[1.5, 2, 1, 1], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    quality = Quality(counts.double(), [True, False, True, False])
    segments = PanopticResult("mask2former", quality, precision=None, lacking="AP needs more")
    result = result_of(HAND, CLASSES, segments=segments)
    lines = result.as_markdown().splitlines()
    assert "**AP needs more**" in lines
    start = lines.index("|--:|---|--:|--:|--:|--:|--:|--:|---|")
    assert lines[start + 1] == "| 0 | sky | 66.67 | 75.00 | 40.00 | 50.00 | 75.00 | 66.67 | sea (25.00 %) |"
    assert lines[start + 2] == "| 1 | sea | 57.14 | 66.67 | 60.00 | 0.00 | 0.00 | 0.00 | red boat (25.00 %) |"
    assert lines[start + 3] == "| 2 | red boat | 0.00 | - | 0.00 | - | - | - | - |"
    assert "\n".join(segments.as_table()) in result.as_markdown()
    assert ", PQ 25.00, SQ 37.50, RQ 33.33, PQ of things 50.00, PQ of stuff 0.00, AP of things -" in lines[-1]
    numbers = result.as_json()
    assert numbers["classes_PQ"] == {"sky": 0.5, "sea": 0.0, "red boat": None, "a|b": None}
    assert (numbers["PQ"], numbers["AP"], numbers["segments"]) == (0.25, None, "mask2former")


def test_only_the_ten_worst_are_named_again():
    """Class k of 30 has k + 1 pixels, one of them predicted as the next class; class 0 loses its only one."""
    counts = torch.diag(torch.arange(30)) + torch.diag(torch.ones(29, dtype=torch.int64), 1)
    lines = result_of(counts.tolist()).as_markdown().splitlines()
    assert lines[lines.index("|--:|---|--:|--:|--:|---|") + 1].endswith("| class 1 (100.00 %) |")
    (worst,) = [line for line in lines if line.startswith("The 10 worst by IoU %: ")]
    assert worst.split(": ")[1].startswith("class 0 0.00, class 1 33.33, ")  # 1 of 1 + 1 + 1
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


@pytest.mark.parametrize("K", [3, 40, 150])
def test_the_confusion_matrix_as_an_image(K):
    """All of row 0 is right, a quarter of row 1 is predicted as class 0, row 2 has no pixels."""
    counts = torch.eye(K, dtype=torch.int64) * 4
    counts[1, :2], counts[2] = torch.tensor([1, 3]), 0
    image = confusion_matrix(counts, ["x"] * K)
    side = 32 if K <= 40 else 8
    margin = image.width - 16 - K * side
    corner = [
        (margin + column * side + 2, margin + row * side + 2) for row in range(3) for column in range(3)
    ]
    dark, white, grey = (8, 48, 107), (255, 255, 255), (225, 225, 225)
    half = tuple((a + b + 1) // 2 for a, b in zip(dark, white, strict=True))  # the root of a quarter
    colours = [image.getpixel(place) for place in corner]
    assert [colours[0], colours[1], *colours[6:9]] == [dark, white, grey, grey, grey]
    assert np.abs(np.subtract(colours[3], half)).max() <= 1
    named = np.array(image.crop((margin - 20, margin + 4, margin - 2, margin + 4 + side)).convert("L"))
    assert (named.min() < 100) == (K <= 40)  # the name "x" left of the first row
