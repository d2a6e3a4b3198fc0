"""Files that are written whole or not at all, never through a link in their place, and read unless a pipe."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(file: Path, new: Path | None = None) -> Iterator[Path]:
    """Yield the path `new` to write, which then takes the place of `file`, or of a link there; after an error
    nothing of it is left.
    """
    new = new or file.with_name(f".tmp-{file.name}")
    new.unlink(missing_ok=True)
    try:
        yield new
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def replace_text(file: Path, text: str) -> None:
    """Write a file atomically, and flush it to the disk."""
    with replacing(file) as new:
        new.write_text(text, encoding="utf-8")
        sync(new)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place(top: Path, name: str) -> Path:
    """The file `name` below `top`, whose folders in between are made. Raises OSError where one is a link."""
    for folder in [top / x for x in reversed(Path(name).parents)][1:]:
        folder.mkdir(exist_ok=True)
        os.close(no_link(folder, os.O_RDONLY))
    return top / name


def no_pipe(path: str | Path, flags: int) -> int:
    """An `opener` of `open`. Raises OSError where `path` is a pipe, socket or device."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, f"{path} is a pipe, socket or device, which is not opened: remove it")
    return os.open(path, flags, 0o666)


def no_link(path: str | Path, flags: int) -> int:
    """`no_pipe` that raises OSError where `path` is a link, too."""
    try:
        return no_pipe(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        if os.path.islink(path):
            raise OSError(error.errno, f"{path} is a link, which is not followed: remove it") from None
        raise


def read_bytes(file: str | Path) -> bytes:
    """All bytes of a file. Raises OSError."""
    with open(file, "rb", opener=no_pipe) as f:
        return f.read()


def entry(content: Any, name: str, kind: type, default: Any = None) -> Any:
    """The value of `name` in an object of JSON. Raises ValueError unless it is of this type."""
    known = isinstance(content, dict) and name in content
    if isinstance(value := content[name] if known else default, kind):
        return value
    raise ValueError(f'"{name}" is {json.dumps(value)[:80] if known else "missing"}, not a {kind.__name__}')


def holds(file: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, as one that we wrote."""
    try:
        return {*keys} <= json.loads(read_bytes(file)).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
