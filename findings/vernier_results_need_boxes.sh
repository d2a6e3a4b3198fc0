#!/bin/sh
# vernier 0.5.4: the evaluator of masks refuses results without `bbox`, which COCO's format of segmentation
# results does not have (cocodataset.org/#format-results: image_id, category_id, segmentation, score). The
# value does not matter: a box of nothing gives the same six numbers as the right one, those of pycocotools
# 2.0.11 and hotcoco 1.3.0, which take the results as they are.
# Who gives segmentation results to vernier, as our eval.py writes them, should add `bbox: [0, 0, 0, 0]`.
#
# Output seen:
#   vernier without bbox: ValueError: json: missing field `bbox` at line 1 column 163
#   vernier with the mask's box: [0.9, 1.0, 1.0, 0.9, -1.0, -1.0]
#   vernier with a box of nothing: [0.9, 1.0, 1.0, 0.9, -1.0, -1.0]
#   pycocotools: [0.9, 1.0, 1.0, 0.9, -1.0, -1.0]
#   hotcoco: [0.9, 1.0, 1.0, 0.9, -1.0, -1.0]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q vernier==0.5.4 hotcoco==1.3.0 pycocotools==2.0.11 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import contextlib
import io
import json

import hotcoco
import numpy as np
import vernier.instance as instance
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def encoded(top: int) -> dict:
    """A rectangle of 30 columns down to row 20, in COCO's run lengths."""
    pixels = np.zeros((40, 60), np.uint8, order="F")
    pixels[top:20, 10:40] = 1
    return {"size": [40, 60], "counts": mask.encode(pixels)["counts"].decode()}


known = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 450, "bbox": [10, 5, 30, 15]}
truth = {"images": [{"id": 1, "height": 40, "width": 60}], "categories": [{"id": 1, "name": "boat"}]}
truth["annotations"] = [known | {"segmentation": encoded(5)}]
result = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": encoded(6)}


def by_vernier(**more: list[int]) -> list[float]:
    evaluator = instance.Evaluator(iou=instance.Segm(), parity_mode="strict")
    return evaluator.evaluate(json.dumps(truth).encode(), json.dumps([result | more]).encode()).stats[:6]


def by_coco(package: type, evaluation: type, load: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = evaluation(package, getattr(package, load)([dict(result)]), "segm")
        evaluator.evaluate(), evaluator.accumulate(), evaluator.summarize()
    return [*evaluator.stats[:6]]


official = COCO()
official.dataset = truth
with contextlib.redirect_stdout(io.StringIO()):
    official.createIndex()
seen = {
    "vernier with the mask's box": by_vernier(bbox=[10, 6, 30, 14]),
    "vernier with a box of nothing": by_vernier(bbox=[0, 0, 0, 0]),
    "pycocotools": by_coco(official, COCOeval, "loadRes"),
    "hotcoco": by_coco(hotcoco.COCO(truth), hotcoco.COCOeval, "load_res"),
}
try:
    print("vernier without bbox:", by_vernier())
    refused = False
except ValueError as error:
    print("vernier without bbox: ValueError:", error)
    refused = "missing field `bbox`" in str(error)
for name, numbers in seen.items():
    print(f"{name}:", [round(float(x), 6) for x in numbers])
assert refused and len({tuple(map(float, x)) for x in seen.values()}) == 1, "this has changed"
PYTHON
