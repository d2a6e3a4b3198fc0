"""The quality of panoptic predictions: PQ, SQ, RQ, and AP of things.

A segment of the prediction and one of the truth match if both have the same class and

    IoU = |p and t| / (|p| + |t| - |p and t| - |p and void of the truth|) > 1/2,

so that each has at most one partner. Over all images, per class, with TP matches, FP segments of the
prediction and FN of the truth without a partner:

    PQ = sum of IoU / (TP + FP/2 + FN/2) = SQ * RQ,   SQ = sum of IoU / TP,   RQ = TP / (TP + FP/2 + FN/2).

A crowd of the truth is never matched and never FN. A segment of the prediction without a partner is not FP if
more than half of it lies on void and on the crowd of its class. github.com/cocodataset/panopticapi
(evaluation.py at 7bb4655) counts alike but for two things: where nothing occurs, it stops with a division by
zero, ours is NaN; and it, hotcoco and vernier take |t| from the truth's JSON ("area"), ours counts the PNG.

    python -m metrics.quality TRUTH.json PREDICTION.json  # PQ, SQ, RQ of a prediction that any program wrote

Top to bottom: counting, PQ, AP, the command line.
"""

from errors import DataError, Parser, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import contextlib
import io
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from images.instances import pycocotools
from images.panoptic import VOID, Annotations, Categories, Segment, annotation, index, read_annotations, runs


def count(
    truth: np.ndarray, truths: Sequence[Segment], predicted: np.ndarray, predictions: Sequence, K: int
) -> Tensor:
    """One image's `(K, 4)` float64: sum of IoU, TP, FP, FN of each class. Sums of them are `Quality`'s.

    `truth` and `predicted` are maps of ids `(H, W)` with their segments; those of the prediction are anything
    with `id` and `label`. Raises ValueError if its ids are not exactly those of its segments.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"the prediction is {predicted.shape}, but the truth {truth.shape}")
    values, others, lengths = runs(truth, predicted)
    pairs, pair = np.unique(values.astype(np.int64) << 32 | others, return_inverse=True)
    pixels = np.bincount(pair, lengths)  # of each pair of ids that overlap
    values, others = pairs >> 32, pairs & 0xFFFFFFFF
    listed, ids = [s.id for s in predictions], set(others.tolist()) - {VOID}
    if ids != set(listed) or len(listed) != len(set(listed)):
        odd = sorted(ids.symmetric_difference(listed)) or listed
        raise ValueError(f"the ids of the prediction and of its segments differ, such as {odd[0]}")
    # A pair as indices (t, p) of segments; after the listed ones come void and, in the truth alone, what is
    # neither listed nor void. The order is fixed: the last bits of sums of IoU depend on it.
    T, P = len(truths), len(predictions)
    t, p = index(values, truths), index(others, predictions)
    t = np.where(t < 0, np.where(values == VOID, T, T + 1), t)
    p = np.where(p < 0, P, p)
    order = np.lexsort((p, t))
    t, p, pixels = t[order], p[order], pixels[order]

    labels = np.array([s.label for s in truths] + [-2, -2])  # those of no segment match nothing
    predicted_labels = np.array([s.label for s in predictions] + [-1])
    crowd = np.array([s.crowd for s in truths] + [False, False])
    areas, void = np.bincount(p, pixels, P + 1), np.bincount(p, pixels * (t == T), P + 1)
    union = np.bincount(t, pixels, T)[t] + areas[p] - pixels - void[p]
    match = (labels[t] == predicted_labels[p]) & ~crowd[t] & (pixels > 0.5 * union)
    matched, iou = labels[t[match]], pixels[match] / union[match]

    crowd_of = np.full(K, -1)  # each class, the last one as in panopticapi
    crowd_of[labels[crowd]] = np.flatnonzero(crowd)
    excused = void + np.bincount(p, pixels * (t == crowd_of[predicted_labels[p]]), P + 1)
    positive, negative = excused <= 0.5 * areas, ~crowd
    positive[p[match]] = negative[t[match]] = False
    fp, fn = predicted_labels[:P][positive[:P]], labels[:T][negative[:T]]
    columns = [np.bincount(matched, iou, K), *(np.bincount(x, minlength=K) for x in (matched, fp, fn))]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))


GROUPS = ("all", "things", "stuff")


@dataclass
class Quality:
    """PQ, SQ and RQ from counts of any number of images. Fractions are in 0..1."""

    counts: Tensor  # (K, 4) float64: sum of IoU, TP, FP, FN; the sum of `count` over images and processes
    things: Sequence[bool]  # (K,)

    @property
    def classes(self) -> Tensor:
        """`(K, 3)` PQ, SQ, RQ of each class; NaN where it occurs neither in the truth nor the prediction."""
        iou, tp, fp, fn = self.counts.double().unbind(1)
        whole = tp + fp / 2 + fn / 2
        sq = torch.where(whole > 0, iou / tp.clamp(min=1), torch.nan)  # 0 without a match
        return torch.stack([iou / whole, sq, tp / whole], dim=1)

    def mean(self, which: str = "all") -> dict[str, float]:
        """Means over the classes that occur, of "all", "things" or "stuff": PQ, SQ, RQ and how many, n."""
        things = torch.as_tensor(self.things)
        chosen = {"all": things | ~things, "things": things, "stuff": ~things}[which]
        rows = self.classes[chosen.to(self.counts.device)]
        pq, sq, rq = rows.nanmean(0).tolist()
        return {"PQ": pq, "SQ": sq, "RQ": rq, "n": int((~rows[:, 0].isnan()).sum())}

    def rows(self) -> list[tuple[str, str, str, str, int]]:
        """(group, PQ, SQ, RQ, n) of each of GROUPS, in percent; "-" where nothing occurs."""
        means = [(which, *self.mean(which).values()) for which in GROUPS]
        return [(g, *("-" if math.isnan(x) else f"{100 * x:.2f}" for x in row), n) for g, *row, n in means]


def compare(truth: Annotations, folder: Path, predicted: Annotations, predicted_folder: Path) -> Quality:
    """The quality of a written prediction: JSON and PNGs in `predicted_folder`, the truth's in `folder`.

    Images are matched by `image_id`, classes by `category_id`, whatever their order. Raises DataError if the
    prediction lacks an image of the truth, or has a category that the truth lacks or another size.
    """
    labels = {id: k for k, id in enumerate(truth.categories.ids)}
    if unknown := [id for id in predicted.categories.ids if id not in labels]:
        fault = f"has the category_id {unknown[0]}, which {truth.file} lacks"
        raise DataError(f"{predicted.file} {fault}: use the categories of the truth")
    label_of = [labels[id] for id in predicted.categories.ids]
    place = {id: i for i, id in enumerate(predicted.image_ids)}
    counts = torch.zeros(len(truth.categories.ids), 4, dtype=torch.float64)
    for i, id in enumerate(tqdm(truth.image_ids, "comparing", disable=None)):
        if id not in place:
            raise DataError(f"{predicted.file} has no annotation for the image {id!r}: every one needs it")
        j = place[id]
        truths = truth.segments(i)
        others = [s._replace(label=label_of[s.label]) for s in predicted.segments(j)]
        ids, other = truth.ids(i, folder), predicted.ids(j, predicted_folder)
        try:
            counts += count(ids, truths, other, others, len(counts))
        except ValueError as error:
            raise DataError(f"{predicted_folder / predicted.pngs[j]}: {error}") from None
    return Quality(counts, truth.categories.things)


def coco_results(
    image_id: int | str, instances: Iterable[tuple[float, int, np.ndarray]], category_ids: Sequence[int]
) -> list[dict]:
    """An image's instances (score, label, mask `(H, W)` bool), which may overlap, as COCO's results."""
    results = []
    for score, label, mask in instances:
        scored = {"category_id": int(category_ids[label]), "score": float(score)}
        encoded = pycocotools("mask").encode(np.asfortranarray(mask, np.uint8))
        results.append({"image_id": image_id, "segmentation": as_json(encoded)} | scored)
    return results


def coco_truth(
    image_id: int | str, ids: np.ndarray, segments: Sequence[Segment], category_ids: Sequence[int]
) -> list[dict]:
    """An image's things, crowds too, in COCO's format of instances, from its panoptic map."""
    things = [s for s in segments if s.thing]
    infos = annotation(image_id, "", ids, things, category_ids)["segments_info"]
    # A mask of COCO is the lengths of runs along the columns, outside and inside in turn: here of all things.
    values, lengths = runs(ids.T)
    place, ends = index(values, things), lengths.cumsum()
    first = np.bincount(place + 1, minlength=len(things) + 1).cumsum()[:-1]
    for info, part in zip(infos, np.split(place.argsort(kind="stable"), first)[1:], strict=True):
        edges = np.stack([ends[part] - lengths[part], ends[part]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=ids.size)
        mask = {"size": [*ids.shape], "counts": counts if counts[-1] else counts[:-1]}
        encoded = pycocotools("mask").frPyObjects(mask, *ids.shape)
        info |= {"image_id": image_id, "segmentation": as_json(encoded)}
    return infos


def as_json(encoded: dict) -> dict:
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def mask_precision(
    images: Sequence[dict], truth: Iterable[dict], results: Sequence[dict], categories: Categories
) -> dict[str, float]:
    """AP of the things as COCO defines it: mean over classes and IoU 0.50, 0.55, ..., 0.95; AP50, AP75, and
    APs, APm, APl by the things' areas. NaN where the truth has none.

    `images` {"id", "height", "width"}; `truth` from `coco_truth`, or the annotations of COCO's own
    instances_val2017.json, on which published numbers rest (there things may overlap); `results` from
    `coco_results`, of all processes together. At most 100 per image count.
    """
    coco, cocoeval = pycocotools("coco"), pycocotools("cocoeval")
    number = {entry["id"]: i for i, entry in enumerate(images)}  # pycocotools sorts: no mix of int and str
    dataset = {"info": {}, "images": [{**entry, "id": number[entry["id"]]} for entry in images]}
    dataset["categories"] = [c for c in categories.as_json() if c["isthing"]]
    known = (entry | {"image_id": number[id]} for entry in truth if (id := entry["image_id"]) in number)
    # From 1: pycocotools takes a match with the annotation 0 for none.
    dataset["annotations"] = [entry | {"id": i} for i, entry in enumerate(known, 1)]
    copies = [entry | {"image_id": number[entry["image_id"]]} for entry in results]  # it writes into them
    if not results:  # pycocotools does not take an empty list
        return dict.fromkeys(AP, 0.0 if any(not x["iscrowd"] for x in dataset["annotations"]) else math.nan)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = dataset
        reference.createIndex()
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(copies), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = evaluation.stats[: len(AP)].tolist()
    return {name: math.nan if x < 0 else x for name, x in zip(AP, values, strict=True)}


AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the quality of a written prediction, in percent; 2 if it cannot be compared."""
    description = "The panoptic quality of a prediction in COCO's format, as panopticapi counts."
    parser = Parser(prog="python -m metrics.quality", description=description)
    parser.add_argument("truth", metavar="TRUTH.json", help="a panoptic JSON, such as panoptic_val2017.json")
    parser.add_argument("prediction", metavar="PREDICTION.json", help="such as the panoptic.json of eval.py")
    pngs = "the folder of its PNGs (default: that of its name, without .json)"
    parser.add_argument("--truth-folder", metavar="DIR", help=pngs)
    parser.add_argument("--prediction-folder", metavar="DIR", help=pngs)
    options = parser.parse_args(argv)

    def work() -> None:
        truth = read_annotations(options.truth)
        predicted = read_annotations(options.prediction, truth)
        folder = png_folder(truth, options.truth_folder, "--truth-folder")
        other = png_folder(predicted, options.prediction_folder, "--prediction-folder")
        quality = compare(truth, folder, predicted, other)
        print("            PQ      SQ      RQ  classes")
        for which, *numbers, n in quality.rows():
            print(f"{which:6}{''.join(f'{x:>8}' for x in numbers)}{n:>9}")

    return run_command("metrics.quality", work)


def png_folder(annotations: Annotations, folder: str | None, flag: str) -> Path:
    """The folder of a JSON's PNGs: the given one, or that of the JSON's name."""
    path = Path(folder) if folder else annotations.file.with_suffix("")
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: give that of the PNGs of {annotations.file} with {flag}")
    return path


if __name__ == "__main__":
    sys.exit(main())
