"""Tags and captions of images from a file of JSON lines, and the source of the words of each image."""

import json
import os
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from errors import DataError, DataWarning
from images.read import SHOWN
from run.files import read_bytes

MOST_TAGS, LONGEST_TAG, LONGEST_CAPTION = 1000, 200, 10_000  # tags, characters: sanity limits for tag files
JOINERS = str.maketrans("", "", "\u200c\u200d")  # ZWNJ, ZWJ: letters of some scripts need them
SOURCES = ("classes", "clip", "ram", "oracle", "none")  # values of --tags that are not a file
PER_IMAGE = ("caption", "tagging", "tags", "oracle")  # conditions that use the words of each image

Scored = list[tuple[str, float]]  # tags and their scores, 0..1


class Tags(NamedTuple):
    """The entries of a tag file for the images of a data set, by `Dataset.paths`."""

    tags: dict[str, Scored]
    captions: dict[str, str]
    unknown: list[str]  # images in the file that the data set does not have


def read_tags(file: str | Path, root: str | Path, known: Collection[str], some: bool = True) -> Tags:
    """Read JSON lines `{"image": "relative.jpg", "tags": [["car", 0.93], "sky"], "caption": "optional"}`.

    `root` is the data set's, `known` its paths, compared in Unicode's NFC. Scores are in 0..1, that of a bare
    tag is 1; the file's order stays. No image is opened. Raises DataError with the line's number; images that
    the data set lacks are counted in a DataWarning, and if `some`, at least one must be known.
    """
    root, known = os.path.abspath(root), {unicodedata.normalize("NFC", path): path for path in known}
    try:
        lines = read_bytes(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")  # UTF-8's byte order mark
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): give another file as --tags") from None
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
        result.tags[known[path]] = tags
        if caption:
            result.captions[known[path]] = caption
    if some and not result.tags:
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
        """The words of the image at `path` (`Dataset.paths`), whose whole map has the classes `present`.

        None where there are none per image: "classes", and "clip" and "ram", whose tagger reads the image.
        """
        if self.tags == "oracle":
            return [self.prompts[k] for k in present]
        return None if self.table is None else self.table[path]

    @cached_property
    def longest(self) -> int:
        """The largest number of words of an image, at least 1."""
        lists = [self.prompts] if self.tags == "oracle" else (self.table or {}).values()
        return max([1, *map(len, lists)])


def open_words(
    condition: str,
    tags: str,
    prompts: Sequence[str],
    root: str | Path,
    paths: Collection[str],
    threshold: float | None = None,
) -> TagSource:
    """`tags` is one of SOURCES or a tag file, of which condition "caption" uses the captions.

    Tags of a file with a score below `threshold` are left out. Raises DataError if the file cannot be read or
    lacks one of the images at `paths`.
    """
    if tags in SOURCES:
        return TagSource(tags, prompts, {path: [] for path in paths} if tags == "none" else None)
    entries = read_tags(tags, root, paths)
    table = table_of(entries, condition, threshold)
    lacking = sorted(set(paths) - set(table))
    if lacking:
        what = "caption" if condition == "caption" else "line"
        raise DataError(f"{tags} has no {what} for {len(lacking)} of {len(paths)} images: {lacking[0]}, ...")
    if paths and not any(table.values()):
        least = "" if threshold is None else f" of at least {threshold:g}"
        cure = "captions need --condition caption" if entries.captions else "give another file"
        raise DataError(f"{tags} has no tag{least} for any image: {cure}")
    return TagSource(tags, prompts, table)


def table_of(entries: Tags, condition: str, threshold: float | None) -> dict[str, list[str]]:
    """Path -> the caption, or the tags with a score of at least `threshold`."""
    if condition == "caption":
        return {path: [caption] for path, caption in entries.captions.items()}
    least = threshold or 0
    return {path: [tag for tag, score in tags if score >= least] for path, tags in entries.tags.items()}


# ---- the words of new images


def split_words(text: str, condition: str, flag: str = "--words") -> list[str]:
    """The words of `--words "sea, boat"`; of condition "caption" one sentence. Raises DataError."""
    parts = [text] if condition == "caption" else [x for x in text.split(",") if x.strip()]
    words = checked_words(parts, condition, flag)
    if not words:
        raise DataError(f"{flag} {text[:80]!r} has 0 words: give 1 to {MOST_TAGS}")
    if any(word.endswith((".json", ".jsonl")) for word in words):
        raise DataError(f"{flag} {text[:80]!r} names a file: give a file of tags as --tags")
    return words


def checked_words(words: Iterable[str], condition: str, what: str = "words") -> list[str]:
    """A list of words, each once, [] for none; of condition "caption" one sentence. Raises DataError."""
    if condition not in PER_IMAGE:
        raise DataError(f"{what}: a model of condition {condition} uses no words per image; leave it out")
    caption, bare = condition == "caption", isinstance(words, str)
    words = [words] if bare else [*words]
    for text in [x for x in words if bare or (not caption and isinstance(x, str) and "," in x)]:
        cure = [text] if caption else [x.strip() for x in text.split(",")]
        raise DataError(f"{what} {text[:80]!r} is one string: give a list, {json.dumps(cure)[:80]}")
    try:
        words = unique_words(checked_text(x, LONGEST_CAPTION if caption else LONGEST_TAG) for x in words)
    except ValueError as error:
        raise DataError(f"{what}: {error}") from None
    if len(words) > MOST_TAGS:
        raise DataError(f"{what} {words[0][:80]!r}, ... has {len(words)} words: give at most {MOST_TAGS}")
    return words


def choose_source(
    tags: str | None, words: str | None, threshold: float | None, *, condition: str, trained: tuple
) -> tuple[str, str | None, float | None]:
    """The source of the words of an evaluation or a prediction, the words if they are given, the threshold.

    `tags`, `words` and `threshold` are the flags' values, `trained` the source and threshold of training.
    `--tags "sea, boat"`, with a comma, means `--words "sea, boat"`. Raises DataError where nothing can be
    meant.
    """
    if words is None and tags is not None and "," in tags and not os.path.exists(tags):
        tags, words = None, tags  # `split_words` refuses the name of a missing file
    flag = "--words" if words is not None else f"--tags {tags}"
    source = tags or ("words" if words is not None else trained[0])
    if threshold is not None and source in ("classes", "oracle", "none", "words"):
        raise DataError(f"--tag-threshold {threshold:g}: {source} have no scores; leave it out")
    if source == trained[0] and words is None:
        return source, None, trained[1] if threshold is None else threshold
    if tags is not None and words is not None:
        raise DataError("--words and --tags exclude each other: give one of them")
    if condition not in PER_IMAGE:
        raise DataError(f"{flag}: a model of condition {condition} uses no words per image; leave it out")
    if tags == "classes" and condition != "tagging":
        raise DataError(f"--tags classes: condition {condition} needs the words of each image; leave it out")
    if words is None and tags not in SOURCES and not os.path.isfile(tags):
        raise DataError(
            f"--tags {tags}: no such file; choose {', '.join(SOURCES)}, a file of JSON lines, "
            f"or give words as --words {tags[:80]!r}"
        )
    return source, words, threshold


def choose_words(
    source: str, given: str | None, condition: str, paths: Sequence[str], threshold: float | None
) -> dict[str, list[str] | None]:
    """The words of each image; None where a tagger or the class names serve. Raises DataError."""
    if given is not None:
        return dict.fromkeys(paths, split_words(given, condition))
    if source == "none":
        return {path: [] for path in paths}
    if source == "oracle":
        raise DataError("ground-truth tags of new images are not at hand: give them, as --words 'sea, boat'")
    return dict.fromkeys(paths) if source in SOURCES else look_up(source, condition, paths, threshold)


def look_up(
    file: str, condition: str, paths: Sequence[str], threshold: float | None = None
) -> dict[str, list[str]]:
    """The words of images by as much of each absolute path as the tag file has. Raises DataError."""
    ends = {path: [path[i + 1 :] for i in range(len(path)) if path[i] == os.sep] for path in paths}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # it has lines for many other images
        entries = read_tags(file, "/", {end for tails in ends.values() for end in tails}, some=False)
    table = table_of(entries, condition, threshold)
    words = {path: next((table[end] for end in ends[path] if end in table), None) for path in paths}
    lacking = [path for path in paths if words[path] is None]
    if lacking:
        raise DataError(
            f"{file} lacks {len(lacking)} of {len(paths)} images, such as {lacking[0]}: "
            "tag them with tag.py, or give their words with --words"
        )
    return words


# ---- one line


def parse_tags(line: bytes, root: str) -> tuple[str, Scored, str]:
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
    if not path.is_relative_to(root):  # an absolute path may lead to the data through links
        path, root = Path(os.path.realpath(path.parent), path.name), os.path.realpath(root)
    if not path.is_relative_to(root):
        raise ValueError(f"the image {image[:80]!r} is outside of {root}")
    path = path.relative_to(root)
    if not {"tags", "caption"} & {*entry}:
        raise ValueError('each line must have "tags" or a "caption"')
    match entry.get("tags", []):
        case list(pairs) if len(pairs) <= MOST_TAGS:
            scored = [parse_tag(pair) for pair in pairs]
        case _:
            raise ValueError(f'"tags" must be a list of at most {MOST_TAGS} pairs like ["car", 0.93]')
    caption = entry.get("caption")
    caption = "" if caption is None else checked_text(caption, LONGEST_CAPTION)
    return unicodedata.normalize("NFC", path.as_posix()), unique(scored), caption


def parse_tag(pair: object) -> tuple[str, float]:
    """A tag and its score, 1 for a bare tag. Raises ValueError."""
    match pair:
        case str(tag):
            return checked_text(tag, LONGEST_TAG), 1.0
        case [tag, int(score) | float(score)] if 0 <= score <= 1 and not isinstance(score, bool):
            return checked_text(tag, LONGEST_TAG), float(score)
    raise ValueError(f'a tag must be a pair like ["car", 0.93] with a score in 0..1, not {str(pair)[:80]}')


def checked_text(value: object, longest: int) -> str:
    """`value` with single blanks, if it is 1 to `longest` printable characters. Raises ValueError."""
    words = " ".join(value.split()) if isinstance(value, str) else ""
    letters = words.translate(JOINERS)
    if not letters or len(words) > longest or not letters.isprintable():
        form = f"1 to {longest} printable characters"
        raise ValueError(f"a tag or caption must be {form}, not {str(value)[:80]!r}")
    return words


def tag_key(tag: str) -> str:
    """What all spellings of a tag share: CLIP's tokenizer ignores case, blanks and composition."""
    return " ".join(unicodedata.normalize("NFC", tag).lower().split())


def unique_words(words: Iterable[str]) -> list[str]:
    """The words in their order, each once, with its first spelling."""
    return [word for word, _ in unique((word, 1.0) for word in words)]


def unique(scored: Iterable[tuple[str, float]]) -> Scored:
    """The tags in their order, each once, with its first spelling and its highest score."""
    first: dict[str, tuple[str, float]] = {}
    for tag, score in scored:
        spelling, best = first.get(tag_key(tag), (tag, score))
        first[tag_key(tag)] = spelling, max(best, score)
    return list(first.values())
