"""The results of predict.py on disk: which belong to an image, which are current, atomic writes.

Top to bottom: what a result depends on, the list `predictions.jsonl`, the images still to do, the files.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import TadaError
from run.files import no_link, place, replace_text, replacing

LIST, SEGMENTS = "predictions.jsonl", ".segments.png"
ENDINGS = (".png", ".overlay.jpg", ".attention.jpg", SEGMENTS)  # of all results


@dataclass(frozen=True)
class Settings:
    """What a result depends on, besides its image and its words."""

    checkpoint: str  # its sha256
    tagger: dict[str, Any]  # the source of the words and its threshold, if not those of training
    scales: Sequence[float]
    flip: bool
    attention: bool
    reading: dict[str, float]  # score and overlap of mask2former's segments; {} for other decoders

    def of(self, path: str, words: list[str] | None) -> dict:
        """The entries of a line by which an existing result is recognised; {} without the image's file."""
        if not os.path.exists(path):
            return {}
        file = os.stat(path)
        made = {"checkpoint": self.checkpoint, "asked": words, "scales": self.scales, "flip": self.flip}
        return made | self.tagger | self.reading | {"bytes": file.st_size, "mtime_ns": file.st_mtime_ns}

    @property
    def owned(self) -> list[str]:
        """The endings of all files that belong to an image."""
        return [ending for ending in ENDINGS if ending != SEGMENTS or self.reading]

    @property
    def endings(self) -> list[str]:
        """Of the files of one image, the label map last: where it exists, all others do."""
        optional = [SEGMENTS] * bool(self.reading) + [".attention.jpg"] * self.attention
        return [".overlay.jpg", *optional, ".png"]


def read_list(out: Path) -> dict[str, dict]:
    """Label map -> its line, the last if there are several, of images that have any result."""
    file = out / LIST
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["path"] + record["labels"], str):
                raise TypeError
            records[record["labels"]] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.endswith(b"\n") or not b'{"path"'.startswith(line[:7]):  # else a crash truncated it
                raise TadaError(f"{file}, line {number}, is not of predict.py: give another --out") from None
    stems = [(labels, labels.removesuffix(".png")) for labels in sorted(records)]
    return {x: records[x] for x, stem in stems if any(os.path.lexists(out / (stem + y)) for y in ENDINGS)}


def checked(record: dict) -> dict:
    """A line with the hash of its other entries: a result whose line has another is made anew."""
    rest = json.dumps({name: x for name, x in record.items() if name != "hash"})
    return record | {"hash": hashlib.sha256(rest.encode()).hexdigest()[:16]}


def fits(name: str) -> bool:
    """Whether a file system can name the results: most allow 255 bytes (NAME_MAX of Linux and macOS)."""
    return len(os.fsencode(os.path.basename(name))) + max(map(len, ENDINGS)) <= 255


def tidy(out: Path) -> None:
    """Delete files that an interrupted process left half-written, and lines without a result."""
    try:
        for left in out.rglob(f".{LIST}.tmp-*"):
            left.unlink()
        replace_text(out / LIST, "".join(json.dumps(record) + "\n" for record in read_list(out).values()))
    except OSError as error:
        raise TadaError(f"{out} cannot be written ({error.strerror}): give another --out") from None


def to_do(names: dict[str, str], words: dict, out: Path, settings: Settings) -> list[str]:
    """The images without such a result. Raises TadaError where a file belongs to another image or program."""
    for folder in {out / x for name in names.values() for x in Path(name).parents if x.name}:
        if folder.is_symlink() or folder.is_file():
            raise TadaError(f"{folder} is a link, which is not followed, or a file: give another --out")
    records, todo = {name.removesuffix(".png"): x for name, x in read_list(out).items()}, []
    taken = {name.lower() for name in (*records, *names.values())}
    for path, name in names.items():
        record = records.get(name, {})
        if settings.reading and f"{name}{SEGMENTS}".removesuffix(".png").lower() in taken:
            raise TadaError(f"{out / name}{SEGMENTS} is another image's label map: give another --out")
        for file in [out / f"{name}{ending}" for ending in settings.owned]:
            if not record and file.exists():
                raise TadaError(f"{file} exists and {LIST} has no line for it: give another --out")
        made, files = settings.of(path, words[path]), [out / f"{name}{x}" for x in settings.endings]
        same = made and made.items() <= record.items() and checked(record) == record
        if not same or not all(file.is_file() for file in files):
            todo.append(path)
    return todo


def write(out: Path, name: str, record: dict, results: dict[str, bytes], rank: int) -> None:
    """Append the line, then write the files, each whole or not at all, the label map last. Raises OSError."""
    file = out / LIST
    try:
        with open(file, "a", opener=no_link) as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # of the ranks one at a time
            f.write(json.dumps(checked(record)) + "\n")
        for ending, content in results.items():
            file = place(out, f"{name}{ending}")
            with replacing(file, file.with_name(f".{LIST}.tmp-{rank}")) as new:
                new.write_bytes(content)
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror or error}): earlier results stay") from None
