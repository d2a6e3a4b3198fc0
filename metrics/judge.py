"""The measures of predicted segments: PQ, SQ, RQ, AP of things; and the files that COCO's server takes.

    evaluator = PanopticEvaluator(dataset, "mask2former", folder=out / "panoptic", instances=True)
    evaluator.add(item, ids, segments, instances)  # every image of this process, at its own size
    result = evaluator.measure(ranks)              # `PanopticResult`, the same on all ranks
    evaluator.finish(ranks, result)                # adds AP, writes the files

The measures are those of metrics/quality.py. A semantic decoder is measured too, by the connected components
of its classes: the baseline of a panoptic one.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Dataset
from errors import DataError
from images.instances import pycocotools
from images.panoptic import annotation, write_annotations, write_ids
from loading.stream import Item
from metrics.quality import GROUPS, Quality, coco_results, coco_truth, count, mask_precision
from run.files import place
from run.ranks import Ranks

# What pycocotools raises: all else was measured by then, so the reason is reported instead.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


@dataclass
class PanopticResult:
    """The measured segments of all images."""

    how: str  # the method that made the segments
    quality: Quality
    precision: dict[str, float] | None  # AP, AP50, ... of things; None where it was not requested
    lacking: str = ""  # reason AP was requested but not computed

    def as_table(self) -> list[str]:
        """PQ, SQ and RQ of all classes, of things and of stuff, as lines of Markdown."""
        lines = [f"Segments: {self.how}", "", "| classes | PQ % | SQ % | RQ % | how many occur |"]
        lines.append("|---|--:|--:|--:|--:|")
        return lines + [f"| {' | '.join(map(str, row))} |" for row in self.quality.rows()]

    def as_json(self) -> dict[str, str | float | None]:
        """PQ, SQ, RQ, PQ_things, ..., PQ_stuff, ..., AP, ...; None where nothing was counted."""
        numbers = {}
        for which in GROUPS:
            mean, end = self.quality.mean(which), "" if which == "all" else f"_{which}"
            numbers |= {f"{name}{end}": mean[name] for name in ("PQ", "SQ", "RQ")}
        numbers |= self.precision or {}
        known = {name: None if math.isnan(x) else x for name, x in numbers.items()}
        return {"segments": self.how, **known} | ({"AP": None} if self.lacking else {})


class PanopticEvaluator:
    """Counts one process's images; with a `folder` it also writes their ids, as PNGs.

    The PNGs are in `.tmp-` + the folder's name until the last one is written; neither may exist before.
    """

    def __init__(self, dataset: Dataset, how: str, folder: Path | None = None, instances: bool = False):
        self.dataset, self.how, self.folder = dataset, how, folder
        self.new = folder and folder.with_name(f".tmp-{folder.name}")
        self.counts = torch.zeros(len(dataset.classes), 4, dtype=torch.float64)
        self.images, self.entries, self.truth, self.results, self.lacking = [], [], [], [], ""
        try:
            if instances:
                pycocotools("mask")
        except DataError as error:
            self.lacking = str(error)
        self.instances = instances and not self.lacking

    def add(
        self,
        item: Item,
        ids: np.ndarray,
        segments: Sequence,
        instances: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Count one image: ids `(H, W)`, their segments; labels, scores, masks of things that may overlap."""
        self.counts += count(item.ids, item.segments, ids, segments, len(self.counts))
        image_id, (H, W) = self.dataset.image_ids[item.position], ids.shape
        categories, name = self.dataset.categories.ids, item.path.partition("/")[2]
        self.images.append({"id": image_id, "file_name": name, "height": H, "width": W})
        if self.folder is not None:
            png = self.dataset.png(item.position)
            write_ids(ids, place(self.new.parent, f"{self.new.name}/{png}"))
            self.entries.append(annotation(image_id, png, ids, segments, categories))
        if self.instances and instances is not None:
            labels, scores, masks = (x.cpu() for x in instances)
            things = zip(scores.tolist(), labels.tolist(), masks.numpy(), strict=True)
            self.results += coco_results(image_id, things, categories)
            self.truth += coco_truth(image_id, item.ids, item.segments, categories)

    def measure(self, ranks: Ranks) -> PanopticResult:
        """The quality of all processes' images; AP, which takes longer and may fail, is lacking yet."""
        counts = ranks.all_reduce(self.counts).cpu()
        lacking = "AP is lacking: the evaluation ended before it" if self.instances else self.lacking
        return PanopticResult(self.how, Quality(counts, self.dataset.categories.things), None, lacking)

    def finish(self, ranks: Ranks, result: PanopticResult) -> None:
        """Add AP to the result, or why it failed; rank 0 renames the folder, writes the JSON next to it."""
        parts = self.images, self.entries, self.truth, self.results
        images, entries, truth, results = map(ranks.gather_object, parts)
        categories, measured = self.dataset.categories, []
        if self.instances and ranks.is_main:
            try:
                measured = [(mask_precision(images, truth, results, categories), "")]
            except FAULTS as error:
                measured = [(None, f"AP is lacking: {type(error).__name__}: {error}")]
        if self.instances:
            ((result.precision, result.lacking),) = ranks.all_gather_object(measured)
        if self.folder is not None and ranks.is_main:
            os.rename(self.new, self.folder)
            write_annotations(self.folder.with_suffix(".json"), categories, images, entries)
