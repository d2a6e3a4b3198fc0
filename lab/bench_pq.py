"""Compare PQ's speed and memory with panopticapi on one core, from files to numbers, and print a table.

    python -m lab.bench_pq  # 3 x 500 drawn images of 480x640

Truth and prediction are the cells of 20, 200 and 2,000 random points, in sets of 25 images. Both programs
read the same files and must find the same PQ; then they take turns. The table has CPU seconds, the median of
the sets' ratios ours / peer, and the peak memory of one set in a process of its own.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt

from errors import DataError, run_command
from images.panoptic import Categories, Segment, annotation, read_annotations, write_annotations, write_ids
from lab.bench_peers import alone, cpu_seconds, in_turns, memory, ratio, table, watch_peak
from mask2former import COCO_THINGS
from metrics.quality import GROUPS, compare

SIZE, SET, SEGMENTS, K = (480, 640), 25, (20, 200, 2000), len(COCO_THINGS)


def ours(folder: Path) -> list[float]:
    """PQ of all classes, of things and of stuff, as `python -m metrics.quality` finds it."""
    truth = read_annotations(folder / "truth.json")
    predicted = read_annotations(folder / "prediction.json", truth)
    quality = compare(truth, folder / "truth", predicted, folder / "prediction")
    return [quality.mean(which)["PQ"] for which in GROUPS]


def peer(folder: Path) -> list[float]:
    """The same by panopticapi, as its `pq_compute` without processes."""
    from panopticapi.evaluation import pq_compute_single_core

    truth, predicted = (json.loads((folder / f"{x}.json").read_bytes()) for x in ("truth", "prediction"))
    categories = {x["id"]: x for x in truth["categories"]}
    pairs = [*zip(truth["annotations"], predicted["annotations"], strict=True)]  # `draw` wrote one order
    with contextlib.redirect_stdout(None):
        pq = pq_compute_single_core(0, pairs, str(folder / "truth"), str(folder / "prediction"), categories)
    return [pq.pq_average(categories, isthing=which)[0]["pq"] for which in (None, True, False)]


def draw(folder: Path, images: int, n: int, rng: np.random.Generator) -> Path:
    """Write a set: a truth with void and crowds; a prediction that is moved, some classes of it wrong."""
    palette, entries = np.zeros((K, 3), np.uint8), {"truth": [], "prediction": []}
    categories = Categories([*map(str, range(K))], [*range(K)], palette, np.array(COCO_THINGS))
    for i in range(images):
        points = np.zeros(SIZE, np.int32)
        points.flat[rng.choice(points.size, n, replace=False)] = 1 + rng.choice(2**24 - 1, n, replace=False)
        cells = points[tuple(distance_transform_edt(points < 1, return_distances=False, return_indices=True))]
        labels = dict(zip(np.unique(cells).tolist(), rng.integers(0, K, n).tolist(), strict=True))
        void, crowds, wrong = (rng.choice([*labels], n // 20).tolist() for _ in range(3))
        changed = labels | {id: (labels[id] + 1) % K for id in wrong}
        maps = np.where(np.isin(cells, void), 0, cells), np.roll(cells, (1, 2), axis=(0, 1))
        for name, ids, label, groups in zip(entries, maps, (labels, changed), (crowds, []), strict=True):
            present = np.unique(ids[ids > 0]).tolist()
            segments = [Segment(x, label[x], COCO_THINGS[label[x]], x in groups) for x in present]
            write_ids(ids, folder / name / f"{i}.png")
            entries[name].append(annotation(i, f"{i}.png", ids, segments, categories.ids))
    files = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in range(images)]
    for name, annotations in entries.items():
        write_annotations(folder / f"{name}.json", categories, files, annotations)
    return folder


def peak(side: Callable, folder: Path, warm: Path) -> float:
    """MiB that a run takes beyond the program, which a smaller run has loaded."""
    side(warm)
    watch_peak()
    before = memory("VmRSS")
    side(folder)
    return memory("VmHWM") - before


def rows(images: int = 500) -> list[dict]:
    """A row for each number of segments. Raises DataError without panopticapi, or where the two differ."""
    if find_spec("panopticapi") is None:
        peer_at = "git+https://github.com/cocodataset/panopticapi@7bb4655"
        raise DataError(f"PQ's bench needs panopticapi: pip install {peer_at}")
    sides, rng, found = (ours, peer), np.random.default_rng(0), []
    for n in SEGMENTS:
        with tempfile.TemporaryDirectory() as root:
            sets = [draw(Path(root, str(i)), min(SET, images - i), n, rng) for i in range(0, images, SET)]
            warm = draw(Path(root, "warm"), 1, n, rng)
            for folder in sets:
                if not np.allclose(ours(folder), peer(folder), rtol=0, atol=1e-12):
                    raise DataError(f"PQ of {n} segments is {ours(folder)}, by panopticapi {peer(folder)}")
            runs = (lambda i, x=x, sets=sets: cpu_seconds(x, sets[i]) for x in sides)
            mine, theirs = in_turns(len(sets), *runs)
            row = {"case": f"PQ of {images} images", "segments": n, "ours s": sum(mine)}
            row |= {"peer s": sum(theirs), "ratio": ratio(mine, theirs)}
            found.append(row | {f"{x.__name__} MiB": alone(peak, x, sets[0], warm) for x in sides})
    return found


if __name__ == "__main__":
    sys.exit(run_command("bench_pq", lambda: print(table(rows()))))
