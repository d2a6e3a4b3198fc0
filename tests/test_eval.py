"""eval.py: whole images, windows and scales against loops by hand, tags, segments, the command."""

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
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_data import damage, noise, save
from test_metrics_report import CLASSES, result_of
from torch import Tensor

import eval as module
import inference
import kernels
from assemble import build
from data import open_dataset
from errors import DataError, TadaError
from eval import evaluate, main
from images import scenes
from images.panoptic import read_annotations
from images.read import IGNORE, fit
from inference import Prediction
from loading.tags import open_words
from mask2former import Instances, Panoptic
from metrics import judge
from metrics import worst as module_worst
from metrics.quality import compare
from metrics.report import confusion
from model import TadaConfig
from run.checkpoint import point, save_model, write_step
from run.ranks import Ranks
from weights.words import digest

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


def tensor_of(image: Image.Image | np.ndarray) -> Tensor:
    """An image as the model takes it: `(1, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def boxed(dataset, i: int) -> tuple[Tensor, np.ndarray]:
    """Image i resized into the box, and its labels at their own size."""
    image, labels, *_ = dataset.load(i)
    h, w = fit(labels.shape, 60, 130)
    return tensor_of(image.resize((w, h), Image.Resampling.BILINEAR)), labels


def random_model(config: TadaConfig):
    """A random model whose prediction is not the same class everywhere."""
    torch.manual_seed(0)
    tada = build(config).eval()
    with torch.no_grad():
        last = tada.decoder.classifier[1]
        last.weight.mul_(100)
        output = tada(tensor_of(noise(64, 128)), [["sea"]])
        last.bias.sub_(tada.decoder.logits(output.prediction, (64, 128)).mean((0, 2, 3)))
    return tada


@pytest.fixture(scope="module")
def tada():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A `folder` data set: four images of different sizes, blocks of labels, some of them ignored."""
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
    paths = dataset.paths
    return open_words(condition, str(tags), dataset.prompts, dataset.root, paths)


def tag_file(path: Path, tags: list[list[str]], captions=None) -> Path:
    entries = [
        {"image": f"images/val/{i}.png", "tags": [[tag, 0.5] for tag in words]}
        for i, words in enumerate(tags)
    ]
    for entry, caption in zip(entries, captions or [], strict=False):
        entry["caption"] = caption
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# ---- whole images, windows, scales


def grid(side: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of each window, as mmsegmentation's slide_inference."""
    ends = [min(i * stride + window, side) for i in range(max(side - window + stride - 1, 0) // stride + 1)]
    return [(max(end - window, 0), end) for end in ends]


@torch.no_grad()
def softmax_by_hand(tada, image, tags, size, window, stride):
    """The class probabilities `(K, *size)` of an image `(1, 3, h, w)` in [-1, 1]: every window alone."""
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
    """Each image alone, resized into the box."""
    total = torch.zeros(4, 4, dtype=torch.int64)
    for i in range(len(dataset)):
        image, labels, *_ = dataset.load(i)
        scale = min(60 / min(labels.shape), 130 / max(labels.shape))
        h, w = (int(side * scale + 0.5) for side in labels.shape)
        image = tensor_of(image.resize((w, h), Image.Resampling.BILINEAR))
        sides = window or (h, w), stride or window or (h, w)
        predicted = softmax_by_hand(tada, image, tags(i), labels.shape, *sides).argmax(0)
        total += confusion(torch.from_numpy(labels), predicted, 4)
    return total


@pytest.mark.parametrize(("window", "stride"), [(None, None), ((50, 70), (50, 41)), ((80, 80), None)])
def test_whole_images_and_windows_equal_each_predicted_alone(tada, dataset, window, stride):
    """Sizes and windows that are no multiples of 64: padding reaches no pixel of the result."""
    result = evaluate(tada, dataset, words_from("classes", dataset), window=window, stride=stride)
    expected = confusion_by_hand(tada, dataset, lambda i: None, window, stride)
    assert torch.equal(result.confusion, expected)
    assert (result.confusion.sum(0) > 0).sum() >= 3  # the random model predicts more than one class
    labelled = sum(int((dataset.load(i).labels != IGNORE).sum()) for i in range(4))
    assert int(result.confusion.sum()) == labelled
    assert (result.classes, len(result.present)) == (CLASSES, 4)
    expected = {"window": window and [*window], "stride": (stride or window) and [*(stride or window)]}
    assert {key: result.about[key] for key in expected} == expected


@pytest.fixture
def sizes(monkeypatch) -> list[tuple[int, int]]:
    """The sizes (H, W) of all images that are predicted."""
    sizes, slide = [], inference.slide

    def spy(tada, image, *rest):
        sizes.append(tuple(image.shape[2:]))
        return slide(tada, image, *rest)

    monkeypatch.setattr(inference, "slide", spy)
    return sizes


def test_other_scales_are_made_from_the_original_image(tada, dataset, sizes):
    """The mean softmax of 1 and 1.5 times the box's size, each also mirrored, at the image's own size."""
    image, labels, *_ = dataset.load(3)
    image, wanted, total = tensor_of(image), [], 0
    factor = min(60 / min(labels.shape), 130 / max(labels.shape))
    base = [int(side * factor + 0.5) for side in labels.shape]
    for scale in (1.0, 1.5):
        size = [int(side * scale + 0.5) for side in base]
        wanted += 2 * [tuple(size)]
        resized = F.interpolate(image, size, mode="bilinear", antialias=True)
        for view, back in ((resized, lambda x: x), (resized.flip(3), lambda x: x.flip(2))):
            total = total + back(softmax_by_hand(tada, view, None, labels.shape, (64, 60), (50, 50)))
    expected = confusion(torch.from_numpy(labels), total.argmax(0), 4)

    protocol = {"scales": (1.0, 1.5), "flip": True, "window": (64, 60), "stride": (50, 50)}
    result = evaluate(tada, dataset, words_from("classes", dataset), indices=[3], **protocol)
    assert sizes == wanted
    assert int((result.confusion - expected).abs().sum()) <= 2e-4 * int(expected.sum())  # order of sums
    assert (result.about["scales"], result.about["flip"]) == ([1.0, 1.5], True)


def test_images_of_one_size_are_read_together(tmp_path, monkeypatch):
    """Twelve drawn images and one of another size, in order, as many as `BATCH` lets: the numbers of one by
    one; CLIP's image tower sees each once, for its tags and the adapter.
    """
    for i in range(13):
        sample = scenes.draw(200_000 + i)
        side = 100 if i == 5 else 128
        save(sample.image[:side], tmp_path / f"images/val/{i:02}.png")
        save(sample.labels[:side], tmp_path / f"labels/val/{i:02}.png")
    (tmp_path / "classes.txt").write_text("\n".join(scenes.CLASSES))
    dataset = open_dataset("folder", tmp_path, "val")
    sizes = {"crop": (128, 128), "stride": (85, 85), "box": (128, 256)}
    tada = random_model(replace(CONFIG, classes=scenes.CLASSES, prompts=(), tags="clip", **sizes))
    calls, forward, encode = {"model": [], "clip": []}, tada.forward, tada.clip.image
    monkeypatch.setattr(tada, "forward", lambda x, *rest: calls["model"].append(len(x)) or forward(x, *rest))
    monkeypatch.setattr(tada.clip, "image", lambda x: calls["clip"].append(len(x)) or encode(x))
    words = words_from("clip", dataset)
    result = evaluate(tada, dataset, words)
    assert calls == {"model": [5, 1, 7], "clip": [5, 1, 7]}
    calls["model"].clear()
    monkeypatch.setitem(inference.BATCH, "cpu", 3 * 128 * 128)
    evaluate(tada, dataset, words)
    assert calls["model"] == [3, 2, 1, 3, 3, 1]
    calls["model"].clear()
    evaluate(tada, dataset, words, flip=True, indices=range(3))  # the logits of both passes are kept
    assert calls["model"] == [1] * 6
    monkeypatch.setitem(inference.BATCH, "cpu", 1)
    alone = evaluate(tada, dataset, words)
    moved = int((result.confusion - alone.confusion).abs().sum())
    assert moved <= 2e-5 * int(alone.confusion.sum()) and len(result.present) == 13  # ties by rounding
    assert torch.equal(result.tag_counts, alone.tag_counts)
    assert torch.equal(result.present, alone.present)
    assert torch.allclose(result.scores, alone.scores, atol=1e-4)


def test_images_keep_their_size_where_the_config_has_no_box(tada, dataset, sizes, monkeypatch):
    """Cityscapes' protocol."""
    monkeypatch.setattr(tada, "config", replace(CONFIG, box=None))
    words = words_from("classes", dataset)
    assert evaluate(tada, dataset, words).about["box"] is None
    assert sizes == SIZES
    sizes.clear()
    evaluate(tada, dataset, words, scales=(0.5,), indices=[2, 0])
    assert sizes == [(24, 63), (20, 33)]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_and_modes_stay_and_dropout_is_off(tada, root, dataset, workers, tmp_path):
    """During training: the model trains, its frozen parts do not; also where an image cannot be read."""
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


def test_an_image_without_any_label(tada, tmp_path):
    """Nothing is divided by zero."""
    save(noise(30, 40), tmp_path / "images/val/x.png")
    save(np.full((30, 40), IGNORE, np.uint8), tmp_path / "labels/val/x.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    dataset = open_dataset("folder", tmp_path, "val")
    result = evaluate(tada, dataset, words_from("oracle", dataset))
    assert "Left out: 4 of 4 classes, which do not occur." in result.as_markdown()
    assert "mIoU -, " not in result.line() and result.line().startswith(
        "mIoU - on folder val, 0 of 4 classes"
    )
    numbers = result.as_json()
    keys = ("mIoU", "pixel_accuracy", "class_accuracy", "tag_mAP", "words_precision", "words_recall")
    assert [numbers[key] for key in keys] == [None] * 6
    assert numbers["images"] == 1
    assert set(numbers["classes"].values()) == {None}


# ---- tags


def test_tags_of_a_file_are_used_and_measured(tada, dataset, tmp_path):
    """Present by the labels: sky and sea in every image, in one the third; the tags below by hand."""
    present = [set(np.unique(dataset.load(i).labels).tolist()) - {IGNORE} for i in range(4)]
    assert present == [{0, 1}, {0, 1}, {0, 1, 2}, {0, 1}]
    tags = [["sky", "zebra"], [], ["red boat", "sea", "sea"], ["a|b"]]  # right: 1, 0, 2, 0; given: 2, 0, 2, 1
    file = tag_file(tmp_path / "tags.jsonl", tags)
    result = evaluate(tada, dataset, words_from(file, dataset))
    assert (result.words_precision, result.words_recall) == (3 / 5, 3 / 9)
    assert (result.about["tags"], result.about["oracle"]) == (str(file), False)
    by_hand = confusion_by_hand(tada, dataset, lambda i: [[*dict.fromkeys(tags[i])]], None, None)
    assert torch.equal(result.confusion, by_hand)
    others = [evaluate(tada, dataset, words_from(x, dataset)) for x in ("classes", "oracle")]
    assert not torch.equal(others[0].confusion, others[1].confusion)  # tags change the prediction


def test_every_report_marks_the_oracle(tada, dataset, monkeypatch):
    result = evaluate(tada, dataset, words_from("oracle", dataset), indices=[0])
    assert (result.words_precision, result.words_recall) == (1.0, 1.0)
    assert result.as_json()["oracle"] is True
    assert "**ORACLE: " in result.as_markdown()
    assert result.line().endswith("tags oracle (trained with classes), ORACLE, RANDOM WEIGHTS")
    plain = evaluate(tada, dataset, words_from("classes", dataset), indices=[0])
    assert plain.as_json()["oracle"] is False
    assert "ORACLE" not in plain.as_markdown()
    monkeypatch.setattr(tada, "config", replace(CONFIG, condition="oracle"))
    assert evaluate(tada, dataset, words_from("classes", dataset), indices=[0]).about["oracle"] is True


def test_the_tags_of_clip_are_those_of_the_whole_image(dataset):
    tada = random_model(replace(CONFIG, tags="clip"))
    words, given, right = words_from("clip", dataset), 0, 0
    assert words("images/val/0.png", [0]) is None
    tags = []
    for i in range(4):
        image, labels = boxed(dataset, i)
        tags.append([tag for tag, _ in tada.zero_shot_tags(image)[0]])
        given += len(tags[i])
        right += len(set(tags[i]) & {CLASSES[k] for k in np.unique(labels) if k != IGNORE})
    result = evaluate(tada, dataset, words)
    assert (result.words_precision, result.words_recall) == (right / given, right / 9)
    by_hand = confusion_by_hand(tada, dataset, lambda i: [tags[i]], None, None)
    assert torch.equal(result.confusion, by_hand)


def test_the_tag_head_is_measured_on_whole_images(tada, dataset):
    """Logits as `inference.predict` returns them, ranked per class by a loop."""
    result = evaluate(tada, dataset, words_from("classes", dataset), window=(80, 80))
    rows, present = [], []
    for i in range(4):
        image, labels = boxed(dataset, i)
        rows.append(inference.predict(tada, image, window=(80, 80)).tag_logits[0].tolist())
        present.append([k in labels for k in range(4)])
    assert torch.equal(result.scores, torch.tensor(rows))
    assert result.present.tolist() == present
    values = []
    for k in range(3):  # the fourth is in no image
        precisions = []
        for i in range(4):
            if present[i][k]:
                above = [present[j][k] for j in range(4) if rows[j][k] >= rows[i][k]]
                precisions.append(sum(above) / len(above))
        values.append(sum(precisions) / len(precisions))
    assert result.tag_mAP == pytest.approx(sum(values) / 3)


def test_what_a_condition_lacks_is_not_measured(dataset, tmp_path):
    """`classes` has no head and uses no tags; a caption is a sentence; a head may be untrained."""
    file = tag_file(tmp_path / "t.jsonl", [["sky"]] * 4, ["a sea", "the sky", "boats", "a boat"])
    for condition, tags in (("classes", "classes"), ("classes", file), ("caption", file)):
        tada = random_model(replace(CONFIG, condition=condition, tags=str(tags)))
        numbers = evaluate(tada, dataset, words_from(tags, dataset, condition), indices=[0]).as_json()
        assert [numbers[key] for key in ("tag_mAP", "words_precision", "words_recall")] == [None] * 3
        assert numbers["mIoU"] is not None
    tada = random_model(replace(CONFIG, tag_loss_weight=0.0))
    assert evaluate(tada, dataset, words_from("classes", dataset), indices=[0]).tag_mAP is None


# ---- the command


def write_checkpoint(run: Path, step: int, tada, metrics: dict[str, float]) -> None:
    """A step folder without any state of training."""
    write_step(run, step, tada, {}, metrics, tensors={"x": torch.zeros(1)}, facts={})


@pytest.fixture(scope="module")
def finished(tada, root, tmp_path_factory):
    """A run folder as training leaves it: `best` links to step 7, config.json holds the data set's folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    write_checkpoint(folder, 7, tada, {"mIoU": 0.5})
    point(folder, "best", "step-000007")
    (folder / "config.json").write_text(json.dumps({"data": str(root)}))
    return folder


def stored(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_command_reports_what_evaluate_counts(tada, dataset, finished, capsys):
    """The default: windows of the crop, results in the run folder; the terminal has the same report."""
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


def by_miou(tada, dataset, **protocol) -> list[tuple[float, int]]:
    """mIoU and index of every image evaluated alone, worst first."""
    words = words_from("classes", dataset)
    alone = {i: evaluate(tada, dataset, words, indices=[i], **protocol) for i in range(len(dataset))}
    return sorted((result.mIoU, i) for i, result in alone.items())


def test_the_worst_images_are_drawn(tada, dataset, finished, tmp_path, capsys, monkeypatch):
    """The two of lowest mIoU, worst first, under the labels that were counted; moved with the rest."""
    shown, compared = [], module_worst.compared
    monkeypatch.setattr(
        module_worst, "compared", lambda *args, **how: shown.append(args) or compared(*args, **how)
    )
    command = [str(finished), "--workers", "0", "--out", str(tmp_path / "out"), "--worst", "2"]
    assert main(command) == 0
    worst = by_miou(tada, dataset, window=(48, 64), stride=(32, 43))[:2]
    lines = [f"mIoU {100 * score:.1f}% {dataset.paths[i]}" for score, i in worst]
    assert "\n".join(lines) in capsys.readouterr().out
    names = [f"0{n}-{i}.jpg" for n, (_, i) in enumerate(worst, 1)]
    assert sorted(os.listdir(tmp_path / "out/worst")) == names
    for (score, i), (image, title, targets, _) in zip(worst, shown, strict=True):
        sample, (truth, predicted) = dataset.load(i), targets.values()
        assert title == Path(dataset.paths[i]).name
        assert [*targets][1] == f"prediction, mIoU {100 * score:.1f}%"
        assert np.array_equal(image, sample.image) and np.array_equal(truth, sample.labels)
        counts = confusion(torch.from_numpy(truth), torch.from_numpy(predicted), len(CLASSES))
        assert result_of(counts.tolist()).mIoU == score
    assert main(command[:-2]) == 0
    assert not (tmp_path / "out/worst").exists() and len(os.listdir(tmp_path / "out.1/worst")) == 2


@pytest.fixture
def uncounted(monkeypatch):
    """The command without its model: every evaluation has the same result at once."""
    result = result_of([[3, 1], [0, 2]], ["sky", "sea"])
    monkeypatch.setattr(module, "evaluate", lambda *arguments, **options: result)
    monkeypatch.setattr(module, "read_model", lambda *arguments: SimpleNamespace())


def test_an_earlier_evaluation_is_moved(finished, uncounted, tmp_path, capsys):
    """Its own files alone, and none is deleted; the newest result has the name without a number."""
    out = tmp_path / "out"
    command = [str(finished), "--workers", "0", "--out", str(out)]
    assert main(command) == 0
    assert "earlier evaluation" not in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    (out / "result.md").write_text("the first")
    assert main([*command, "--limit", "1"]) == 0
    assert f"moved the earlier evaluation to {out}.1\n" in capsys.readouterr().out
    (out / "result.md").write_text("the second")
    assert main([*command, "--flip"]) == 0
    moved = [(tmp_path / name / "result.md").read_text() for name in ("out.1", "out.2")]
    assert moved == ["the first", "the second"] and stored(out)["checkpoint"]
    names = ["confusion.csv", "confusion.png", "result.json", "result.md"]
    assert sorted(path.name for path in (tmp_path / "out.2").iterdir()) == names
    assert sorted(path.name for path in out.iterdir()) == [".lock", *names[:2], "notes.txt", *names[2:]]


def test_an_evaluation_that_cannot_be_moved_stays(finished, uncounted, tmp_path, monkeypatch, capsys):
    command = [str(finished), "--workers", "0", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    monkeypatch.setattr(Path, "mkdir", refuses_numbers)
    assert main(command) == 2
    assert "out.1, for the earlier evaluation, cannot be created (Read-only): give" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def refuses_numbers(path: Path, *arguments, **options) -> None:
    """Path.mkdir in a folder that may not be written."""
    if path.suffix == ".1":
        raise OSError(30, "Read-only")


def test_the_hash_is_that_of_the_model_that_was_evaluated(tada, finished, uncounted, tmp_path, monkeypatch):
    """Training may write a better step meanwhile, and remove this one."""
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    before = digest(run / "best/model.safetensors")
    evaluate_as_before = module.evaluate

    def overtaken(*arguments, **options):
        write_checkpoint(run, 8, tada, {"mIoU": 0.6})
        point(run, "best", "step-000008")
        shutil.rmtree(run / "step-000007")
        return evaluate_as_before()

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


def test_a_process_whose_own_files_fail_prints_its_error(monkeypatch, capsys):
    """A full disk is an error of one machine. What all processes raise alike, rank 0 alone prints."""
    monkeypatch.setattr(module, "init_distributed", lambda device: Ranks(1, 2, torch.device("cpu")))
    monkeypatch.setenv("RANK", "1")
    for error, printed in ((OSError("no room"), "eval.py: no room\n"), (TadaError("wrong"), "")):

        def fails(error=error, **options):
            raise error

        monkeypatch.setattr(module, "run", fails)
        assert main(["run"]) == 2
        assert capsys.readouterr().err == printed


def test_names_that_the_terminal_cannot_show_are_escaped(finished, monkeypatch, tmp_path):
    file = tmp_path / "printed"
    with file.open("w", encoding="ascii") as narrow, redirect_stdout(narrow):
        monkeypatch.setattr(module, "run", lambda **options: print("größe") or 0)
        assert main([str(finished)]) == 0
    assert file.read_text() == "gr\\xf6\\xdfe\n"


def test_flags_change_the_protocol(tada, dataset, finished, tmp_path):
    """Each form of the checkpoint's path; the rest of the protocol stays that of training."""
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
        ("", ["--tags", "clip"], {"tags": "clip", "trained_tags": "classes"}),
        ("", ["--tags", "none"], {"tags": "none", "trained_tags": "classes", "words_recall": 0.0}),
        (
            "",
            ["--words", "sky, a Road"],
            {"tags": "words", "words": "sky, a Road"},
        ),
        ("", ["--tags", "clip", "--tag-threshold", "0.5"], {"tags": "clip", "tag_threshold": 0.5}),
    ]
    out = ["--out", str(tmp_path / "out"), "--limit", "1", "--workers", "0"]
    for path, flags, expected in cases:
        assert main([str(finished / path), *flags, *out]) == 0
        found = stored(tmp_path / "out")
        default = {"scales": [1.0], "flip": False, "window": [48, 64], "tags": "classes", "images": 1}
        default |= expected
        assert {key: found[key] for key in default} == default


def test_a_limit_is_spread_over_the_split(finished, monkeypatch):
    chosen = []

    def spy(*arguments, indices, **options):
        chosen.append(indices)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", spy)
    monkeypatch.setattr(module, "read_model", lambda *arguments: SimpleNamespace())
    for limit in (2, 3, 9):
        assert main([str(finished), "--limit", str(limit)]) == 130
    assert chosen == [[0, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_scenes_need_no_files_and_report_their_version(tmp_path, monkeypatch, capsys):
    """A model's file outside of a run: the report goes to the current folder."""
    config = TadaConfig(
        classes=tuple(scenes.CLASSES),
        model="tiny",
        dataset="scenes",
        crop=(128, 128),
        box=(128, 512),
        stride=(85, 85),
    )
    monkeypatch.chdir(tmp_path)
    save_model(random_model(config), tmp_path / "model.safetensors", frozen={}, metrics={})
    assert main(["model.safetensors", "--split", "test", "--limit", "3", "--workers", "0"]) == 0
    found = stored(tmp_path / "eval-test")
    expected = {"dataset": "scenes", "split": "test", "split_images": 500, "scenes_version": scenes.VERSION}
    assert {key: found[key] for key in expected} == expected
    assert f" on scenes version {scenes.VERSION} test, " in capsys.readouterr().out
    assert found["segments"] == "connected components" and 0 <= found["PQ"] <= 1


def process(rank: int, folder: Path, run: Path, broken: Path, ports: list[str]) -> None:
    """What torchrun starts: the command twice, the second time on a data set with a corrupt image."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    module.CHECKED = 1  # so that the corrupt image is met during evaluation
    out, err = ((folder / f"{rank}.{kind}").open("w") for kind in ("out", "err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        for port, flags in zip(ports, ([], ["--data", str(broken)]), strict=True):
            os.environ["MASTER_PORT"] = port
            command = [str(run), "--whole", "--workers", "0", "--worst", "3", "--out", str(folder / "out")]
            print(main([*command, *flags]))


def in_two_processes(folder: Path, run: Path, broken: Path) -> None:
    """What `process` does, twice at once."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    fork = multiprocessing.get_context("fork")  # no second import of torch
    processes = [fork.Process(target=process, args=(rank, folder, run, broken, ports)) for rank in (0, 1)]
    try:
        for started in processes:
            started.start()
        for started in processes:
            started.join(60)
        assert [ended.exitcode for ended in processes] == [0, 0]
    finally:
        for started in processes:
            started.kill()


def test_two_processes_share_the_images(tada, root, dataset, finished, tmp_path):
    """The same counts to the last digit, written once; an image that one rank cannot read stops both."""
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
    output, errors = (
        [(tmp_path / f"{rank}.{kind}").read_text() for rank in (0, 1)] for kind in ("out", "err")
    )
    first = f"{kernels.describe('cpu')}\n"
    assert output[0].startswith(first + result.as_markdown())
    drawn = by_miou(tada, dataset)[:3]
    assert sorted(os.listdir(tmp_path / "out.1/worst")) == [
        f"0{n}-{i}.jpg" for n, (_, i) in enumerate(drawn, 1)
    ]
    assert output[0].endswith(f"\n0\n{first}moved the earlier evaluation to {tmp_path / 'out.1'}\n2\n")
    assert output[1] == "0\n2\n"  # the return values alone
    assert errors[1] == ""
    assert re.fullmatch(r"eval\.py: \S*broken/images/val/3\.png cannot be read .*\n", errors[0])


def test_bad_input_is_one_sentence(root, finished, tada, tmp_path, capsys):
    other = Path(shutil.copytree(root, tmp_path / "other"))
    (other / "classes.txt").write_text("road\nriver\n")
    renamed = Path(shutil.copytree(root, tmp_path / "renamed"))
    *names, _ = (root / "classes.txt").read_text().splitlines()
    (renamed / "classes.txt").write_text("\n".join([*names, "bus"]))
    unlabelled = Path(shutil.copytree(root, tmp_path / "unlabelled"))
    (unlabelled / "labels/val/1.png").unlink()
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "file").touch()
    alone = tmp_path / "alone"
    alone.mkdir()
    save_model(tada, alone / "model.safetensors", frozen={}, metrics={})
    unreadable = Path(shutil.copytree(finished, tmp_path / "unreadable", symlinks=True))
    (unreadable / "config.json").write_text('{"data": 5, "options": 5}')
    nested = Path(shutil.copytree(finished, tmp_path / "nested", symlinks=True))
    (nested / "config.json").write_text("[" * 2000)
    classes = Path(shutil.copytree(alone, tmp_path / "classes"))
    other_model = random_model(replace(CONFIG, condition="classes"))
    save_model(other_model, classes / "model.safetensors", frozen={}, metrics={})
    few = tag_file(tmp_path / "few.jsonl", [["sky"]] * 3)
    run = str(finished)
    cases = [
        ([str(tmp_path / "nowhere")], "nowhere holds no model.safetensors"),
        ([str(tmp_path / "page.safetensors")], "page.safetensors is not a whole safetensors file"),
        ([run, "--data", str(tmp_path)], f"{tmp_path} is not folder"),
        ([run, "--data", str(other)], "other has 2 classes, with road where .*, trained on 4, has sky: give"),
        ([run, "--data", str(renamed)], "renamed has 4 classes, with bus where .*, trained on 4, has"),
        ([run, "--data", str(unlabelled)], "has 1 faults.*\n.*images/val/1.png has no label file"),
        ([run, "--split", "holiday"], "folder has no labelled split 'holiday'"),
        ([run, "--tags", str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file"),
        ([run, "--tags", str(few)], "few.jsonl has no line for 1 of 4"),
        ([run, "--tags", "ram"], "ram.* `python -m weights.fetch --ram`"),
        ([run, "--tags", "sky"], "or give words as --words 'sky'"),
        ([str(classes), "--data", str(root), "--tags", "oracle"], "model of condition classes uses no words"),
        ([run, "--stride", "70"], r"--stride \(70, 70\) leaves gaps between windows of \(48, 64\)"),
        ([run, "--out", str(tmp_path / "file")], r"file cannot be written or locked \(.*\): give"),
        ([str(alone)], "does not hold its data set's folder: give it with --data"),
        ([str(nested)], r"config.json cannot be read \(.*\): give --data"),
        ([str(unreadable)], r'config.json cannot be read \("data" is 5, not a str\): give --data'),
    ]
    for arguments, message in cases:
        assert main([*arguments, "--workers", "0"]) == 2, arguments
        out, err = capsys.readouterr()
        assert re.match(f"eval.py: .*{message}", err), err
        lines = 1 + ("faults" in message) + 2 * ("is not folder" in message)
        assert out in ("", f"{kernels.describe('cpu')}\n") and err.count("\n") == lines


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


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "By default an image is resized as in training" in text
    assert text.count("(default: ") == 20  # every option but --help


# ---- real photographs


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
        pixels = [np.bincount(dataset.load(i).labels.ravel(), minlength=256)[:K] for i in range(len(dataset))]
        assert result.confusion.sum(1).tolist() == sum(pixels).tolist()
        assert (result.words_precision, result.words_recall) == (1.0, 1.0)
        assert result.as_json()["images"] == len(dataset)
    assert sum(pixels).tolist() == expected.tolist()  # the JSON's areas


# ---- segments


@pytest.fixture(scope="module")
def panoptic_run(segments, tmp_path_factory):
    """A run folder with a random Mask2Former, the model, its data set of three images."""
    dataset = open_dataset("panoptic", segments, "val")
    sizes = {"model": "tiny", "crop": (64, 64), "stride": (43, 43), "box": (96, 384)}
    things = tuple(dataset.categories.things.tolist())
    config = TadaConfig(
        tuple(dataset.classes), dataset="panoptic", decoder="mask2former", things=things, **sizes
    )
    torch.manual_seed(0)
    tada, folder = build(config).eval(), tmp_path_factory.mktemp("runs") / "segments"
    folder.mkdir()
    write_checkpoint(folder, 7, tada, {})
    (folder / "config.json").write_text(json.dumps({"data": str(segments)}))
    return folder, tada, dataset


def test_segments_are_measured_as_they_are_written(panoptic_run, tmp_path, capsys):
    """PQ and its parts are those of the written files, read again."""
    run, _, dataset = panoptic_run
    flags = ["--workers", "0", "--score", "0", "--overlap", "0", "--out", str(tmp_path)]
    assert main([str(run / "step-000007"), *flags]) == 0
    found, written = stored(tmp_path), read_annotations(tmp_path / "panoptic.json")
    again = compare(dataset.annotations, dataset.pngs, written, tmp_path / "panoptic")
    assert again.counts[:, 2].sum() > 0, "the model predicts some segments"
    for which, end in (("all", ""), ("things", "_things"), ("stuff", "_stuff")):
        mean = again.mean(which)
        assert [found[f"{name}{end}"] for name in ("PQ", "SQ", "RQ")] == [mean["PQ"], mean["SQ"], mean["RQ"]]
    assert found["segments"] == "mask2former, score 0, overlap 0" and 0 <= found["AP"] <= 1
    assert "PQ of things" in capsys.readouterr().out
    assert "| things |" in (tmp_path / "result.md").read_text()


def test_the_folder_holds_what_its_json_lists(panoptic_run, tmp_path, monkeypatch):
    """Also after an evaluation of more images, which is moved, or an interrupted one."""
    run, folder = panoptic_run[0] / "step-000007", tmp_path / "out" / "panoptic"
    command = [str(run), "--workers", "0", "--out", str(folder.parent)]
    assert main(command) == 0
    before = folder.with_suffix(".json").read_bytes()
    (folder.parent / "mine.png").touch()
    monkeypatch.setattr(module, "describe", interrupted)
    assert main([*command, "--score", "0"]) == 130
    monkeypatch.undo()
    assert main([*command, "--limit", "1"]) == 0
    assert [path.name for path in folder.iterdir()] == ["0.png"]
    assert read_annotations(folder.with_suffix(".json")).pngs == ["0.png"]
    assert (folder.parent / "mine.png").exists() and not (folder.parent / ".tmp-panoptic").exists()
    moved = tmp_path / "out.1"
    assert sorted(path.name for path in (moved / "panoptic").iterdir()) == ["0.png", "1.png", "2.png"]
    assert (moved / "panoptic.json").read_bytes() == before and not (tmp_path / "out.2").exists()


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_a_perfect_model_has_full_marks(panoptic_run, monkeypatch):
    _, tada, dataset = panoptic_run
    samples = map(dataset.load, range(len(dataset)))

    def perfect(tada, image, tags, size, **options):
        found = []
        for _, labels, ids, segments in islice(samples, len(image)):
            things, ids = [s for s in segments if s.thing], torch.from_numpy(ids).long()
            masks = torch.stack([ids == s.id for s in things])
            instances = Instances(torch.tensor([s.label for s in things]), torch.ones(len(things)), masks)
            found.append((torch.from_numpy(labels).long(), Panoptic(ids, segments), instances))
        labels, panoptic, instances = zip(*found, strict=True)
        return Prediction(torch.stack(labels), None, panoptic, instances)

    monkeypatch.setattr(inference, "segment", perfect)
    found = evaluate(tada, dataset, words_from("classes", dataset), instances=True).as_json()
    assert [found[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU")] == [1] * 6
    assert found["AP"] == pytest.approx(1)


def test_the_report_names_the_reason_why_ap_is_absent(panoptic_run, monkeypatch):
    _, tada, dataset = panoptic_run
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    result = evaluate(tada, dataset, words_from("classes", dataset), instances=True)
    assert result.as_json()["AP"] is None and "PQ" in result.as_json()
    assert "need pycocotools: pip install pycocotools" in result.as_markdown()


def test_what_was_measured_is_on_the_disk_before_ap(panoptic_run, tmp_path, monkeypatch):
    """AP takes longest and may be interrupted, or run out of memory."""
    monkeypatch.setattr(judge, "mask_precision", interrupted)
    flags = ["--workers", "0", "--out", str(tmp_path)]
    assert main([str(panoptic_run[0] / "step-000007"), *flags]) == 130
    found = stored(tmp_path)
    assert found["mIoU"] is not None and found["PQ"] is not None and found["AP"] is None
    assert "**AP is lacking: the evaluation ended before it**" in (tmp_path / "result.md").read_text()


@pytest.mark.parametrize("place", ["/dev/full", None])
def test_a_closed_or_full_stdout_loses_nothing(finished, tmp_path, monkeypatch, place):
    output = None if place is None else open(place, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", output)
    assert main([str(finished), "--workers", "0", "--out", str(tmp_path)]) == 0
    assert stored(tmp_path)["mIoU"] is not None and (tmp_path / "confusion.png").is_file()
    if output is not None:
        output.close()  # nothing is left in its buffer


def test_segments_are_measured_only_if_requested(panoptic_run):
    """Training of a semantic decoder has no use for them."""
    _, tada, dataset = panoptic_run
    assert evaluate(tada, dataset, words_from("classes", dataset), panoptic=False).segments is None


def test_two_processes_share_the_segments(panoptic_run, segments, tmp_path):
    run, tada, dataset = panoptic_run
    broken = Path(shutil.copytree(segments, tmp_path / "broken"))
    damage(broken / "val/2.png", "cut")
    in_two_processes(tmp_path, run / "step-000007", broken)
    expected = evaluate(tada, dataset, words_from("classes", dataset), instances=True).as_json()
    out = tmp_path / "out.1"  # moved by the second evaluation, which failed
    found = stored(out)
    assert {name: found[name] for name in expected} | {"seconds": 0} == {**expected, "seconds": 0}
    written = read_annotations(out / "panoptic.json")
    assert written.image_ids == dataset.image_ids
    assert sorted(path.name for path in (out / "panoptic").iterdir()) == written.pngs
    compare(dataset.annotations, dataset.pngs, written, out / "panoptic")


def test_flags_of_another_decoder_are_refused(panoptic_run, finished, capsys):
    run = str(panoptic_run[0] / "step-000007")
    for flags, message in (
        ([run, "--ms"], "--ms: mask2former reads an image whole, once; leave it out"),
        ([run, "--scales", "1", "2"], "--scales: mask2former reads an image whole"),
        ([run, "--window", "64"], "--window: mask2former reads"),
        ([str(finished), "--score", "0.5"], "--score .* this decoder is fpn: leave it out"),
    ):
        assert main(flags) == 2
        assert re.match(f"eval.py: {message}", capsys.readouterr().err)
