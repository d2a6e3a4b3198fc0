"""The folder of a training run: whose it is, what it was started with, its log.

run = Run(Path("runs/NAME"), ranks)
last = open_run(run, options, config, read)  # None, or the step folder to go on from
run.log({"step": 10, "loss": 1.2})  # a line of log.jsonl
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from data import Dataset
from errors import RunError
from images import scenes
from model import TadaConfig
from run.checkpoint import clean, newest_step, replace_text, steps
from run.ranks import Ranks
from weights.words import digest


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
    except OSError as error:
        file.close()
        raise RunError(
            f"{folder} cannot be locked ({error.strerror}): give another {flag}, on a local disk"
        ) from None
    os.register_at_fork(after_in_child=file.close)  # a loading process that outlives us would keep the lock
    return file


class Run:
    """The folder of a run. Only rank 0 writes; all ranks read."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        self.lock = None

    def say(self, line: str) -> None:
        if self.ranks.is_main:
            with suppress(OSError):  # nobody listens any more: the log has it all
                tqdm.write(line)
                sys.stdout.flush()

    def claim(self) -> None:
        """Make the folder ours until `release`. Raises RunError if another process has it."""
        self.release()
        self.lock = lock(self.folder, "--run-dir")

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.close()

    def log(self, entry: dict) -> None:
        """Add a line to log.jsonl. A full disk stops no run."""
        if self.ranks.is_main:
            try:
                with (self.folder / "log.jsonl").open("a") as f:
                    f.write(json.dumps(entry) + "\n")
            except OSError as error:
                self.say(f"not in {self.folder / 'log.jsonl'} ({error.strerror}): {json.dumps(entry)}")

    def cut_log(self, step: float) -> None:
        """Forget what was logged beyond `step`, in the count of `line_step`: it will be made again."""
        file = self.folder / "log.jsonl"
        if self.ranks.is_main and file.is_file():
            lines = file.read_text().splitlines()
            kept = [line for line in lines if line_step(line) <= step]
            if kept != lines:
                replace_text(file, "".join(f"{line}\n" for line in kept))


def line_step(line: str) -> float:
    """The step of a line of log.jsonl, and a half if it is of the evaluation after it; a line that was cut
    off by a crash is beyond every step.
    """
    try:
        entry = json.loads(line)
        return entry["step"] + 0.5 * ("val" in entry)
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_run(run: Run, options: argparse.Namespace, config: TadaConfig, data: dict) -> Path | None:
    """Claim the run folder, write config.json, and find the step to go on from, None for a new run.

    `data` is what `fingerprint` says of what is read. Raises RunError if the folder holds a run with other
    options or data, or one of which no step is whole.
    """
    last = None
    if run.ranks.is_main:
        run.claim()
        if options.fresh and (steps(run.folder) or (run.folder / "config.json").exists()):
            put_aside(run)
            run.claim()
        refuse_copies(run.folder)
        clean(run.folder)
        last, refused = newest_step(run.folder)
        for sentence in refused:
            run.say(sentence)
        if refused and last is None:
            raise RunError(
                f"no step of {run.folder} is whole: mend it, or give --fresh, which puts that run aside"
            )
        now = json.loads(json.dumps(about_run(options, config, data)))
        if last is not None:
            refuse_changes(run, read_about_run(run.folder / "config.json"), now)
        else:  # an earlier start that came to no checkpoint may have had other options
            for name in ("log.jsonl", "tags-train.jsonl"):
                (run.folder / name).unlink(missing_ok=True)
        replace_text(run.folder / "config.json", json.dumps(now, indent=1))
    return run.ranks.all_gather_object([last] if run.ranks.is_main else [])[0]


def refuse_copies(folder: Path) -> None:
    """A run that was copied with its links turned into folders cannot be kept up to date."""
    for name in ("last", "best"):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise RunError(f"{folder / name} is a copy where a link to a step belongs: remove it")


def read_about_run(file: Path) -> dict:
    """What `about_run` wrote."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        about["options"], about["versions"]["torch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} does not say how its run was started ({error}): give --fresh, which puts that run aside"
        ) from None
    return about


# They change no number or, as the number of threads and the way a batch is divided, its last digits alone.
MAY_CHANGE = ("data", "workers", "log_every", "save_every", "check", "fresh", "run", "accumulate", "threads")


def refuse_changes(run: Run, before: dict, now: dict) -> None:
    """A run goes on as it began, or not at all: only what leaves every number as it is may differ."""
    changed = [
        f"--{name.replace('_', '-')} was {before['options'].get(name)}, is {value}"
        for name, value in now["options"].items()
        if name not in MAY_CHANGE and before["options"].get(name) != value
    ]
    if not changed:
        read = before.get("read", now["read"])
        changed = [f"{name} has changed" for name, x in now["read"].items() if read.get(name) != x]
    if changed:
        raise RunError(
            f"{run.folder} holds a run that began otherwise ({'; '.join(changed)}): "
            "give the same ones, another --run-dir, or --fresh to put that run aside"
        )
    for name, was, is_ in (
        ("torch", before["versions"]["torch"], now["versions"]["torch"]),
        ("--threads", before["options"].get("threads"), now["options"]["threads"]),
    ):
        if was != is_:
            run.say(f"{name} was {was}, is {is_}: the last digits may differ from those of an unbroken run")


def put_aside(run: Run) -> None:
    """Rename the folder of an earlier run: --fresh deletes nothing."""
    number = 1
    while (aside := run.folder.with_name(f"{run.folder.name}.{number}")).exists():
        number += 1
    run.folder.rename(aside)
    run.say(f"the earlier run is now {aside}")


def fingerprint(options: argparse.Namespace, dataset: Dataset, frozen: dict[str, str]) -> dict:
    """What training reads beside its options: the names of its pictures, in order, as one hash, the classes,
    the hashes of the frozen files and of the file of tags, the version of the drawn scenes.
    """
    names = "\n".join(dataset.path(i) for i in range(len(dataset)))
    tags = Path(options.tags)
    return {
        "the list of training pictures": hashlib.sha256(os.fsencode(names)).hexdigest(),
        "the list of classes": dataset.classes,
        "a frozen file": frozen,
        "the file of tags": digest(tags) if tags.is_file() else None,
        "the drawing of scenes": scenes.VERSION if options.dataset == "scenes" else None,
    }


def about_run(options: argparse.Namespace, config: TadaConfig, data: dict) -> dict:
    """config.json: every option, the model, what is read, versions, commit, command."""
    return {
        "command": [sys.executable, *sys.argv],
        "data": str(Path(options.data).absolute()),
        "options": vars(options),
        "model": asdict(config),
        "read": data,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this code, None outside a git checkout or without git."""
    command = ["git", "-C", Path(__file__).parents[1], "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return git.stdout.strip() or None
