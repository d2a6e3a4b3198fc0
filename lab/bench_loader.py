"""Compare the loader with mmsegmentation's by OpenCV, and the start of a run with that of commit 82e1c58.

    python -m lab.bench_loader  # needs opencv-python-headless, and that commit in the checkout's history

CPU seconds, medians of runs in turns (ours, peer, peer, ours, ...). A crop: decode a noisy 683x512 JPEG and
its labels, resize, crop to 512x512, mirror, distort the colours; means of 10, one thread, and each side in a
process of its own, as a loader's worker is: freed memory of the one would spare the other its page faults.
A start: list and check 120,000 pairs and hash their names, each time in a new process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor as Alone
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from data import open_dataset
from errors import TadaError, run_command
from lab.bench_before import ROOT, check_out
from lab.bench_peers import in_turns, table
from loading.augment import Augment
from loading.stream import TrainStream

SPAWN = get_context("spawn")
CROP, LINKS = 512, 30_000  # files that share one inode; ext4 allows 65,000
START = """import hashlib, os, sys, time
from data import open_dataset
try:
    from loading.check import check
except ImportError:  # before
    from data import check
start = time.process_time()
dataset = open_dataset("folder", sys.argv[1], "train")
check(dataset)
paths = getattr(dataset, "paths", None) or [dataset.path(i) for i in range(len(dataset))]  # before
names = os.fsencode("\\n".join(paths))
print(hashlib.sha256(names).hexdigest(), time.process_time() - start)"""


def rows(images: int = 200, pairs: int = 120_000) -> list[dict]:
    """Measure `images` crops, a multiple of 10, and the start with `pairs` pairs of files."""
    with tempfile.TemporaryDirectory() as folder:
        return [crops(Path(folder, "crops"), images), starts(Path(folder, "start"), pairs)]


def compare(case: str, runs: int, *sides: Callable[[int], float]) -> dict:
    """The medians of the seconds that ours and the peer return for 0..runs-1."""
    ours, peer = map(median, in_turns(runs, *sides))
    return {"case": case, "ours s": ours, "peer s": peer, "ratio": ours / peer}


def folders(root: Path) -> list[Path]:
    """The new folders of a data set's images and labels."""
    parts = [root / part / "train" for part in ("images", "labels")]
    for part in parts:
        part.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(map(str, range(20))))
    return parts


def crops(root: Path, images: int) -> dict:
    if find_spec("cv2") is None:
        raise TadaError("the loader's peer is OpenCV: pip install opencv-python-headless")
    (image, label), rng = folders(root), np.random.default_rng(0)
    for i in range(images):  # smooth colours with a photograph's noise, and patches of 20 classes
        x = Image.fromarray(rng.integers(0, 256, (16, 21, 3), np.uint8)).resize((683, 512))
        x = (np.asarray(x) + rng.integers(-12, 13, (512, 683, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(x).save(image / f"{i:06}.jpg", quality=95)
        y = Image.fromarray(rng.integers(0, 20, (8, 11), np.uint8))
        y.resize((683, 512), Image.Resampling.NEAREST).save(label / f"{i:06}.png")
    with Alone(1, SPAWN) as ours, Alone(1, SPAWN) as peer:
        sides = [lambda i, p=p: p.submit(ten, root, p is peer, i).result() for p in (ours, peer)]
        compare("what only a first run needs", 1, *sides)
        return compare("loader, a 512x512 crop", images // 10, *sides)


def ten(root: Path, peer: bool, i: int) -> float:
    """The mean seconds of samples 10 i to 10 i + 9, of ours or the peer."""
    torch.set_num_threads(1)
    dataset, rng = open_dataset("folder", root, "train"), np.random.default_rng(i)
    stream = TrainStream(dataset, Augment((CROP, CROP), short=CROP, long=4 * CROP), batch=1, seed=0)
    start = time.process_time()
    for j in range(10 * i, 10 * i + 10):
        item = peer_sample(*map(Path, dataset.names(stream.order(j)[1])), rng) if peer else stream[j]
        assert item[0].shape == (3, CROP, CROP)
    return (time.process_time() - start) / 10


def peer_sample(image: Path, labels: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """mmsegmentation's LoadImageFromFile, LoadAnnotations, RandomResize, RandomCrop, RandomFlip and
    PhotoMetricDistortion (mmseg/datasets/transforms) without mmcv; then padding, and channels first.
    """

    import cv2

    cv2.setNumThreads(1)

    def convert(x: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    x, y = cv2.imdecode(np.fromfile(image, np.uint8), 1), cv2.imdecode(np.fromfile(labels, np.uint8), -1)
    scale = rng.uniform(0.5, 2) * min(4 * CROP / max(y.shape), CROP / min(y.shape))
    size = int(y.shape[1] * scale + 0.5), int(y.shape[0] * scale + 0.5)
    x, y = cv2.resize(x, size), cv2.resize(y, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(11):
        top, left = (rng.integers(max(side - CROP, 0) + 1) for side in y.shape)
        values, counts = np.unique(y[top : top + CROP, left : left + CROP], return_counts=True)
        counts = counts[values != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    x, y = (part[top : top + CROP, left : left + CROP] for part in (x, y))
    mirror, brightness, early, contrast, saturation, hue = rng.random(6) < 0.5
    x, y = (np.flip(x, 1), np.flip(y, 1)) if mirror else (x, y)
    x = convert(x, beta=rng.uniform(-32, 32)) if brightness else x
    x = convert(x, alpha=rng.uniform(0.5, 1.5)) if contrast and early else x
    for changed, channel in ((saturation, 1), (hue, 0)):
        if changed:
            x = cv2.cvtColor(x, cv2.COLOR_BGR2HSV)
            z, turn = x[..., channel], rng.integers(-18, 18)
            z[:] = convert(z, rng.uniform(0.5, 1.5)) if channel else (z.astype(int) + turn) % 180
            x = cv2.cvtColor(x, cv2.COLOR_HSV2BGR)
    x = convert(x, alpha=rng.uniform(0.5, 1.5)) if contrast and not early else x
    sides = 0, CROP - y.shape[0], 0, CROP - y.shape[1], cv2.BORDER_CONSTANT
    x, y = cv2.copyMakeBorder(x, *sides, value=0), cv2.copyMakeBorder(y, *sides, value=255)
    return np.ascontiguousarray(x.transpose(2, 0, 1)), y


def starts(root: Path, pairs: int) -> dict:
    parts, before, hashes = folders(root), check_out(root / "before"), set()
    for i in range(pairs):
        for part, suffix, mode in zip(parts, ("jpg", "png"), ("RGB", "L"), strict=True):
            file = part / f"{i:012}.{suffix}"
            if i % LINKS == 0:
                Image.fromarray(np.eye(8, dtype=np.uint8)).convert(mode).save(file)  # two classes
            else:
                os.link(part / f"{i - i % LINKS:012}.{suffix}", file)

    def start(folder: Path) -> float:
        line = [sys.executable, "-c", START, root]
        found = subprocess.run(line, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        hashes.add(found[0])
        return float(found[1])

    row = compare(f"start, {pairs:,} pairs", 6, lambda i: start(ROOT), lambda i: start(before))
    assert len(hashes) == 1, hashes  # both list the same names
    return row


if __name__ == "__main__":
    sys.exit(run_command("bench_loader", lambda: print(table(rows()))))
