"""bench_loader.py: both rows in small, and the peer's absence in one sentence."""

import pytest

from errors import TadaError
from lab import bench_loader


def test_both_sides_are_measured():
    pytest.importorskip("cv2")
    rows = bench_loader.rows(images=10, pairs=20)
    assert [row["case"] for row in rows] == ["loader, a 512x512 crop", "start, 20 pairs"]
    for row in rows:
        assert row["ratio"] == row["ours s"] / row["peer s"] > 0


def test_without_opencv_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "find_spec", lambda name: None)
    with pytest.raises(TadaError, match="pip install opencv-python-headless"):
        bench_loader.crops(tmp_path, 10)
