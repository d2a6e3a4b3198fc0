"""lab/bench_before.py: the same commands in two checkouts, in turns."""

import shutil

import pytest

import eval
import predict
import run.options
from errors import TadaError
from lab import bench_before


def test_every_command_is_measured(monkeypatch):
    """Ours and the older one in turns, each with flags that its parser takes; of train.py a difference."""
    parsers = {"train.py": run.options.parse, "eval.py": eval.parse, "predict.py": predict.parse}
    calls = []

    def measure(folder, *command):
        calls.append((folder.name, command))
        if "--help" not in command:
            parsers[command[0]](command[1:])
        return (float("44" in command) * 8 + 1) * (2 if folder.name == "before" else 1), 5.0

    monkeypatch.setattr(bench_before, "check_out", lambda folder: folder)
    monkeypatch.setattr(bench_before, "run", measure)
    monkeypatch.setattr(bench_before, "PHOTO", (40, 30))
    rows = bench_before.rows(images=2, photos=1, rounds=2)
    assert bench_before.table(rows).splitlines() == [
        "| case | now | before | ratio |",
        "|---|---|---|---|",
        "| train.py --help, CPU s | 1.00 | 2.00 | 0.50 |",
        "| train.py, tiny, CPU s a step | 0.20 | 0.40 | 0.50 |",
        "| eval.py, 2 drawn images, CPU s | 1.00 | 2.00 | 0.50 |",
        "| predict.py, 1 photographs of 12 megapixels, s | 5.00 | 5.00 | 1.00 |",
    ]
    ours = bench_before.ROOT.name
    assert [name for name, _ in calls[1:5]] == [ours, "before", "before", ours]


def test_a_checkout_without_that_commit_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_before, "ROOT", shutil.copytree(bench_before.ROOT / "labels", tmp_path / "x"))
    with pytest.raises(TadaError, match="lacks commit 82e1c58: fetch all of it"):
        bench_before.check_out(tmp_path / "before")
