"""The result of an evaluation: IoU, accuracy, tag quality, segments; as JSON, as Markdown, as files.

Imports no model. Top to bottom: what was counted and what follows, the report, its files, the measures.
"""

import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from errors import TadaError
from images.read import IGNORE
from metrics.charts import confusion_matrix
from metrics.judge import PanopticResult
from run.files import holds, replace_text, replacing

OF_GROUPS = {"PQ_things": "PQ of things", "PQ_stuff": "PQ of stuff", "AP": "AP of things"}
OF_TAGS = {"tag_mAP": "tag mAP", "words_precision": "words' precision", "words_recall": "recall"}
# What an evaluation writes.
FILES = ("result.json", "result.md", "confusion.csv", "confusion.png", "panoptic.json", "panoptic", "worst")
WORST = 10  # classes that the report names again


@dataclass
class Result:
    """n images, K classes. Fractions are in 0..1; NaN or None where nothing was counted."""

    classes: Sequence[str]
    about: dict  # what was evaluated, and how
    confusion: Tensor  # (K, K) int64 pixels [label, prediction], without the ignored ones
    present: Tensor  # (n, K) 1 where a class is in the image's labels
    scores: Tensor  # (n, K) logits of the multi-label head
    tag_counts: Tensor  # (3,) tags that name a class in their image, tags, classes in their images
    seconds: float
    segments: PanopticResult | None = None  # of a panoptic data set

    @property
    def iou(self) -> Tensor:
        """`(K,)` intersection over union of all images' pixels; NaN where both are empty.

        As mmsegmentation (core/evaluation/metrics.py); ADE20K's own script gives an empty class 0.
        """
        return class_iou(self.confusion)

    @property
    def mIoU(self) -> float:
        """The mean of `iou` over the classes that occur, in the labels or the prediction."""
        return self.iou.nanmean().item()

    @property
    def recall(self) -> Tensor:
        """`(K,)` the share of a class's pixels that are predicted as it; NaN where it has none."""
        return self.confusion.diag().double() / self.confusion.sum(1)

    @property
    def class_accuracy(self) -> float:
        """The mean of `recall` over the classes in the labels."""
        return self.recall.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        return (self.confusion.diag().sum().double() / self.confusion.sum()).item()

    @property
    def tag_mAP(self) -> float | None:
        """The multi-label head's mean average precision over the classes that are in some image."""
        if not self.about["tag_head"] or not self.present.any():
            return None
        return mean_average_precision(self.scores, self.present > 0)

    @property
    def words_precision(self) -> float | None:
        """The share of the tags that name a class in their image."""
        return self.named(1)

    @property
    def words_recall(self) -> float | None:
        """The share of the classes in the images that the tags name."""
        return self.named(2)

    def named(self, of: int) -> float | None:
        uses_tags = self.about["condition"] in ("tagging", "tags", "oracle")
        counts = self.tag_counts.tolist()
        return counts[0] / counts[of] if uses_tags and counts[of] else None

    def as_json(self) -> dict:
        """The entries of result.json; null where nothing was counted."""
        names = ("mIoU", "pixel_accuracy", "class_accuracy", "tag_mAP", "words_precision", "words_recall")
        numbers = {name: none_if_nan(getattr(self, name)) for name in names}
        numbers |= {"images": len(self.present), "seconds": self.seconds}
        classes = dict(zip(self.classes, map(none_if_nan, self.iou.tolist()), strict=True))
        if self.segments is None:
            return {**numbers, **self.about, "classes": classes}
        quality = self.segments.quality.classes[:, 0].tolist()
        pq = dict(zip(self.classes, map(none_if_nan, quality), strict=True))
        return {**numbers, **self.segments.as_json(), **self.about, "classes": classes, "classes_PQ": pq}

    def as_markdown(self) -> str:
        """The line to paste, the warnings, the table of classes, the ten worst, the segments' summary."""
        about, iou = self.about, self.iou.tolist()
        lines = [f"# {about['dataset']} {about['split']}", "", f"    {self.line()}", ""]
        lines += [f"**{sentence}**\n" for sentence in self.warnings()]
        segments = [] if self.segments is None else ["PQ %", "SQ %", "RQ %"]
        columns = ["IoU %", "recall %", "share of the pixels %", *segments]
        lines.append(f"| id | class | {' | '.join(columns)} | most often predicted as |")
        lines.append(f"|--:|---|{'--:|' * len(columns)}---|")
        numbers = [iou, self.recall.tolist(), (self.confusion.sum(1) / self.confusion.sum()).tolist()]
        if self.segments is not None:
            numbers += self.segments.quality.classes.mT.tolist()
        absent = 0
        for k, (overlap, recall, share, *quality) in enumerate(zip(*numbers, strict=True)):
            if all(map(math.isnan, (overlap, recall, *quality))):
                absent += 1
                continue
            cells = [percent(overlap), percent(recall), f"{100 * share:.2f}", *map(percent, quality)]
            lines.append(f"| {k} | {self.name(k)} | {' | '.join(cells)} | {self.confused(k)} |")
        lines += [f"\nLeft out: {absent} of {len(iou)} classes, which do not occur."] if absent else []
        worst = sorted((k for k, x in enumerate(iou) if not math.isnan(x)), key=iou.__getitem__)[:WORST]
        named = ", ".join(f"{self.name(k)} {percent(iou[k])}" for k in worst)
        lines.append(f"\nThe {len(worst)} worst by IoU %: {named}")
        if self.segments is not None:
            lines += ["", *self.segments.as_table()]
        return "\n".join([*lines, ""])

    def name(self, k: int) -> str:
        return self.classes[k].replace("|", "\\|")

    def confused(self, k: int) -> str:
        """The other class that most pixels of class k are predicted as, with their share."""
        wrong = self.confusion[k].clone()
        wrong[k] = 0
        most, total = int(wrong.argmax()), int(self.confusion[k].sum())
        return f"{self.name(most)} ({percent(int(wrong[most]) / total, '%')})" if wrong.any() else "-"

    def warnings(self) -> list[str]:
        """Sentences without which the numbers mislead."""
        about, n = self.about, len(self.present)
        sentences = []
        if about["oracle"]:
            sentences.append("ORACLE: the model sees ground-truth tags: its score is an upper bound.")
        if about["random_weights"]:
            sentences.append("RANDOM WEIGHTS: no prior was used, so the numbers do not measure the method.")
        if n < about["split_images"]:
            sentences.append(f"PART: {n} of the split's {about['split_images']} images.")
        if self.segments is not None and self.segments.lacking:
            sentences.append(self.segments.lacking)
        return sentences

    def line(self) -> str:
        """The result and the protocol in one line, to paste."""
        about, numbers, read = self.about, self.as_json(), partial(percent, unit="%")
        occur = sum(x is not None for x in numbers["classes"].values())
        version = f" version {about['scenes_version']}" if "scenes_version" in about else ""
        quality = {key: key for key in ("PQ", "SQ", "RQ")} | OF_GROUPS
        size = "{}x{}".format
        tags = about.get("words") or about["tags"]
        parts = [
            f"mIoU {read(numbers['mIoU'])} on {about['dataset']}{version} {about['split']}",
            f"{occur} of {len(self.classes)} classes occur",
            *(f"{name} {read(numbers[key])}" for key, name in quality.items() if key in numbers),
            *([numbers["segments"]] if "segments" in numbers else []),
            f"pixel accuracy {read(numbers['pixel_accuracy'])}",
            f"class accuracy {read(numbers['class_accuracy'])}",
            *(f"{name} {read(numbers[key])}" for key, name in OF_TAGS.items() if numbers[key] is not None),
            f"{numbers['images']} images",
            " ".join(["scale", *(f"{x:g}" for x in about["scales"])]) + " + flip" * about["flip"],
            f"windows {size(*about['window'])} by {size(*about['stride'])}" if about["window"] else "whole",
            f"{about['model']} {about['decoder']} {about['condition']}, tags {tags}"
            + (f" of at least {least:g}" if (least := about.get("tag_threshold")) is not None else "")
            + (f" (trained with {about['trained_tags']})" if "trained_tags" in about else ""),
            *(["ORACLE"] if about["oracle"] else []),
            *(["RANDOM WEIGHTS"] if about["random_weights"] else []),
        ]
        return ", ".join(parts)

    def write(self, out: Path, checkpoint: Path, sha256: str) -> None:
        """Write result.json with the checkpoint and its hash, and result.md; atomically, to do it again."""
        entries = self.as_json() | {"checkpoint": str(checkpoint), "sha256": sha256}
        signed = f"{self.as_markdown()}\nCheckpoint {checkpoint}, sha256 {sha256}\n"
        for name, text in (("result.json", json.dumps(entries, indent=1)), ("result.md", signed)):
            replace_text(out / name, text)

    def write_confusion(self, out: Path) -> None:
        """Write confusion.csv and confusion.png."""
        with replacing(out / "confusion.csv") as new, new.open("w", newline="", encoding="utf-8") as f:
            rows = [[k, *row] for k, row in zip(self.classes, self.confusion.tolist(), strict=True)]
            csv.writer(f).writerows([["truth \\ prediction", *self.classes], *rows])
        confusion_matrix(out / "confusion.png", self.confusion, self.classes)


def move_earlier_results(out: Path) -> Path | None:
    """Move earlier results to the folder `out.N` and return it; delete leftovers of an interrupted run."""
    left = out / ".tmp-panoptic"
    left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
    earlier = [name for name in FILES if os.path.lexists(out / name)]  # a link is moved, not followed
    if not earlier:
        return None
    if not holds(out / "result.json", "mIoU", "sha256"):
        raise TadaError(f"{out} holds {earlier[0]} without a result.json of eval.py: give another --out")
    number, out = 1, out.resolve()
    while (folder := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    try:
        folder.mkdir()
    except OSError as error:
        fault = f"{folder}, for the earlier evaluation, cannot be created ({error.strerror})"
        raise TadaError(f"{fault}: give another --out") from None
    for name in earlier:
        shutil.move(out / name, folder / name)
    return folder


def confusion(truth: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Pixels `(K, K)` int64 [label, prediction] of two equally large maps, where the label is not 255."""
    kept = truth != IGNORE
    return torch.bincount(K * truth[kept].long() + predicted[kept], minlength=K * K).view(K, K)


def class_iou(confusion: Tensor) -> Tensor:
    """`(K,)` intersection over union of the pixels `(K, K)`; NaN where both are empty."""
    right = confusion.diag().double()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """The mean, over the positives `(n,)` bool, of the precision among all that score no lower.

    Equal scores are one step, so the order of the images plays no part (scikit-learn's definition).
    """
    scores, order = scores.sort(descending=True)
    no_lower = torch.searchsorted(-scores, -scores, right=True)  # how many
    right = positive[order].cumsum(0)[no_lower - 1]
    return (right / no_lower)[positive[order]].double().mean().item()


def mean_average_precision(scores: Tensor, positive: Tensor) -> float:
    """The mean of `average_precision` over the columns `(n, K)` with a positive."""
    occurring = positive.any(dim=0).nonzero().flatten().tolist()
    return sum(average_precision(scores[:, k], positive[:, k]) for k in occurring) / len(occurring)


def none_if_nan(x: float | None) -> float | None:
    """NaN, which JSON lacks, as None."""
    return None if x is None or math.isnan(x) else x


def percent(x: float | None, unit: str = "") -> str:
    """A fraction as people read it, with one decimal; "-" without one."""
    return "-" if none_if_nan(x) is None else f"{100 * x:.1f}{unit}"
