"""Every command starts from any folder: scripts by their path, modules with PYTHONPATH."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "eval.py", "predict.py")
MODULES = (
    "images.scenes",
    "lab.ablate",
    "lab.bench",
    "lab.draw",
    "lab.evidence",
    "lab.pretrain",
    "metrics.quality",
    "weights.fetch",
)


@pytest.mark.parametrize("command", [*SCRIPTS, *MODULES])
def test_prints_its_help_from_another_folder(command, tmp_path):
    argv = [str(ROOT / command)] if command in SCRIPTS else ["-m", command]
    result = subprocess.run(
        [sys.executable, *argv, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert not [*tmp_path.iterdir()], "--help wrote a file"


def test_refuses_bad_input_in_one_sentence_from_another_folder(tmp_path):
    """The wrapper in errors.py: exit code 2, one line on stderr, no traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "metrics.quality", "truth.json", "prediction.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "truth.json" in result.stderr and "Traceback" not in result.stderr
