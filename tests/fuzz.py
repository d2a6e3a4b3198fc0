"""One-byte mutations of a file: what is read from it is the same, or is refused in one sentence."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from errors import TadaError

SECONDS = 20  # that no mutation of a small file may take


class Counts(NamedTuple):
    """What became of the mutations of a file."""

    refused: int  # with a TadaError
    same: int  # nothing of what is read has changed
    used: int  # something has
    wrong: list[str]  # another error, or a sentence of several lines


def mutate(content: bytes, number: int, count: int, end: int | None = None) -> bytes:
    """Mutation `number` of `count`, which are spread over content[:end]: change, delete or insert one byte.

    Half of the new bytes are others of the same content, which a format understands more often.
    """
    r, place = Random(number), number * (end or len(content)) // count
    byte = r.choice((r.randbytes(1), bytes([r.choice(content)])))
    kept = place + (number % 4 != 3)  # every fourth is an insertion
    return content[:place] + (b"" if number % 4 == 2 else byte) + content[kept:]


def fuzz(file: Path, read: Callable[[], object], count: int, end: int | None = None) -> Counts:
    """What becomes of `count` mutations of `file`; it is restored."""
    content, expected, refused, same, used, wrong = file.read_bytes(), read(), 0, 0, 0, []
    for number in range(count):
        file.write_bytes(mutate(content, number, count, end))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                equal = read() == expected
            same, used = same + equal, used + (not equal)
        except TadaError as error:
            refused += 1
            if "\n" in str(error):
                wrong.append(f"mutation {number} of {count}: {error}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            wrong.append(f"mutation {number} of {count}: {type(error).__name__}: {error}")
        if time.monotonic() - start > SECONDS:
            wrong.append(f"mutation {number} of {count} took more than {SECONDS} seconds")
    file.write_bytes(content)
    assert read() == expected
    return Counts(refused, same, used, wrong)
