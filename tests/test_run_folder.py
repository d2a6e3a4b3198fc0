"""run/folder.py: the lock, the log, and whether a run may resume with these settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from errors import RunError
from model import TadaConfig
from run.checkpoint import step_name, write_step
from run.folder import Run, commit, fingerprint, open_run
from run.ranks import Ranks

ROOT = Path(__file__).parents[1]
HERE = Ranks(0, 1, torch.device("cpu"))


def test_a_full_disk_stops_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("run.folder.no_link", lambda path, flags: os.open("/dev/full", flags))
    Run(tmp_path, HERE).log({"step": 1})
    assert re.search(r'not in \S+log.jsonl \(No space left.*\): {"step": 1}', capsys.readouterr().out)


def test_a_worker_that_outlives_its_run_does_not_lock_it(tmp_path):
    """After the run was killed."""
    first = Run(tmp_path / "run", HERE)
    first.claim()
    ours, its = os.pipe()
    child = os.fork()
    if not child:
        os.write(its, b"I am here")
        time.sleep(60)
        os._exit(0)
    os.read(ours, 9)
    first.lock.close()  # as the system does when a process is killed
    try:
        Run(tmp_path / "run", HERE).claim()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_git_there_is_no_commit(monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}", commit() or "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None


def test_a_truncated_log_ends_at_the_checkpoint(tmp_path):
    """Evaluations follow their step; a line that a crash cut off goes too."""
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "val": {}}, {"step": 3}]
    text = [json.dumps(line) + "\n" for line in lines]
    for step, kept in ((2, 2), (2.5, 3), (9, 4)):
        (tmp_path / "log.jsonl").write_text("".join(text) + '{"step": 4, "lo')
        Run(tmp_path, HERE).truncate_log(step)
        assert (tmp_path / "log.jsonl").read_text() == "".join(text[:kept])


# ---- the settings


@dataclass
class Settings:
    """As run/options.py has them, in small; `newer` is a flag that old runs lack."""

    data: str = field(default="x", metadata={"role": "free"})
    fresh: bool = field(default=False, metadata={"role": "free"})
    threads: int = field(default=1, metadata={"role": "free"})
    crop: tuple[int, int] = (64, 64)
    newer: str = "off"


def start(folder: Path, *, hashes: dict[str, str] | None = None, **options) -> Path | None:
    """Open a run with these options and hashes of the data; the step to resume from."""
    config, read = (
        TadaConfig(("sea",), model="tiny"),
        fingerprint(["sea"], tags="clip", frozen={}, drawing=None),
    )
    read |= hashes or {}
    with Run(folder, HERE) as run:
        return open_run(run, Settings(**options), defaults=vars(Settings()), config=config, read=read)


@pytest.fixture
def old_run(tmp_path):
    """A run folder with a checkpoint, whose config.json can be changed."""
    from test_run_checkpoint import Small

    assert start(tmp_path) is None
    write_step(tmp_path, 1, Small(1), frozen={}, metrics={}, tensors={"x": torch.zeros(1)}, facts={"step": 1})

    def change(**entries) -> Path:
        file = tmp_path / "config.json"
        about = json.loads(file.read_text())
        about["options"] = {name: x for name, x in (about["options"] | entries).items() if x != "gone"}
        file.write_text(json.dumps(about))
        return tmp_path

    return change


def test_a_run_before_a_flag_existed_resumes_with_its_default(old_run):
    folder = old_run(newer="gone")
    with pytest.raises(RunError, match="--newer was off, is on"):
        start(folder, newer="on")
    assert start(folder) == folder / step_name(1)


@pytest.mark.parametrize("value", [None, "deformable"])
def test_a_run_before_a_flag_was_removed_resumes(old_run, value):
    """With the only value that is still supported, or none as a run of another decoder has."""
    folder = old_run(pixel_decoder=value)
    assert start(folder) == folder / step_name(1)


def test_a_run_with_a_removed_setting_is_refused_by_its_name(old_run):
    with pytest.raises(RunError, match="--pixel-decoder was fpn, is removed"):
        start(old_run(pixel_decoder="fpn"))


def test_only_free_settings_may_change(old_run):
    folder = old_run()
    assert start(folder, data="elsewhere", threads=4) is not None
    with pytest.raises(RunError, match=r"--crop was \[64, 64\], is \[32, 32\]\).*--fresh"):
        start(folder, crop=(32, 32))
    assert start(folder, crop=(32, 32), fresh=True) is None
    assert (folder.with_name(f"{folder.name}.1") / step_name(1)).is_dir()


def test_a_file_that_one_of_two_runs_does_not_read_has_not_changed(old_run):
    """Another --lora, --tags or --dataset reads other files; with the same settings they must be the same."""
    file = old_run() / "config.json"
    about = json.loads(file.read_text())
    about["read"]["a frozen file"] = {"vae": "1"}
    file.write_text(json.dumps(about))
    more = {"the file of tags": "2", "a frozen file": {"vae": "1", "unet": "1"}}
    for options, hashes, faults in (
        ({"newer": "on"}, more, "--newer was off, is on"),
        ({}, more, "a frozen file has changed; the file of tags has changed"),
    ):
        with pytest.raises(RunError, match=re.escape(f"settings ({faults}):")):
            start(file.parent, hashes=hashes, **options)


@pytest.mark.parametrize(
    ("about", "fault"),
    [
        ({"options": 5}, '"options" is 5, not a dict'),
        ([], '"options" is missing, not a dict'),
        ({"versions": [1]}, '"versions" is [1], not a dict'),
        ({"versions": {}}, '"torch" is missing, not a str'),
        ({"read": "x"}, '"read" is "x", not a dict'),
    ],
)
def test_a_field_of_another_kind_is_named(old_run, about, fault):
    file = old_run() / "config.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps(about and old | about))
    with pytest.raises(RunError) as caught:
        start(file.parent)
    assert str(caught.value).startswith(f"{file} lacks the settings of its run ({fault}): start over")


def test_other_data_is_refused_and_another_time_is_printed(old_run, capsys):
    """A data set that was copied elsewhere may have other times; a run of older code has neither."""
    folder, hashes = (
        old_run(),
        {"a size among the training labels": "1", "a time among the training labels": "1"},
    )
    assert start(folder, hashes=hashes) is not None, "written by code that did not look"
    capsys.readouterr()
    assert start(folder, hashes=hashes) is not None and capsys.readouterr().out == ""
    assert start(folder, hashes=hashes | {"a time among the training labels": "2"}) is not None
    assert "a time among the training labels has changed: if its content did" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"settings \(a size among the training labels has changed\).*--fresh"):
        start(folder, hashes=hashes | {"a size among the training labels": "2"})


def test_the_run_folder_imports_no_data_set():
    """Neither data nor images, not even by another import."""
    code = "import sys, run.folder; print([x for x in sys.modules if x == 'data' or x.startswith('images')])"
    line = [sys.executable, "-c", code]
    ended = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]"
