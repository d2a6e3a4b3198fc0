"""Every command starts from any folder: scripts by their path, modules with PYTHONPATH. What all of them do
with Ctrl-C, with flags of several values, with weights beside the code.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import predict
import tag
import train
from run.checkpoint import read_model

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "eval.py", "predict.py", "tag.py", "page.py")
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


@pytest.mark.parametrize("command", [*SCRIPTS, "lab.draw", "metrics.quality"])
def test_ctrl_c_during_the_imports_ends_quietly(command):
    """When numpy begins to be imported; SIGINT ends the process, which a shell reports as 130."""
    argv = [str(ROOT / command)] if command in SCRIPTS else ["-m", command]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.rstrip().endswith(" numpy.version"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest, rest[-300:]


@pytest.mark.parametrize(
    ("parse", "line", "inputs"),
    [
        (predict.parse, "--scales 1 1.5 RUN a.jpg b.jpg", ["a.jpg", "b.jpg"]),
        (predict.parse, "RUN --scales 1 1.5 a.jpg --flip b.jpg", ["a.jpg", "b.jpg"]),
        (evaluation.parse, "--scales 1 1.5 --window 64 64 --stride 32 RUN", None),
        (tag.parse, "--by ram --out tags.jsonl --split train photos", ["photos"]),
    ],
)
def test_images_may_follow_flags_of_several_values(parse, line, inputs):
    options = parse(line.split())
    assert getattr(options, "checkpoint", "RUN") == "RUN" and getattr(options, "inputs", None) == inputs


def test_the_tiny_prior_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    """Train, evaluate and predict where no weights/ is; the run names its weights as everywhere."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(f"set/images/{split}/x.jpg")
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(f"set/labels/{split}/x.png")
    Path("set/classes.txt").write_text("sea\nboat\n")
    own = "--dataset folder --data set --model tiny --iterations 1 --batch 1 --workers 0 --run run"
    assert train.main([*own.split(), "--threads", "1", "--device", "cpu"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluation.main(["../run", "--workers", "0", "--device", "cpu"]) == 0
    assert predict.main(["--scales", "1", "1.5", "../run", "../set/images/val/x.jpg", "--device", "cpu"]) == 0
    assert Image.open("predictions/x.png").size == (64, 64)
    assert read_model("../run").config.weights == "weights/tiny"
    options = json.loads(Path("../run/config.json").read_text())["options"]
    assert (options["weights"], options["device"]) == ("weights/tiny", "cpu")
    assert "weights.fetch" not in capsys.readouterr().err
