"""The folder of a training run: whose it is, what it was started with, its log.

run = Run(Path("runs/NAME"), ranks)
last = open_run(run, options, config)  # None, or the step folder to go on from
run.log({"step": 10, "loss": 1.2})  # a line of log.jsonl
"""

import argparse
import fcntl
import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

import scenes
from checkpoint import clean, newest_step, steps
from model import TadaConfig
from ranks import Ranks


class RunError(ValueError):
    """Why a run cannot begin or go on; one sentence with the cure."""


def lock(folder: Path, flag: str) -> TextIO:
    """Make a folder, and keep other processes out of it until the returned file is closed.

    Raises RunError, naming the `flag` that gives another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}): give another {flag}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"{folder} is being written by another process: wait, or give another {flag}"
        ) from None
    return file


class Run:
    """The folder of a run. Only rank 0 writes; all ranks read."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        self.lock = None

    def say(self, line: str) -> None:
        if self.ranks.first:
            tqdm.write(line)
            sys.stdout.flush()

    def claim(self) -> None:
        """Make the folder ours until `release`. Raises RunError if another process has it."""
        self.release()
        self.lock = lock(self.folder, "--run")

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.close()

    def log(self, entry: dict) -> None:
        if self.ranks.first:
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(entry) + "\n")

    def cut_log(self, step: int) -> None:
        """Forget what was logged beyond `step`: those steps will be made again."""
        file = self.folder / "log.jsonl"
        if self.ranks.first and file.is_file():
            kept = [line for line in file.read_text().splitlines() if line_step(line) <= step]
            file.write_text("".join(f"{line}\n" for line in kept))


def line_step(line: str) -> float:
    """The step of a line of log.jsonl; a line that was cut off by a crash is beyond every step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_run(run: Run, options: argparse.Namespace, config: TadaConfig) -> Path | None:
    """Claim the run folder, write config.json, and find the step to go on from, None for a new run.

    Raises RunError if the folder holds a run with other options.
    """
    last = None
    if run.ranks.first:
        run.claim()
        if options.fresh and steps(run.folder):
            put_aside(run)
            run.claim()
        clean(run.folder)
        last, refused = newest_step(run.folder)
        for sentence in refused:
            run.say(sentence)
        now = json.loads(json.dumps(about_run(options, config)))
        file = run.folder / "config.json"
        if last is not None:
            refuse_changes(run, json.loads(file.read_text()), now)
        else:  # an earlier start that came to no checkpoint may have had other options
            for name in ("log.jsonl", "tags-train.jsonl"):
                (run.folder / name).unlink(missing_ok=True)
        file.write_text(json.dumps(now, indent=1))
    run.ranks.wait()
    return last if run.ranks.first else newest_step(run.folder)[0]


# They change no number, or, as the way a batch is divided, only its last digits.
MAY_CHANGE = ("data", "workers", "log_every", "save_every", "check", "fresh", "run", "accumulate")


def refuse_changes(run: Run, before: dict, now: dict) -> None:
    """A run goes on as it began, or not at all: only what leaves every number as it is may differ."""
    changed = [
        f"--{name.replace('_', '-')} was {before['options'].get(name)}, is {value}"
        for name, value in now["options"].items()
        if name not in MAY_CHANGE and before["options"].get(name) != value
    ]
    if changed:
        raise RunError(
            f"{run.folder} holds a run with other options ({'; '.join(changed)}): "
            "give the same ones, another --run, or --fresh to put that run aside"
        )
    if before["versions"]["torch"] != now["versions"]["torch"]:
        run.say(f"torch was {before['versions']['torch']}: results will not be bit-equal to an unbroken run")


def put_aside(run: Run) -> None:
    """Rename the folder of an earlier run: --fresh deletes nothing."""
    number = 1
    while (aside := run.folder.with_name(f"{run.folder.name}.{number}")).exists():
        number += 1
    run.folder.rename(aside)
    run.say(f"the earlier run is now {aside}")


def about_run(options: argparse.Namespace, config: TadaConfig) -> dict:
    """config.json: every option, the model, versions, commit, command."""
    about = {
        "command": [sys.executable, *sys.argv],
        "data": str(Path(options.data).absolute()),
        "options": vars(options),
        "model": asdict(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
    }
    if options.dataset == "scenes":
        about["scenes"] = scenes.VERSION
    return about


def commit() -> str | None:
    """The commit of this code, None outside a git checkout."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or None
