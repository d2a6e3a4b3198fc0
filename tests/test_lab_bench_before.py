"""lab/bench_before.py: the same commands in two checkouts, in turns."""

import shutil

import pytest

from errors import TadaError
from lab import bench_before


@pytest.mark.slow
def test_every_command_is_measured(monkeypatch, capsys):
    """Against this checkout itself; the ratios are about 1, and the whole table is printed."""

    def link(folder):
        folder.symlink_to(bench_before.ROOT)
        return folder

    monkeypatch.setattr(bench_before, "check_out", link)
    monkeypatch.setattr(bench_before, "PHOTO", (400, 300))
    monkeypatch.setattr(bench_before, "LONG", 6)
    assert bench_before.main(["--images", "2", "--photos", "1", "--rounds", "1"]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].split(",")[0].strip() for row in table[2:]] == [
        "train.py --help",
        "train.py",
        "eval.py",
        "predict.py",
    ]
    for _, now, before, ratio in table[2:]:
        assert float(now) > 0 and float(before) > 0 and float(ratio) > 0.2


def test_a_checkout_without_that_commit_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_before, "ROOT", shutil.copytree(bench_before.ROOT / "labels", tmp_path / "x"))
    with pytest.raises(TadaError, match="lacks commit 82e1c58: fetch all of it"):
        bench_before.check_out(tmp_path / "before")
