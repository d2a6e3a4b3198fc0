"""Runs and checkpoints of commit 82e1c58 load and resume with today's commands, with the numbers of then.

tests/fixtures/run-82e1c58 was written by that commit. `run.tar.xz`: a run of train.py on `folder` (seven
scenes of 96 x 72 pixels), stopped by SIGTERM at step 51 of 60. expected.json: the log of its own
resumed run, and its evaluation of step 51. The two PNG files: its predictions for `folder/images/val/8.png`.
mask2former.safetensors: a model with random, rounded weights, written by save_model. So that the run
compresses, all but 8 channels of its decoder were set to 0 before the first step; training leaves them there.
"""

import json
import lzma
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import predict
import train
from lab import ablate

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "run-82e1c58"
FOLDER = FIXTURE / "folder"
IMAGE = FOLDER / "images" / "val" / "8.png"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
FLAGS = (
    "--dataset folder --model tiny --weights weights/tiny --freeze-unet --condition none --decoder fpn "
    "--crop 64 --short 64 --batch 2 --iterations 60 --save-every 30 --eval-every 30 --log-every 1 "
    "--workers 0 --threads 1 --dropout 0.1 --lr 1e-2"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """The run names its weights as weights/tiny."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(tmp_path) -> Path:
    """A copy of the run, stopped after step 51."""
    with tarfile.open(FIXTURE / "run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    assert os.readlink(tmp_path / "run" / "last") == "step-000051"
    return tmp_path / "run"


@pytest.fixture
def mask2former(tmp_path) -> Path:
    file = tmp_path / "mask2former.safetensors"
    file.write_bytes(lzma.decompress((FIXTURE / "mask2former.safetensors.xz").read_bytes()))
    return file


def resume(run: Path) -> int:
    return train.main([*FLAGS.split(), "--data", str(FOLDER), "--run", str(run)])


def assert_resumes(run: Path) -> None:
    """The losses of the last steps are those of then; rounding of another processor may grow to 1e-3."""
    assert resume(run) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [line for line in log if line["step"] > 51]
    assert [line["step"] for line in log] == [line["step"] for line in EXPECTED["resumed_log"]]
    for line, expected in zip(log, EXPECTED["resumed_log"], strict=True):
        if "val" in expected:
            assert line["val"] == pytest.approx(expected["val"], abs=2e-3)
        else:
            assert line["lr"] == pytest.approx(expected["lr"], rel=1e-12)
            tolerance = 1e-5 if line["step"] == 52 else 1e-3
            assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance)


def assert_same_pixels(file: Path, expected: Path) -> None:
    """At most 0.1 % of the pixels differ: another processor may round a tie the other way."""
    ours, theirs = np.asarray(Image.open(file)), np.asarray(Image.open(expected))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours != theirs).mean() <= 1e-3


def test_a_run_resumes_with_the_numbers_of_then(run):
    assert_resumes(run)


def test_a_flag_absent_from_the_configuration_means_its_default(run):
    """Flags that came after a run began; here two that are at their defaults in it."""
    file = run / "config.json"
    config = json.loads(file.read_text())
    for name in ("checkpoint_activations", "adapter_start"):
        del config["options"][name]
    file.write_text(json.dumps(config))
    assert_resumes(run)


def test_an_evaluation_gives_the_numbers_of_then(run, tmp_path):
    step, out = run / "step-000051", tmp_path / "evaluation"
    assert evaluation.main([str(step), "--data", str(FOLDER), "--workers", "0", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    for name, value in EXPECTED["evaluation_of_step_51"].items():
        assert result[name] == pytest.approx(value, abs=1e-3), name


def test_a_prediction_is_that_of_then(run, tmp_path):
    assert predict.main([str(run / "step-000051"), str(IMAGE), "--out", str(tmp_path / "out")]) == 0
    assert_same_pixels(tmp_path / "out" / "8.png", FIXTURE / "prediction.png")


def test_a_mask2former_checkpoint_predicts_as_then(mask2former, tmp_path):
    """Its configuration has the setting `pixel_decoder`, at the default."""
    with safe_open(mask2former, "pt") as file:
        assert json.loads(file.metadata()["tada"])["config"]["pixel_decoder"] == "deformable"
    out = tmp_path / "out"
    command = [str(mask2former), str(IMAGE), "--out", str(out), "--score", "0", "--overlap", "0.3"]
    assert predict.main(command) == 0
    assert_same_pixels(out / "8.png", FIXTURE / "prediction-mask2former.png")
    segments = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])["segments"]
    assert len(segments) == len(EXPECTED["segments"]) > 0


def test_a_removed_setting_with_another_value_is_refused_by_name(mask2former, tmp_path, capsys):
    with safe_open(mask2former, "pt") as file:
        about = json.loads(file.metadata()["tada"])
    about["config"]["pixel_decoder"] = "fpn"
    other = tmp_path / "other.safetensors"
    save_file(load_file(mask2former), other, metadata={"tada": json.dumps(about, sort_keys=True)})
    assert predict.main([str(other), str(IMAGE), "--out", str(tmp_path / "out")]) == 2
    message = (
        "other.safetensors has pixel_decoder 'fpn', only 'deformable' is still supported: use TADA 0.1.0"
    )
    assert message in capsys.readouterr().err


def test_the_committed_ablation_record_is_read(tmp_path, capsys):
    record = tmp_path / "ablation.jsonl"
    shutil.copy(ROOT / "weights" / "tiny" / "ablation.jsonl", record)
    assert ablate.main(["--report", str(record)]) == 0
    printed = capsys.readouterr().out
    assert "oracle" in printed and "mIoU" in printed
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert rows and not any(isinstance(x, float) and math.isnan(x) for row in rows for x in row.values())
