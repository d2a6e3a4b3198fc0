"""A table of classes, such as the classes.txt of one's own images: one class a line, the value 0 first."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import DataError
from images.colours import complete_palette
from images.read import IGNORE
from run.files import read_bytes

# A list in YAML or JSON; what ends a line for some programs and not for others; a number 0..999.
OTHER_LIST = re.compile(r'\s*(-\s|\d+\s*:|names\s*:|[\[{"])')
CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
VALUE = re.compile("[0-9]{1,3}")


class ClassTable(NamedTuple):
    """The classes of a table, in train-id order."""

    names: list[str]
    palette: np.ndarray  # (K, 3) uint8
    values: list[int]  # of the classes in label files
    ignored: list[int]  # values that are ignored
    colours: dict[tuple[int, ...], int]  # (R, G, B) -> train id or 255; {} unless each class has its own


def read_classes(file: Path) -> ClassTable:
    """Read a table. Raises DataError with the line.

    A line is "name", "name, r g b", "name, value" or "name, r g b, value". Without a value, line i is the
    value i - 1 of label files; a class without a colour gets one. The name "ignore" is not a class: its
    value is ignored, and so is its colour in RGB labels.
    """
    try:
        lines = read_bytes(file).decode("utf-8-sig").rstrip(" \t\r\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 ({error}): give it one class name a line") from None
    heads = (line.split(maxsplit=1) for line in lines)
    if len(lines) > 1 and all(len(x) > 1 and x[0] in (str(i), str(i + 1)) for i, x in enumerate(heads)):
        raise DataError(f"{file} numbers its lines, such as {lines[0][:60]!r}: write the names alone")
    names, palette, values, ignored, void = [], [], [], [], set()
    for i, line in enumerate(lines if any(lines) else []):
        where = f"{file}, line {i + 1}"
        name, colour, value = read_line(line.removesuffix("\r"), i, where)
        if name in names or value in values or value in ignored:
            raise DataError(f"{where}: {line[:60]!r} repeats a name or a value")
        if name.lower() == "ignore":
            ignored.append(value)
            void |= {colour} - {None}
            continue
        if len(names) == IGNORE:
            raise DataError(f"{where} is class {IGNORE + 1} of {len(lines)}: {IGNORE} classes are the most")
        names.append(name)
        palette.append(colour)
        values.append(value)
    if not names:
        raise DataError(f"{file} lists no class: give it one class name a line")
    own = None not in palette and len({*palette, *void}) == len(palette) + len(void)
    colours = {colour: k for k, colour in enumerate(palette)} | dict.fromkeys(void, IGNORE) if own else {}
    return ClassTable(names, complete_palette(palette), values, ignored, colours)


def read_line(line: str, i: int, where: str) -> tuple[str, tuple[int, ...] | None, int]:
    """Name, colour and value of line `i`."""
    if control := CONTROL.search(line):
        raise DataError(f"{where} holds the control character {control[0]!r}: remove it")
    if OTHER_LIST.match(line):
        raise DataError(f"{where}: {line[:60]!r} is YAML or JSON: write one class name a line instead")
    name, *fields = (field.strip() for field in line.split(","))
    fields = [field.split() for field in fields]
    fits = name and [*map(len, fields)] in ([], [3], [1], [3, 1])
    if not fits or not all(VALUE.fullmatch(x) and int(x) <= 255 for field in fields for x in field):
        form = "expected a class as 'name', 'name, r g b' or 'name, r g b, value', with numbers up to 255"
        raise DataError(f"{where}: {form}, not {line[:60]!r}")
    numbers = [tuple(map(int, field)) for field in fields]
    colour = numbers[0] if numbers and len(numbers[0]) == 3 else None
    return name, colour, numbers[-1][0] if numbers and len(numbers[-1]) == 1 else i
