"""Every command starts from any folder: scripts by their path, modules with PYTHONPATH."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "eval.py", "predict.py", "page.py")
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


def start(argv: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run Python with `argv` in `folder`, which is not the project's."""
    command, path = [sys.executable, *argv], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=path, check=False, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", [*SCRIPTS, *MODULES])
def test_prints_its_help_from_another_folder(command, tmp_path):
    argv = [str(ROOT / command)] if command in SCRIPTS else ["-m", command]
    result = start([*argv, "--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert not [*tmp_path.iterdir()], "--help wrote a file"


def test_refuses_bad_input_in_one_sentence_from_another_folder(tmp_path):
    """The wrapper in errors.py: exit code 2, one line on stderr, no traceback."""
    result = start(["-m", "metrics.quality", "truth.json", "prediction.json"], tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "truth.json" in result.stderr and "Traceback" not in result.stderr
