"""bench_loader.py: both rows in small, and the peer's absence in one sentence."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from errors import TadaError
from lab import bench_loader


def test_both_sides_are_measured(monkeypatch):
    """In this process, with a peer that is none: OpenCV is no requirement; the older code is today's."""
    samples = []

    def peer(image, labels, rng):
        samples.append((image.suffix, labels.suffix))
        return np.zeros((3, 512, 512), np.uint8), np.zeros((512, 512), np.uint8)

    def link(folder):
        folder.symlink_to(bench_loader.ROOT)
        return folder

    monkeypatch.setattr(bench_loader, "Alone", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(bench_loader, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_loader, "peer_sample", peer)
    monkeypatch.setattr(bench_loader, "check_out", link)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    rows = bench_loader.rows(images=10, pairs=20)
    assert samples == [(".jpg", ".png")] * 20, "ten to warm up, ten that count"
    assert [row["case"] for row in rows] == ["loader, a 512x512 crop", "start, 20 pairs"]
    assert rows[0]["ratio"] > 1, "the peer does nothing"
    assert rows[1]["ratio"] == rows[1]["ours s"] / rows[1]["peer s"] > 0


def test_without_opencv_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "find_spec", lambda name: None)
    with pytest.raises(TadaError, match="pip install opencv-python-headless"):
        bench_loader.crops(tmp_path, 10)
