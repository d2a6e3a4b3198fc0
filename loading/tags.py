"""Tags and captions of images from a file of JSON lines, and the source of the words of each image."""

import json
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from errors import DataError, DataWarning
from images.read import SHOWN

MOST_TAGS, LONGEST_TAG, LONGEST_CAPTION = 1000, 200, 10_000  # tags, characters: sanity limits for tag files


class Tags(NamedTuple):
    """The entries of a tag file for the images of a data set, by `Dataset.path`."""

    tags: dict[str, list[tuple[str, float]]]
    captions: dict[str, str]
    unknown: list[str]  # images in the file that the data set does not have


def read_tags(file: str | Path, root: str | Path, known: Collection[str]) -> Tags:
    """Read JSON lines `{"image": "relative/path.jpg", "tags": [["car", 0.93], ...], "caption": "optional"}`.

    `root` is the data set's, `known` its paths. Scores are in 0..1; the file's order stays. No image is
    opened. Raises DataError with the line's number; images that the data set lacks are counted in a
    DataWarning.
    """
    root, known = os.path.abspath(root), frozenset(known)
    try:
        lines = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # UTF-8's byte order mark
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): --tags needs a file of JSON lines"
        ) from None
    result, line_of = Tags({}, {}, []), {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            path, tags, caption = parse_tags(line, root)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}") from None
        if line_of.setdefault(path, number) != number:
            raise DataError(f"{file}, line {number}: {path} has tags in line {line_of[path]} already")
        if path not in known:
            result.unknown.append(path)
            continue
        result.tags[path] = tags
        if caption:
            result.captions[path] = caption
    if not result.tags:
        raise DataError(f'{file} has none of the {len(known)} images: "image" must be relative to {root}')
    if result.unknown:
        names = ", ".join(result.unknown[:SHOWN]) + (", ..." if len(result.unknown) > SHOWN else "")
        message = f"{file}: {len(result.unknown)} images are not in the data set: {names}"
        warnings.warn(message, DataWarning, stacklevel=2)
    return result


class TagSource:
    """The words of each image of a data set, by the value of `--tags`."""

    def __init__(self, tags: str, prompts: Sequence[str], table: dict[str, list[str]] | None = None):
        self.tags, self.prompts, self.table = tags, prompts, table

    def __call__(self, path: str, present: Collection[int]) -> list[str] | None:
        """The words of the image at `path` (`Dataset.path`), whose whole label map has the classes `present`.

        None where there are none per image: "classes", and "clip", whose tagger reads the image itself.
        """
        if self.tags == "oracle":
            return [self.prompts[k] for k in present]
        return None if self.table is None else self.table[path]


def open_words(
    condition: str, tags: str, prompts: Sequence[str], root: str | Path, paths: Collection[str]
) -> TagSource:
    """`tags` is "classes", "clip", "oracle" or a tag file, of which condition "caption" uses the captions.

    Raises DataError if the file cannot be read or lacks one of the images at `paths`.
    """
    if tags in ("classes", "clip", "oracle"):
        return TagSource(tags, prompts)
    entries, what = read_tags(tags, root, paths), "caption" if condition == "caption" else "line"
    if condition == "caption":
        table = {path: [caption] for path, caption in entries.captions.items()}
    else:
        table = {path: [tag for tag, _ in pairs] for path, pairs in entries.tags.items()}
    lacking = sorted(set(paths) - set(table))
    if lacking:
        raise DataError(
            f"{tags} has no {what} for {len(lacking)} of {len(paths)} images, such as {lacking[0]}"
        )
    return TagSource(tags, prompts, table)


def parse_tags(line: bytes, root: str) -> tuple[str, list[tuple[str, float]], str]:
    """Path, tags and caption ("" if there is none) of one line. Raises ValueError with the fault."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("each line must be one whole JSON object") from None
    match entry:
        case {"image": str(image)}:
            path = Path(os.path.normpath(os.path.join(root, image)))
        case _:
            raise ValueError('each line must be an object with "image", "tags" and perhaps "caption"')
    if not path.is_relative_to(root):
        raise ValueError(f"the image {image[:80]!r} is outside of {root}")
    match entry.get("tags", []):
        case list(pairs) if len(pairs) <= MOST_TAGS:
            tags = [parse_tag(pair) for pair in pairs]
        case _:
            raise ValueError(f'"tags" must be a list of at most {MOST_TAGS} pairs like ["car", 0.93]')
    caption = entry.get("caption")
    caption = "" if caption is None else text(caption, LONGEST_CAPTION)
    return path.relative_to(root).as_posix(), tags, caption


def parse_tag(pair: object) -> tuple[str, float]:
    match pair:
        case [tag, int(score) | float(score)] if 0 <= score <= 1:
            return text(tag, LONGEST_TAG), float(score)
    raise ValueError(f'a tag must be a pair like ["car", 0.93] with a score in 0..1, not {str(pair)[:80]}')


def text(value: object, longest: int) -> str:
    """`value` with single blanks, if it is 1 to `longest` printable characters."""
    words = " ".join(value.split()) if isinstance(value, str) else ""
    if not 1 <= len(words) <= longest or not words.isprintable():
        raise ValueError(
            f"a tag or caption must be 1 to {longest} printable characters, not {str(value)[:80]!r}"
        )
    return words
