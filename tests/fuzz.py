"""One-byte mutations of a file: what is read from it is the same, or is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from errors import TadaError


def mutate(content: bytes, number: int, count: int) -> bytes:
    """Mutation `number` of `count`, which are spread over the content: change, delete or insert one byte.

    Half of the new bytes are others of the same content, which a format understands more often.
    """
    r, place = Random(number), number * len(content) // count
    byte = r.choice((r.randbytes(1), bytes([r.choice(content)])))
    kept = place + (number % 4 != 3)  # every fourth is an insertion
    return content[:place] + (b"" if number % 4 == 2 else byte) + content[kept:]


def refusals(file: Path, read: Callable[[], object], count: int = 200) -> int:
    """How many of `count` mutations of `file` are refused by `read` with a TadaError.

    Raises AssertionError if another mutation changes what is read; any other error passes through.
    """
    content, expected, refused = file.read_bytes(), read(), 0
    for number in range(count):
        file.write_bytes(mutate(content, number, count))
        try:
            assert read() == expected, f"mutation {number} of {count} is used"
        except TadaError as error:
            assert "\n" not in str(error)
            refused += 1
    file.write_bytes(content)
    assert read() == expected
    return refused
