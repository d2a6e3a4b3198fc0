"""bench_pq.py: both programs count the same images, and a wrong count gets no row."""

import pytest

from errors import DataError
from images.panoptic import read_annotations
from lab import bench_pq
from metrics.quality import GROUPS, compare


def test_rows_of_a_few_images(monkeypatch):
    """With a peer that is ours again: panopticapi is no requirement. Its own counts are in the test data."""

    def peer(folder):
        truth = read_annotations(folder / "truth.json")
        predicted = read_annotations(folder / "prediction.json", truth)
        quality = compare(truth, folder / "truth", predicted, folder / "prediction")
        return [quality.mean(which)["PQ"] for which in GROUPS]

    monkeypatch.setattr(bench_pq, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_pq, "peer", peer)
    monkeypatch.setattr(bench_pq, "SIZE", (96, 128))
    monkeypatch.setattr(bench_pq, "SEGMENTS", (20, 60))
    monkeypatch.setattr(bench_pq, "SET", 2)
    monkeypatch.setattr(bench_pq, "alone", lambda function, *arguments: function(*arguments))
    table = bench_pq.rows(3)
    assert [(row["case"], row["segments"]) for row in table] == [("PQ of 3 images", n) for n in (20, 60)]
    names = ["case", "segments", "ours s", "peer s", "ratio", "ours MiB", "peer MiB"]
    assert all([*row] == names and row["ratio"] > 0 for row in table)

    def worse(*arguments):
        quality = compare(*arguments)
        quality.counts[:, 2] += 1
        return quality

    monkeypatch.setattr(bench_pq, "compare", worse)
    with pytest.raises(DataError, match="PQ of 20 segments is .*, by panopticapi"):
        bench_pq.rows(1)


def test_without_panopticapi_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(bench_pq, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="PQ's bench needs panopticapi: pip install git.*@7bb4655"):
        bench_pq.rows()
