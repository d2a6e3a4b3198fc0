"""eval.py: counts against loops and numbers worked out by hand, ways to read a picture, the command."""

import csv
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from test_data import damage, noise, save

import eval as module
import inference
from assemble import build
from data import open_dataset
from errors import DataError, TadaError
from eval import Result, average_precision, count, evaluate, main, write
from images.draw import confusion_matrix
from images.panoptic import read_annotations, semantic
from images.read import IGNORE
from inference import Segmented
from loading.tags import open_words
from mask2former import Instances, Panoptic
from metrics.quality import compare
from model import TadaConfig
from panoptic_data import open_panoptic
from run.checkpoint import point, save_model, write_step
from run.ranks import Ranks
from weights.words import digest

CLASSES = ("sky", "sea", "red boat", "a|b")
SIZES = [(40, 66), (87, 60), (47, 126), (65, 87)]  # none is a multiple of 64
CONFIG = TadaConfig(
    classes=CLASSES,
    model="tiny",
    dataset="folder",
    adapter_start="random",  # so that words matter before any training
    dropout=0.1,
    crop=(48, 64),
    stride=(32, 43),
    box=(60, 130),
)


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, also in the processes started


def random_model(config: TadaConfig):
    """A random model whose prediction is not the same class everywhere."""
    torch.manual_seed(0)
    tada = build(config).eval()
    with torch.no_grad():
        last = tada.decoder.classifier[1]
        last.weight.mul_(100)
        seen = torch.from_numpy(noise(64, 128).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        output = tada(seen, [["sea"]])
        last.bias.sub_(tada.decoder.logits(output.prediction, (64, 128)).mean((0, 2, 3)))
    return tada


@pytest.fixture(scope="module")
def tada():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A `folder` data set: four pictures of different sizes, blocks of labels, some of them ignored."""
    root = tmp_path_factory.mktemp("folder")
    for i, (H, W) in enumerate(SIZES):
        coarse = np.random.default_rng(i).choice([0, 1, 1, i % 3, IGNORE], (4, 6)).astype(np.uint8)
        labels = Image.fromarray(coarse).resize((W, H), Image.Resampling.NEAREST)
        save(noise(H, W, seed=i), root / f"images/val/{i}.png")
        save(labels, root / f"labels/val/{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def dataset(root):
    return open_dataset("folder", root, "val")


def words_from(tags, dataset, condition="tagging"):
    paths = [dataset.path(i) for i in range(len(dataset))]
    return open_words(condition, str(tags), dataset.prompts, dataset.root, paths)


def tag_file(path: Path, tags: list[list[str]], captions=None) -> Path:
    entries = [
        {"image": f"images/val/{i}.png", "tags": [[tag, 0.5] for tag in some]} for i, some in enumerate(tags)
    ]
    for entry, caption in zip(entries, captions or [], strict=False):
        entry["caption"] = caption
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# ---- counting --------------------------------------------------------------------------------------------


def result_of(confusion, classes=None, present=None, scores=None, spoken=(0, 0, 0), **about) -> Result:
    confusion = torch.tensor(confusion)
    K = len(confusion)
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
    return Result(classes, about, confusion, present, scores, torch.tensor(spoken), 1.5)


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
    confusion = count(torch.from_numpy(truth), torch.from_numpy(predicted), K)
    assert confusion.tolist() == expected

    kept = truth != IGNORE
    result = result_of(expected)
    found = []
    for k in range(K):
        union = int(((truth == k) & kept | (predicted == k) & kept).sum())
        both = int(((truth == k) & (predicted == k)).sum())
        found += [both / union] if union else []
        assert result.iou[k].isnan() if not union else result.iou[k] == both / union
    right = int((truth == predicted)[kept].sum())
    assert result.mIoU == pytest.approx(sum(found) / len(found)) if found else np.isnan(result.mIoU)
    assert result.pixel_accuracy == pytest.approx(right / kept.sum()) if found else not right


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
    result = result_of(count(truth, predicted, 150).tolist())
    assert float(result.iou.nan_to_num().mean()) == pytest.approx(0.1)
    assert (result.mIoU, result.pixel_accuracy, int((~result.iou.isnan()).sum())) == (1.0, 1.0, 15)


@pytest.mark.parametrize(
    ("scores", "there", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.6, 0.7, 0.8, 0.9], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),
        ([1.0, 1.0, 0.0], [1, 0, 1], (1 / 2 + 2 / 3) / 2),  # equal scores
        ([0.0, 0.0], [0, 1], 1 / 2),
        ([-3.0], [1], 1.0),
    ],
)
def test_average_precision_by_hand(scores, there, expected):
    assert average_precision(torch.tensor(scores), torch.tensor(there) > 0) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_area_below_the_curve(pairs):
    """sum (R_n - R_{n-1}) P_n over thresholds, and the order of the pictures plays no part."""
    positives = sum(there for _, there in pairs)
    if not positives:
        return
    area, before = 0.0, 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [there for score, there in pairs if score >= threshold]
        recall = sum(taken) / positives
        area, before = area + (recall - before) * sum(taken) / len(taken), recall
    for some in (pairs, pairs[::-1]):
        scores, there = (torch.tensor(column) for column in zip(*some, strict=True))
        assert average_precision(scores.float(), there) == pytest.approx(area, abs=1e-6)


def test_map_is_the_mean_over_classes_with_a_positive():
    """Classes: 5/6 and 1/2; the third is in no picture. Without a head, or any class, there is none."""
    scores = [[0.9, 0.1, 5.0], [0.8, 0.9, 5.0], [0.7, 0.0, 5.0], [0.6, -1.0, 5.0]]
    present = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    zeros = [[0] * 3] * 3
    assert result_of(zeros, None, present, scores).tag_mAP == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert result_of(zeros, None, present, scores, tag_head=False).tag_mAP is None
    assert result_of(zeros, None, [[0.0] * 3] * 4, scores).tag_mAP is None


# ---- reading pictures ------------------------------------------------------------------------------------


def grid(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of each window, as mmsegmentation's slide_inference."""
    ends = [min(i * stride + window, side) for i in range(max(side - window + stride - 1, 0) // stride + 1)]
    return [(max(end - window, 0), end) for end in ends]


@torch.no_grad()
def softmax_by_hand(tada, image, tags, size, window, stride):
    """The class probabilities `(K, *size)` of a picture `(1, 3, h, w)` in [-1, 1]: every window alone."""
    h, w = image.shape[2:]
    total, n = torch.zeros(1, len(tada.config.classes), h, w), torch.zeros(h, w)
    for top, bottom in grid(h, window[0], stride[0]):
        for left, right in grid(w, window[1], stride[1]):
            part = image[:, :, top:bottom, left:right].clone()
            rows, columns = part.shape[2:]
            maps = tada(part, tags).prediction
            padded = (-(-rows // 64) * 64, -(-columns // 64) * 64)
            logits = tada.decoder.logits(maps, padded)
            assert logits.shape[2:] == padded
            total[:, :, top:bottom, left:right] += logits[:, :, :rows, :columns]
            n[top:bottom, left:right] += 1
    return F.interpolate(total / n, size, mode="bilinear").softmax(1)[0]


def confusion_by_hand(tada, dataset, tags, window, stride):
    """Each picture alone, resized into the box."""
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for i in range(len(dataset)):
        picture, labels = dataset.load(i)
        scale = min(60 / min(labels.shape), 130 / max(labels.shape))
        h, w = (int(side * scale + 0.5) for side in labels.shape)
        image = np.array(picture.resize((w, h), Image.Resampling.BILINEAR))
        image = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        sides = window or (h, w), stride or window or (h, w)
        predicted = softmax_by_hand(tada, image, tags(i), labels.shape, *sides).argmax(0)
        confusion += count(torch.from_numpy(labels), predicted, 4)
    return confusion


@pytest.mark.parametrize(("window", "stride"), [(None, None), ((50, 70), (50, 41)), ((80, 80), None)])
def test_pictures_whole_and_in_windows_equal_each_read_alone(tada, dataset, window, stride):
    """Sizes and windows that are no multiples of 64: what is padded reaches no pixel of the result."""
    result = evaluate(tada, dataset, words_from("classes", dataset), window=window, stride=stride)
    expected = confusion_by_hand(tada, dataset, lambda i: None, window, stride)
    assert torch.equal(result.confusion, expected)
    assert (result.confusion.sum(0) > 0).sum() >= 3  # the random model says more than one class
    labelled = sum(int((dataset.load(i)[1] != IGNORE).sum()) for i in range(4))
    assert int(result.confusion.sum()) == labelled
    assert (result.classes, len(result.present)) == (CLASSES, 4)
    expected = {"window": window and [*window], "stride": (stride or window) and [*(stride or window)]}
    assert {key: result.about[key] for key in expected} == expected


def test_other_scales_are_made_from_the_picture_as_it_is(tada, dataset, monkeypatch):
    """The mean softmax of 1 and 1.5 times the box's size, each also mirrored, at the picture's own size."""
    confusion, wanted = torch.zeros(4, 4, dtype=torch.int64), []
    for i in (3,):
        picture, labels = dataset.load(i)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        factor = min(60 / min(labels.shape), 130 / max(labels.shape))
        base = [int(side * factor + 0.5) for side in labels.shape]
        total = 0
        for scale in (1.0, 1.5):
            size = [int(side * scale + 0.5) for side in base]
            wanted += 2 * [tuple(size)]
            resized = F.interpolate(image, size, mode="bilinear", antialias=True)
            for seen, back in ((resized, lambda x: x), (resized.flip(3), lambda x: x.flip(2))):
                total = total + back(softmax_by_hand(tada, seen, None, labels.shape, (64, 60), (50, 50)))
        confusion += count(torch.from_numpy(labels), total.argmax(0), 4)

    sizes, slide = [], tada.slide
    monkeypatch.setattr(
        tada, "slide", lambda image, *rest: sizes.append(image.shape[2:]) or slide(image, *rest)
    )
    protocol = {"scales": (1.0, 1.5), "flip": True, "window": (64, 60), "stride": (50, 50)}
    result = evaluate(tada, dataset, words_from("classes", dataset), indices=[3], **protocol)
    assert [tuple(size) for size in sizes] == wanted
    assert int((result.confusion - confusion).abs().sum()) <= 2e-4 * int(confusion.sum())  # order of sums
    assert (result.about["scales"], result.about["flip"]) == ([1.0, 1.5], True)


def test_pictures_keep_their_size_where_the_model_says_so(tada, dataset, monkeypatch):
    """Cityscapes' protocol: no box."""
    sizes, slide = [], tada.slide
    monkeypatch.setattr(tada, "config", replace(CONFIG, box=None))
    monkeypatch.setattr(
        tada, "slide", lambda image, *rest: sizes.append(image.shape[2:]) or slide(image, *rest)
    )
    words = words_from("classes", dataset)
    assert evaluate(tada, dataset, words).about["box"] is None
    assert [tuple(size) for size in sizes] == SIZES
    sizes.clear()
    evaluate(tada, dataset, words, scales=(0.5,), indices=[2, 0])
    assert [tuple(size) for size in sizes] == [(24, 63), (20, 33)]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_and_modes_stay_and_dropout_sleeps(tada, root, dataset, workers, tmp_path):
    """During training: the model trains, its frozen parts do not; also where a picture cannot be read."""
    expected = evaluate(tada, dataset, words_from("oracle", dataset), indices=[0, 2])
    broken = Path(shutil.copytree(root, tmp_path / "broken"))
    damage(broken / "images/val/2.png", "cut")
    broken = open_dataset("folder", broken, "val")
    try:
        tada.train()
        tada.vae.eval()
        tada.decoder.classifier[1].eval()
        modes = [module.training for module in tada.modules()]
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        states = []
        for run in range(3):
            states.append(
                (torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate())
            )
            if run == 0:
                result = evaluate(
                    tada, dataset, words_from("oracle", dataset), indices=[0, 2], workers=workers
                )
            if run == 1:
                with pytest.raises(DataError, match=r"^\S*images/val/2\.png cannot be read"):
                    evaluate(tada, broken, words_from("oracle", broken), indices=[0, 2], workers=workers)
            assert [module.training for module in tada.modules()] == modes
        assert states[0] == states[1] == states[2]
    finally:
        tada.eval()
    assert torch.equal(result.confusion, expected.confusion)
    assert torch.equal(result.scores, expected.scores)


def test_a_picture_without_any_label(tada, tmp_path):
    """Nothing is divided by zero."""
    save(noise(30, 40), tmp_path / "images/val/x.png")
    save(np.full((30, 40), IGNORE, np.uint8), tmp_path / "labels/val/x.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    dataset = open_dataset("folder", tmp_path, "val")
    numbers = evaluate(tada, dataset, words_from("oracle", dataset)).as_json()
    keys = ("mIoU", "pixel_accuracy", "class_accuracy", "tag_mAP", "words_precision", "words_recall")
    assert [numbers[key] for key in keys] == [None] * 6
    assert numbers["images"] == 1
    assert set(numbers["classes"].values()) == {None}


# ---- words and tags --------------------------------------------------------------------------------------


def test_words_of_a_file_steer_and_are_judged(tada, dataset, tmp_path):
    """Present by the labels: sky and sea in every picture, in some the third; the words below by hand."""
    present = [set(np.unique(dataset.load(i)[1]).tolist()) - {IGNORE} for i in range(4)]
    assert present == [{0, 1}, {0, 1}, {0, 1, 2}, {0, 1}]
    tags = [["sky", "zebra"], [], ["red boat", "sea", "sea"], ["a|b"]]  # right: 1, 0, 2, 0; given: 2, 0, 2, 1
    file = tag_file(tmp_path / "tags.jsonl", tags)
    result = evaluate(tada, dataset, words_from(file, dataset))
    assert (result.words_precision, result.words_recall) == (3 / 5, 3 / 9)
    assert (result.about["tags"], result.about["oracle"]) == (str(file), False)
    by_hand = confusion_by_hand(tada, dataset, lambda i: [tags[i]], None, None)
    assert torch.equal(result.confusion, by_hand)
    others = [evaluate(tada, dataset, words_from(x, dataset)) for x in ("classes", "oracle")]
    assert not torch.equal(others[0].confusion, others[1].confusion)  # words matter at all


def test_oracle_is_said_in_every_report(tada, dataset, monkeypatch):
    result = evaluate(tada, dataset, words_from("oracle", dataset), indices=[0])
    assert (result.words_precision, result.words_recall) == (1.0, 1.0)
    assert result.as_json()["oracle"] is True
    assert "**ORACLE: " in result.as_markdown()
    assert result.line().endswith("tags oracle, ORACLE, RANDOM WEIGHTS")
    plain = evaluate(tada, dataset, words_from("classes", dataset), indices=[0])
    assert plain.as_json()["oracle"] is False
    assert "ORACLE" not in plain.as_markdown()
    monkeypatch.setattr(tada, "config", replace(CONFIG, condition="oracle"))
    assert evaluate(tada, dataset, words_from("classes", dataset), indices=[0]).about["oracle"] is True


def test_the_tags_of_clip_are_those_of_the_whole_picture(dataset):
    tada = random_model(replace(CONFIG, tags="clip"))
    words, given, right = words_from("clip", dataset), 0, 0
    assert words("images/val/0.png", [0]) is None
    found = []
    for i in range(4):
        picture, labels = dataset.load(i)
        h, w = module.fit(labels.shape, 60, 130)
        image = np.array(picture.resize((w, h), Image.Resampling.BILINEAR))
        image = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        found.append([word for word, _ in tada.zero_shot_tags(image)[0]])
        given += len(found[i])
        right += len(set(found[i]) & {CLASSES[k] for k in np.unique(labels) if k != IGNORE})
    result = evaluate(tada, dataset, words)
    assert (result.words_precision, result.words_recall) == (right / given, right / 9)
    by_hand = confusion_by_hand(tada, dataset, lambda i: [found[i]], None, None)
    assert torch.equal(result.confusion, by_hand)


def test_the_tag_head_is_judged_by_the_whole_pictures(tada, dataset):
    """Logits as `predict` gives them, ranked per class by a loop."""
    result = evaluate(tada, dataset, words_from("classes", dataset), window=(80, 80))
    rows, there = [], []
    for i in range(4):
        picture, labels = dataset.load(i)
        h, w = module.fit(labels.shape, 60, 130)
        image = np.array(picture.resize((w, h), Image.Resampling.BILINEAR))
        image = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        rows.append(inference.predict(tada, image, window=(80, 80)).tag_logits[0].tolist())
        there.append([k in labels for k in range(4)])
    assert torch.equal(result.scores, torch.tensor(rows))
    assert result.present.tolist() == there
    every = []
    for k in range(3):  # the fourth is nowhere
        hits = []
        for i in range(4):
            if there[i][k]:
                above = [there[j][k] for j in range(4) if rows[j][k] >= rows[i][k]]
                hits.append(sum(above) / len(above))
        every.append(sum(hits) / len(hits))
    assert result.tag_mAP == pytest.approx(sum(every) / 3)


def test_what_a_condition_does_not_have_is_not_judged(dataset, tmp_path):
    """`classes` has no head and reads no words; a caption is a sentence; an untrained head says nothing."""
    file = tag_file(tmp_path / "t.jsonl", [["sky"]] * 4, ["a sea", "the sky", "boats", "a boat"])
    for condition, tags in (("classes", "classes"), ("classes", file), ("caption", file)):
        tada = random_model(replace(CONFIG, condition=condition, tags=str(tags)))
        numbers = evaluate(tada, dataset, words_from(tags, dataset, condition), indices=[0]).as_json()
        assert [numbers[key] for key in ("tag_mAP", "words_precision", "words_recall")] == [None] * 3
        assert numbers["mIoU"] is not None
    tada = random_model(replace(CONFIG, tag_loss_weight=0.0))
    assert evaluate(tada, dataset, words_from("classes", dataset), indices=[0]).tag_mAP is None


# ---- the report and its files ----------------------------------------------------------------------------


def test_the_report_by_hand():
    """Every class in order, then the worst first with what they are taken for, then one line to paste."""
    result = result_of(HAND, CLASSES, split_images=5, window=[64, 128], stride=[43, 85], spoken=(3, 4, 6))
    lines = result.as_markdown().splitlines()
    assert "**PART: 1 of the split's 5 pictures.**" in lines
    start = lines.index("|--:|---|--:|--:|--:|")
    assert lines[start + 1 : start + 5] == [
        "| 0 | sky | 66.67 | 75.00 | 40.00 |",
        "| 1 | sea | 57.14 | 66.67 | 60.00 |",
        "| 2 | red boat | 0.00 | - | 0.00 |",
        r"| 3 | a\|b | - | - | 0.00 |",
    ]
    start = lines.index("|---|--:|---|")
    assert lines[start - 3] == "The 3 worst:"
    assert lines[start + 1 : start + 4] == [
        "| red boat | 0.00 | - |",
        "| sea | 57.14 | red boat (25.00 %) |",
        "| sky | 66.67 | sea (25.00 %) |",
    ]
    assert lines[-1] == (
        "    folder val mIoU 41.27, 3 of 4 classes occur, pixel accuracy 70.00, class accuracy 70.83, "
        "words' precision 75.00, recall 50.00, 1 pictures, scale 1, windows 64x128 by 43x85, "
        "tiny fpn tagging, tags classes"
    )


def test_only_the_ten_worst_are_listed_again():
    """Class k of 30 has k + 1 pixels of which one is taken for the next class; class 0 loses its only one."""
    confusion = torch.diag(torch.arange(30)) + torch.diag(torch.ones(29, dtype=torch.int64), 1)
    lines = result_of(confusion.tolist()).as_markdown().splitlines()
    start = lines.index("|---|--:|---|")
    assert lines[start - 3] == "The 10 worst:"
    assert lines[start + 1] == "| class 0 | 0.00 | class 1 (100.00 %) |"
    assert lines[start + 2] == "| class 1 | 33.33 | class 2 (50.00 %) |"  # 1 of 1 + 1 + 1
    assert [x.split(" |")[0] for x in lines[start + 1 : start + 11]] == [f"| class {k}" for k in range(10)]
    assert lines[start + 11] == ""


def test_files_hold_the_numbers(tmp_path):
    """Non-English names too; the sha256 is that of the model's file."""
    result, out = result_of([[3, 1], [0, 2]], ["größe", 'a "b", c'], random_weights=True), tmp_path
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    write(result, out, tmp_path / "model", sha256)
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
def test_the_picture_of_the_confusion(K):
    """Row 0 is found wholly, a quarter of row 1 is taken for class 0, row 2 has no pixels."""
    confusion = torch.eye(K, dtype=torch.int64) * 4
    confusion[1, :2], confusion[2] = torch.tensor([1, 3]), 0
    picture = confusion_matrix(confusion, ["x"] * K)
    side = 32 if K <= 40 else 8
    margin = picture.width - 16 - K * side
    corner = [
        (margin + column * side + 2, margin + row * side + 2) for row in range(3) for column in range(3)
    ]
    dark, white, grey = (8, 48, 107), (255, 255, 255), (225, 225, 225)
    half = tuple((a + b + 1) // 2 for a, b in zip(dark, white, strict=True))  # the root of a quarter
    seen = [picture.getpixel(place) for place in corner]
    assert [seen[0], seen[1], *seen[6:9]] == [dark, white, grey, grey, grey]
    assert np.abs(np.subtract(seen[3], half)).max() <= 1
    named = np.array(picture.crop((margin - 20, margin + 4, margin - 2, margin + 4 + side)).convert("L"))
    assert (named.min() < 100) == (K <= 40)  # the name "x" beside the first row


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tada, root, tmp_path_factory):
    """A run folder as training leaves it: `best` leads to step 7, config.json says where the data were."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    write_step(folder, 7, tada, {}, {"mIoU": 0.5}, {"x": torch.zeros(1)}, {})
    point(folder, "best", "step-000007")
    (folder / "config.json").write_text(json.dumps({"data": str(root)}))
    return folder


def stored(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_command_reports_what_evaluate_counts(tada, dataset, finished, capsys):
    """The default: windows of the crop, beside the steps of the run; the terminal has the same report."""
    assert main([str(finished), "--workers", "1"]) == 0
    printed, out = capsys.readouterr().out, finished / "eval-val"
    result = evaluate(tada, dataset, words_from("classes", dataset), window=(48, 64), stride=(32, 43))
    found, expected = stored(out), result.as_json()
    assert found.pop("seconds") > 0
    expected.pop("seconds")
    assert found.pop("checkpoint") == str(finished / "step-000007/model.safetensors")
    assert len(found.pop("sha256")) == 64
    assert found == expected
    assert found["random_weights"] is True
    assert result.line() in printed
    assert result.as_markdown() in printed
    assert (out / "result.md").read_text().startswith(result.as_markdown())


@pytest.fixture
def uncounted(monkeypatch):
    """The command without its model: every evaluation finds the same at once."""
    result = result_of([[3, 1], [0, 2]], ["sky", "sea"])
    monkeypatch.setattr(module, "evaluate", lambda *arguments, **options: result)
    monkeypatch.setattr(module, "load_model", lambda *arguments: None)


def test_an_earlier_evaluation_is_put_aside(finished, uncounted, tmp_path, capsys):
    """Its own files alone, and none is deleted; the newest result has the name without a number."""
    out = tmp_path / "out"
    command = [str(finished), "--workers", "0", "--out", str(out)]
    assert main(command) == 0
    assert "earlier evaluation is" not in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    (out / "result.md").write_text("the first")
    assert main([*command, "--limit", "1"]) == 0
    assert f"the earlier evaluation is now {out}.1\n" in capsys.readouterr().out
    (out / "result.md").write_text("the second")
    assert main([*command, "--flip"]) == 0
    said = [(tmp_path / name / "result.md").read_text() for name in ("out.1", "out.2")]
    assert said == ["the first", "the second"] and stored(out)["checkpoint"]
    names = ["confusion.csv", "confusion.png", "result.json", "result.md"]
    assert sorted(path.name for path in (tmp_path / "out.2").iterdir()) == names
    assert sorted(path.name for path in out.iterdir()) == [".lock", *names[:2], "notes.txt", *names[2:]]


def test_an_evaluation_that_cannot_be_put_aside_stays(finished, uncounted, tmp_path, monkeypatch, capsys):
    command = [str(finished), "--workers", "0", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    monkeypatch.setattr(Path, "mkdir", refuses_numbers)
    assert main(command) == 2
    assert "out.1, for the earlier evaluation, cannot be made (Read-only): give" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def refuses_numbers(path: Path, *arguments, **options) -> None:
    """A folder whose own parent may not be written; what is there needs not be made."""
    if path.suffix == ".1":
        raise OSError(30, "Read-only")


def test_the_hash_is_that_of_the_model_that_was_evaluated(tada, finished, uncounted, tmp_path, monkeypatch):
    """Training may write a better step meanwhile, and remove this one."""
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    before = digest(run / "best/model.safetensors")
    finds = module.evaluate

    def overtaken(*arguments, **options):
        write_step(run, 8, tada, {}, {"mIoU": 0.6}, {"x": torch.zeros(1)}, {})
        point(run, "best", "step-000008")
        shutil.rmtree(run / "step-000007")
        return finds()

    monkeypatch.setattr(module, "evaluate", overtaken)
    assert main([str(run), "--workers", "0"]) == 0
    found = stored(run / "eval-val")
    assert found["sha256"] == before != digest(run / "best/model.safetensors")
    assert found["checkpoint"] == str(run / "step-000007/model.safetensors")


def test_a_folder_in_use_is_refused(finished, uncounted, tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(finished), "--workers", "0", "--out", str(tmp_path)]) == 2
    assert "is being written by another process: wait, or give another --out" in capsys.readouterr().err


def test_a_process_whose_own_files_fail_says_so(monkeypatch, capsys):
    """What another process cannot know: its disk, its machine. Of the rest rank 0 speaks for all."""
    monkeypatch.setattr(module, "connect", lambda: Ranks(1, 2, torch.device("cpu")))
    for error, said in ((OSError("no room"), "eval.py: no room\n"), (TadaError("wrong"), "")):

        def fails(*arguments, error=error):
            raise error

        monkeypatch.setattr(module, "run", fails)
        assert main(["run"]) == 2
        assert capsys.readouterr().err == said


def test_names_that_the_terminal_cannot_show_stop_nothing(finished, monkeypatch, tmp_path):
    file = tmp_path / "said"
    with file.open("w", encoding="ascii") as narrow, redirect_stdout(narrow):
        monkeypatch.setattr(module, "run", lambda *arguments: print("größe"))
        assert main([str(finished)]) == 0
    assert file.read_text() == "gr\\xf6\\xdfe\n"


def test_flags_change_the_protocol(tada, dataset, finished, tmp_path):
    """Each form of the checkpoint's path; what is not asked for stays as training had it."""
    file = tag_file(tmp_path / "tags.jsonl", [["sky"]] * 4)
    cases = [
        (
            "last",
            ["--window", "80", "--tags", str(file)],
            {"window": [80, 80], "stride": [53, 53], "tags": str(file)},
        ),
        ("best", ["--window", "70", "90", "--stride", "50"], {"window": [70, 90], "stride": [50, 50]}),
        ("step-000007", ["--stride", "30", "40"], {"window": [48, 64], "stride": [30, 40]}),
        ("last/model.safetensors", ["--scales", "0.5", "--flip"], {"scales": [0.5], "flip": True}),
        (
            "",
            ["--ms", "--whole"],
            {"scales": [1.0, 1.125, 1.25, 1.375, 1.5], "flip": True, "window": None, "stride": None},
        ),
        ("", ["--tags", "oracle"], {"tags": "oracle", "oracle": True, "words_recall": 1.0}),
    ]
    out = ["--out", str(tmp_path / "out"), "--limit", "1", "--workers", "0"]
    for path, flags, expected in cases:
        assert main([str(finished / path), *flags, *out]) == 0
        found = stored(tmp_path / "out")
        assert {key: found[key] for key in expected} == expected
        unasked = {"scales": [1.0], "flip": False, "window": [48, 64], "tags": "classes", "images": 1}
        unasked = {key: value for key, value in unasked.items() if key not in expected}
        assert {key: found[key] for key in unasked} == unasked


def test_a_limit_is_spread_over_the_split(finished, monkeypatch):
    taken = []

    def spy(*arguments, indices, **options):
        taken.append(indices)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", spy)
    monkeypatch.setattr(module, "load_model", lambda *arguments: None)
    for limit in (2, 3, 9):
        assert main([str(finished), "--limit", str(limit)]) == 130
    assert taken == [[0, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_scenes_need_no_files_and_say_their_version(tmp_path, monkeypatch, capsys):
    """A model's file that lies alone: the report goes to the current folder."""
    from images import scenes

    config = TadaConfig(
        classes=tuple(scenes.CLASSES),
        model="tiny",
        dataset="scenes",
        crop=(128, 128),
        box=(128, 512),
        stride=(85, 85),
    )
    monkeypatch.chdir(tmp_path)
    save_model(random_model(config), tmp_path / "model.safetensors", {}, {})
    assert main(["model.safetensors", "--split", "test", "--limit", "3", "--workers", "0"]) == 0
    found = stored(tmp_path / "eval-test")
    expected = {"dataset": "scenes", "split": "test", "split_images": 500, "scenes_version": scenes.VERSION}
    assert {key: found[key] for key in expected} == expected
    assert f"scenes version {scenes.VERSION} test mIoU" in capsys.readouterr().out
    assert found["segments"] == "connected components" and 0 <= found["PQ"] <= 1


def process(rank: int, folder: Path, run: Path, broken: Path, ports: list[str]) -> None:
    """What torchrun starts: the command twice, the second time on a data set with a damaged picture."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    module.CHECKED = 1  # so that the damaged picture is met on the way
    out, err = ((folder / f"{rank}.{kind}").open("w") for kind in ("out", "err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        for port, flags in zip(ports, ([], ["--data", str(broken)]), strict=True):
            os.environ["MASTER_PORT"] = port
            print(main([str(run), "--whole", "--workers", "0", "--out", str(folder / "out"), *flags]))


def in_two_processes(folder: Path, run: Path, broken: Path) -> None:
    """What `process` does, twice at once."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    fork = multiprocessing.get_context("fork")  # no second import of torch
    both = [fork.Process(target=process, args=(rank, folder, run, broken, ports)) for rank in (0, 1)]
    try:
        for one in both:
            one.start()
        for one in both:
            one.join(60)
        assert [one.exitcode for one in both] == [0, 0]
    finally:
        for one in both:
            one.kill()


def test_two_processes_share_the_pictures(tada, root, dataset, finished, tmp_path):
    """The same counts to the last digit, written once; a picture that one cannot read stops both."""
    broken = Path(shutil.copytree(root, tmp_path / "broken"))
    damage(broken / "images/val/3.png", "cut")
    in_two_processes(tmp_path, finished, broken)
    result = evaluate(tada, dataset, words_from("classes", dataset))
    found, expected = stored(tmp_path / "out.1"), result.as_json()
    assert {**found, "seconds": 0} == {
        **expected,
        "seconds": 0,
        "checkpoint": found["checkpoint"],
        "sha256": found["sha256"],
    }
    said, error = ([(tmp_path / f"{rank}.{kind}").read_text() for rank in (0, 1)] for kind in ("out", "err"))
    first = "kernels: plain torch, as on every CPU\n"
    assert said[0].startswith(first + result.as_markdown())
    assert said[0].endswith(f"\n0\n{first}the earlier evaluation is now {tmp_path / 'out.1'}\n2\n")
    assert said[1] == "0\n2\n"  # the second process says nothing itself
    assert error[1] == ""
    assert re.fullmatch(r"eval\.py: \S*broken/images/val/3\.png cannot be read .*\n", error[0])


def test_a_bad_input_gets_one_sentence(root, finished, tada, tmp_path, capsys):
    other = Path(shutil.copytree(root, tmp_path / "other"))
    (other / "classes.txt").write_text("road\nriver\n")
    unlabelled = Path(shutil.copytree(root, tmp_path / "unlabelled"))
    (unlabelled / "labels/val/1.png").unlink()
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "file").touch()
    alone = tmp_path / "alone"
    alone.mkdir()
    save_model(tada, alone / "model.safetensors", {}, {})
    muddled = Path(shutil.copytree(finished, tmp_path / "muddled", symlinks=True))
    (muddled / "config.json").write_text("{")
    classes = Path(shutil.copytree(alone, tmp_path / "classes"))
    save_model(random_model(replace(CONFIG, condition="classes")), classes / "model.safetensors", {}, {})
    few = tag_file(tmp_path / "few.jsonl", [["sky"]] * 3)
    run, there = str(finished), ["--data", str(root)]
    cases = [
        ([str(tmp_path / "nowhere")], "nowhere holds no model.safetensors"),
        ([str(tmp_path / "page.safetensors")], "page.safetensors is not a whole safetensors file"),
        ([run, "--data", str(tmp_path)], f"{tmp_path} is not folder"),
        ([run, "--data", str(other)], "other has 2 classes, such as road, but .* trained on 4, such as sky"),
        ([run, "--data", str(unlabelled)], "has 1 faults.*\n.*images/val/1.png has no label file"),
        ([run, "--split", "holiday"], "folder has no labelled split 'holiday'"),
        ([run, "--tags", str(tmp_path / "gone.jsonl")], "gone.jsonl cannot be read"),
        ([run, "--tags", str(few)], "few.jsonl has no line for 1 of 4 pictures"),
        ([run, "--tags", "clip"], "--tags clip: the model was trained with tags classes"),
        ([str(classes), *there, "--tags", "oracle"], "condition classes reads no words"),
        ([run, "--stride", "70"], r"--stride \(70, 70\) leaves gaps between windows of \(48, 64\)"),
        ([run, "--out", str(tmp_path / "file")], r"file cannot be written \(.*\): give another --out"),
        ([str(alone)], "does not say where its data set is: give its folder with --data"),
        ([str(muddled)], r"config.json cannot be read \(.*\): give --data"),
    ]
    for arguments, message in cases:
        assert main([*arguments, "--workers", "0"]) == 2, arguments
        out, err = capsys.readouterr()
        assert re.match(f"eval.py: .*{message}", err), err
        assert (out, err.count("\n")) == ("", 2 if "faults" in message else 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--whole", "--stride", "3"], "there are no windows with --whole"),
        (["--whole", "--window", "3"], "not allowed with argument"),
        (["--ms", "--scales", "1"], "not allowed with argument"),
        (["--scales", "0.05"], "'0.05' is not in 0.1..10"),
        (["--scales", "x"], "invalid scale value: 'x'"),
        (["--scales", "nan"], "is not in 0.1..10"),
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--window", "1", "2", "3"], "--window 1 2 3: give one number, or height and width"),
        (["--workers", "-1"], "--workers -1: give 0 or more"),
        (["--overlap", "2"], "'2' is not in 0..1"),
    ],
)
def test_a_wrong_flag_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_the_default_is(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "By default a picture is resized as training said" in text
    assert text.count("(default: ") == 16  # every option but --help


# ---- real photographs ------------------------------------------------------------------------------------


def test_photographs_of_ade20k_and_coco(ade20k_samples, panopticapi_samples, tmp_path):
    """ADE20K's layout as published; COCO's panoptic samples as a `folder` of 133 classes."""
    for kind, to in (("images", "images/validation"), ("annotations", "annotations/validation")):
        shutil.copytree(ade20k_samples / "sampleData" / kind, tmp_path / "ade" / to)
    samples = panopticapi_samples
    about = json.loads((samples / "panoptic_examples.json").read_text())
    index = {category["id"]: k for k, category in enumerate(about["categories"])}
    expected = np.zeros(133, np.int64)
    for entry in about["annotations"]:
        name = entry["file_name"]
        rgb = np.asarray(Image.open(samples / "panoptic_examples" / name)).astype(np.int64)
        ids, labels = rgb @ [1, 256, 65536], np.full(rgb.shape[:2], IGNORE, np.uint8)
        for segment in entry["segments_info"]:
            labels[ids == segment["id"]] = index[segment["category_id"]]
            expected[index[segment["category_id"]]] += segment["area"]
        save(labels, tmp_path / "coco/labels/val" / name)
        photo = Path(name).with_suffix(".jpg").name
        (tmp_path / "coco/images/val").mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / "input_images" / photo, tmp_path / "coco/images/val" / photo)
    names = [category["name"] for category in about["categories"]]
    (tmp_path / "coco/classes.txt").write_text("\n".join(name.replace(",", "") for name in names))

    for name, folder, K in (("ade20k", "ade", 150), ("folder", "coco", 133)):
        dataset = open_dataset(name, tmp_path / folder, "val")
        assert len(dataset.classes) == K
        config = replace(CONFIG, classes=tuple(dataset.classes), prompts=tuple(dataset.prompts), dataset=name)
        tada = build(replace(config, crop=(64, 64), stride=(43, 43), box=(64, 256))).eval()
        result = evaluate(tada, dataset, words_from("oracle", dataset))
        pixels = [np.bincount(dataset.load(i)[1].ravel(), minlength=256)[:K] for i in range(len(dataset))]
        assert result.confusion.sum(1).tolist() == sum(pixels).tolist()
        assert (result.words_precision, result.words_recall) == (1.0, 1.0)
        assert result.as_json()["images"] == len(dataset)
    assert sum(pixels).tolist() == expected.tolist()  # the JSON's areas


# ---- segments --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(segments, tmp_path_factory):
    """A run folder with a random Mask2Former, the model, its data set of three pictures."""
    dataset = open_panoptic("panoptic", segments, "val")
    sizes = {"model": "tiny", "crop": (64, 64), "stride": (43, 43), "box": (96, 384)}
    things = tuple(dataset.categories.things.tolist())
    config = TadaConfig(
        tuple(dataset.classes), dataset="panoptic", decoder="mask2former", things=things, **sizes
    )
    torch.manual_seed(0)
    tada, folder = build(config).eval(), tmp_path_factory.mktemp("runs") / "segments"
    folder.mkdir()
    write_step(folder, 7, tada, {}, {}, {"x": torch.zeros(1)}, {})
    (folder / "config.json").write_text(json.dumps({"data": str(segments)}))
    return folder, tada, dataset


def test_segments_are_judged_as_they_are_written(judged, tmp_path, capsys):
    """PQ and its parts are those of the written files, read again."""
    run, _, dataset = judged
    flags = ["--workers", "0", "--score", "0", "--overlap", "0", "--out", str(tmp_path)]
    assert main([str(run / "step-000007"), *flags]) == 0
    found, written = stored(tmp_path), read_annotations(tmp_path / "panoptic.json")
    again = compare(dataset.annotations, dataset.pngs, written, tmp_path / "panoptic")
    assert again.counts[:, 2].sum() > 0, "the model finds something"
    for which, end in (("all", ""), ("things", "_things"), ("stuff", "_stuff")):
        mean = again.mean(which)
        assert [found[f"{name}{end}"] for name in ("PQ", "SQ", "RQ")] == [mean["PQ"], mean["SQ"], mean["RQ"]]
    assert found["segments"] == "mask2former, score 0, overlap 0" and 0 <= found["AP"] <= 1
    assert "PQ of things" in capsys.readouterr().out
    assert "| things |" in (tmp_path / "result.md").read_text()


def test_the_folder_holds_what_its_json_lists(judged, tmp_path, monkeypatch):
    """Also after an evaluation of more pictures, which is put aside, or one that was stopped."""
    run, folder = judged[0] / "step-000007", tmp_path / "out" / "panoptic"
    command = [str(run), "--workers", "0", "--out", str(folder.parent)]
    assert main(command) == 0
    before = folder.with_suffix(".json").read_bytes()
    (folder.parent / "mine.png").touch()
    monkeypatch.setattr(module, "agree", interrupted)
    assert main([*command, "--score", "0"]) == 130
    monkeypatch.undo()
    assert main([*command, "--limit", "1"]) == 0
    assert [path.name for path in folder.iterdir()] == ["0.png"]
    assert read_annotations(folder.with_suffix(".json")).pngs == ["0.png"]
    assert (folder.parent / "mine.png").exists() and not (folder.parent / ".tmp-panoptic").exists()
    aside = tmp_path / "out.1"
    assert sorted(path.name for path in (aside / "panoptic").iterdir()) == ["0.png", "1.png", "2.png"]
    assert (aside / "panoptic.json").read_bytes() == before and not (tmp_path / "out.2").exists()


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_a_perfect_model_has_all_points(judged, monkeypatch):
    _, tada, dataset = judged
    pictures = iter(range(len(dataset)))

    def perfect(image, tags, size, **options):
        _, ids, found = dataset.panoptic(next(pictures))
        labels = torch.from_numpy(semantic(ids, found)).long()[None]
        things, ids = [s for s in found if s.thing], torch.from_numpy(ids).long()
        masks = torch.stack([ids == s.id for s in things])
        instances = Instances(torch.tensor([s.label for s in things]), torch.ones(len(things)), masks)
        return Segmented(labels, None, [Panoptic(ids, found)], [instances])

    monkeypatch.setattr(tada, "segment", perfect)
    found = evaluate(tada, dataset, words_from("classes", dataset), instances=True).as_json()
    assert [found[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU")] == [1] * 6
    assert found["AP"] == pytest.approx(1)


def test_without_pycocotools_there_is_no_ap_and_it_says_so(judged, monkeypatch):
    _, tada, dataset = judged
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    result = evaluate(tada, dataset, words_from("classes", dataset), instances=True)
    assert result.as_json()["AP"] is None and "PQ" in result.as_json()
    assert "AP needs pycocotools: pip install pycocotools" in result.as_markdown()


def test_two_processes_share_the_segments(judged, segments, tmp_path):
    run, tada, dataset = judged
    broken = Path(shutil.copytree(segments, tmp_path / "broken"))
    damage(broken / "val/2.png", "cut")
    in_two_processes(tmp_path, run / "step-000007", broken)
    expected = evaluate(tada, dataset, words_from("classes", dataset), instances=True).as_json()
    out = tmp_path / "out.1"  # put aside by the second evaluation, which was stopped
    found = stored(out)
    assert {name: found[name] for name in expected} | {"seconds": 0} == {**expected, "seconds": 0}
    written = read_annotations(out / "panoptic.json")
    assert written.image_ids == dataset.image_ids
    assert sorted(path.name for path in (out / "panoptic").iterdir()) == written.pngs
    compare(dataset.annotations, dataset.pngs, written, out / "panoptic")


def test_flags_of_another_decoder_are_refused(judged, finished, capsys):
    run = str(judged[0] / "step-000007")
    for flags, said in (
        ([run, "--ms"], "--ms: mask2former reads a picture whole, once; leave it out"),
        ([run, "--scales", "1", "2"], "--scales: mask2former reads a picture whole"),
        ([run, "--window", "64"], "--window: mask2former reads"),
        ([str(finished), "--score", "0.5"], "--score: .* this model's decoder is fpn; leave it out"),
    ):
        assert main(flags) == 2
        assert re.match(f"eval.py: {said}", capsys.readouterr().err)
