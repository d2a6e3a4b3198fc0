"""The folder of a training run: its lock, the settings it was started with, its log.

with Run(Path("runs/NAME"), ranks) as run:
    last = open_run(run, options, defaults=defaults, config=config, read=read)  # the step to resume from
    run.log({"step": 10, "loss": 1.2})  # a line of log.jsonl
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from assemble import build
from errors import RunError
from model import TadaConfig
from run.checkpoint import HASHES, REMOVED, clean, is_utf8, newest_step, steps
from run.files import entry, holds, no_link, read_bytes, replace_text
from run.ranks import Ranks
from weights.words import digest

NOTED = {  # what is printed where it has changed -> what that means; the run resumes
    "a time among": "if its content did, too, start over with --fresh (keeps the run)",
    "the model of --from": "the run resumes from its own checkpoint",
}


def say(line: str) -> None:
    """Print a line at once, above a bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def lock(folder: Path, flag: str, name: str = ".lock") -> TextIO:
    """Make a folder, and lock it until the returned file is closed; RunError names the `flag` to change."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a", opener=no_link)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        fault = "is being written by another process: wait, or"
    except OSError as error:
        fault = f"cannot be written or locked ({error.strerror}):"
    else:
        os.register_at_fork(after_in_child=file.close)  # or a worker that outlives us would keep the lock
        return file
    raise RunError(f"{folder} {fault} give another {flag}")


class Run(AbstractContextManager):
    """The folder of a run, locked from `claim` to the end of the `with` block; only rank 0 writes."""

    lock: TextIO | None = None

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks

    def __exit__(self, *error: object) -> None:
        if self.lock is not None:
            self.lock.close()

    def claim(self) -> None:
        """Lock the folder. Raises RunError if another process has it."""
        self.lock = lock(self.folder, "--run-dir")

    def print0(self, line: str) -> None:
        """Print on rank 0."""
        if self.ranks.is_main:
            say(line)

    def log(self, entry: dict) -> None:
        """Append a line to log.jsonl. A full disk does not stop the run."""
        if self.ranks.is_main:
            try:
                with open(self.folder / "log.jsonl", "a", opener=no_link) as f:
                    f.write(json.dumps(entry) + "\n")
            except OSError as error:
                self.print0(f"not in {self.folder / 'log.jsonl'} ({error.strerror}): {json.dumps(entry)}")

    def truncate_log(self, step: float) -> None:
        """Drop log lines after `step` (as `line_step` counts); they will be logged again."""
        file = self.folder / "log.jsonl"
        if self.ranks.is_main and file.exists():
            lines = read_bytes(file).splitlines()
            if broken := [n for n, line in enumerate(lines[:-1], 1) if line_step(line) == math.inf]:
                self.print0(f"{file}, line {broken[0]}, is left out, it is not whole (of {len(broken)} such)")
            kept = [line.decode() for line in lines if line_step(line) <= step]
            replace_text(file, "".join(f"{line}\n" for line in kept))


def line_step(line: bytes) -> float:
    """The step of a line of log.jsonl, plus a half for its evaluation; infinity for a truncated line."""
    try:
        entry = json.loads(line.decode())
        return entry["step"] + 0.5 * ("val" in entry)
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def open_run(
    run: Run, options: Any, *, defaults: Mapping[str, Any], config: TadaConfig, read: dict
) -> Path | None:
    """Lock the run folder, write config.json, and find the step to resume from, None for a new run.

    The fields of the dataclass `options` carry a "role" (run/options.py), `defaults` holds their values
    without flags, `read` is a `fingerprint` and that of the data. Raises RunError unless the run there may
    resume.
    """
    last = None
    if run.ranks.is_main:
        file = run.folder / "config.json"
        require_ours(run.folder, file)
        run.claim()
        if options.fresh and (steps(run.folder) or file.exists()):
            build(config)  # the earlier run stays where it is if the weights cannot be read
            rename_run(run)
        for link in (run.folder / "last", run.folder / "best"):
            if link.is_dir() and not link.is_symlink():
                raise RunError(f"{link} is a copy where a link to a step belongs: remove it")
        clean(run.folder)
        last, refused = newest_step(run.folder)
        for sentence in refused:
            run.print0(sentence)
        if refused and last is None:
            cure = "repair one or start over with --fresh (keeps the run)"
            raise RunError(f"no intact checkpoint in {run.folder}: {cure}")
        about = {
            "command": [sys.executable, *sys.argv],
            "data": str(Path(options.data).absolute()),
            "options": asdict(options),
            "model": asdict(config),
            "read": read,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": commit(),
        }
        if last is not None:
            free = {option.name for option in fields(options) if option.metadata.get("role") == "free"}
            refuse_changes(run, about, defaults=defaults, free=free)
        else:  # an earlier start without a checkpoint may have had other options
            (run.folder / "log.jsonl").unlink(missing_ok=True)
        replace_text(file, json.dumps(about, indent=1))
    return run.ranks.all_gather_object([last] if run.ranks.is_main else [])[0]


def require_ours(folder: Path, config: Path) -> None:
    """Raise RunError unless a run may write here: into a new or empty folder, or one that holds a run."""
    if not is_utf8(folder):
        raise RunError(f"{str(folder)!r} is not UTF-8, which checkpoints need: give another --run-dir")
    names = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    ours = holds(config, "options", "model", "versions")
    if names and not ours and not any((step / HASHES).is_file() for step in steps(folder)):
        raise RunError(f"{folder} holds {min(names)} but no run: give a new or empty --run-dir")


def refuse_changes(run: Run, about: dict, defaults: Mapping[str, Any], free: set[str]) -> None:
    """Raise RunError if the run was started with other options or data; those in `free` may differ.

    An option that config.json lacks, since its flag is newer than the run, had its default.
    """
    file = run.folder / "config.json"
    now, defaults = json.loads(json.dumps([about, defaults]))  # tuples become lists
    try:
        before = json.loads(read_bytes(file))
        options = defaults | entry(before, "options", dict)
        torch_version = entry(entry(before, "versions", dict), "torch", str)
        read = entry(before, "read", dict, default=now["read"])
    except (OSError, ValueError, RecursionError) as error:
        cure = "start over with --fresh (keeps the run)"
        raise RunError(f"{file} lacks the settings of its run ({error}): {cure}") from None
    other = {x: f"is {y}" for x, y in now["options"].items() if x not in free and options[x] != y}
    other |= {x: "is removed" for x, y in REMOVED.items() if options.get(x) not in (None, y)}
    changed = [f"--{x.replace('_', '-')} was {options[x]}, {now_is}" for x, now_is in other.items()]
    differ = [name for name, value in now["read"].items() if name in read and read[name] != value]
    if not changed:  # with other settings a run reads other files
        changed = [f"{name} has changed" for name in differ if not name.startswith((*NOTED,))]
    if changed:
        cure = "use the same, another --run-dir, or --fresh to start over (keeps the run)"
        raise RunError(f"{run.folder} holds a run started with other settings ({'; '.join(changed)}): {cure}")
    about["read"] = read | about["read"]  # of a file of --from that is gone
    for start, meaning in NOTED.items():
        for name in [name for name in differ if name.startswith(start)]:
            run.print0(f"{name} has changed: {meaning}")
    threads = options["threads"], now["options"]["threads"]
    for name, (then, today) in {"torch": (torch_version, torch.__version__), "--threads": threads}.items():
        if then != today:
            effect = "results may differ in rounding from an uninterrupted run"
            run.print0(f"{name} was {then}, is {today}: {effect}")


def rename_run(run: Run) -> None:
    """Rename the folder of an earlier run to NAME.1, NAME.2, ...: --fresh deletes nothing."""
    number = 1
    while (other := run.folder.with_name(f"{run.folder.name}.{number}")).exists():
        number += 1
    run.folder.rename(other)
    run.lock.close()
    run.claim()
    run.print0(f"the earlier run is now {other}")


def fingerprint(
    classes: Sequence[str], tags: str, *, frozen: dict[str, str], drawing: int | None
) -> dict[str, Any]:
    """What training reads besides options and data; `tags` may be a file, `drawing` is scenes' version."""
    return {
        "the list of classes": [*classes],
        "a frozen file": frozen,
        "the file of tags": digest(Path(tags)) if Path(tags).is_file() else None,
        "the drawing of scenes": drawing,
    }


def commit() -> str | None:
    """The commit of this code, None outside a git checkout or without git."""
    command = ["git", "-C", Path(__file__).parents[1], "rev-parse", "HEAD"]
    with suppress(OSError):  # git is not installed
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
