"""The tags of many images, made once and written as they are made: of a training run, of any images."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from assemble import Tagger
from clip import PROMPT, TEMPLATES
from data import Dataset
from errors import DataError, RunError, TadaError
from loading.augment import normalise
from loading.stream import EvaluationStream
from loading.tags import TagSource, open_words
from model import Tada
from run.files import no_link, replace_text
from run.folder import Run
from run.options import Options
from run.ranks import Ranks
from weights.load import locate
from weights.ram import ram_folder, require_files
from weights.words import digest, digest_once, prior_files, word_vectors


def open_tags(
    run: Run, tada: Tada, *, options: Options, train_set: Dataset, val_set: Dataset, resumed: bool
) -> tuple[TagSource, TagSource]:
    """The tags of the images of training and of validation; the text vectors of known tags are cached."""
    paths = [*train_set.paths, *val_set.paths]
    tags, threshold = options.tags, options.tag_threshold
    words = open_words(options.condition, tags, train_set.prompts, options.data, paths, threshold)
    if tada.tagger is None:
        train_words = words
    else:
        table = tag_all(run, tada, dataset=train_set, workers=options.workers, resumed=resumed)
        train_words = TagSource(tags, train_set.prompts, table)
    if train_words.table:
        lists = [*train_words.table.values()]
        report_cut(run, tada, lists)
        if tada.config.condition != "caption" and tada.config.tag_tokens == "pooled":
            cache_vectors(tada, [word for words in lists for word in words])
    if tada.unet.conv_in.weight.is_cuda and tada.config.weights != "random":
        run.print0("encoding all tags that an image may have, once for each folder of weights")
        drop_text_tower(tada)
    return train_words, words


def drop_text_tower(tada: Tada) -> None:
    """Free CLIP's text tower, 0.5 GiB, once the model has the vectors of all words that it may be given."""
    config = tada.config
    if tada.uses_words:
        if config.condition == "caption" or config.tag_tokens == "prompt":
            return
        cache_vectors(tada, tada.tagger.keywords["names"] if config.tags == "ram" else config.prompts)
        tada.cache_words([""])
    tada.clip.text_model = None


def report_cut(run: Run, tada: Tada, lists: list[list[str]]) -> None:
    """Print how many of the texts that CLIP will encode are cut to its 77 tokens."""
    config = tada.config
    if config.condition == "caption" or config.tag_tokens == "prompt":
        texts = [", ".join(words) for words in lists]
    else:
        longest = max(TEMPLATES if config.templates > 1 else (PROMPT,), key=len)
        texts = [longest.format(word) for word in sorted({word for words in lists for word in words})]
    cut = tada.tokenizer.too_long(texts)
    if cut:
        run.print0(f"{len(cut):,} of {len(texts):,} texts are cut to 77 tokens, such as {cut[0][:60]!r}")


def cache_vectors(tada: Tada, words: Sequence[str]) -> None:
    """Give the model the text vectors of words, all or none new, from the cache on disk if it has them."""
    config, words = tada.config, sorted({*words} - {""})
    if not {*words} <= tada.rows.keys():
        tada.add_words(
            words, word_vectors(config.weights, tada.clip, tada.tokenizer, words, config.templates)
        )


def tag_all(run: Run, tada: Tada, dataset: Dataset, workers: int, resumed: bool) -> dict[str, list[str]]:
    """The tagger's tags of every training image, kept in `tags-train.jsonl` of the run folder.

    A new run uses a file that an earlier start left there only if the same tagger made it.
    """
    box = tada.config.box or (None, None)
    stream = EvaluationStream(dataset, *box, workers=workers, device=run.ranks.device.type)
    paths = {path: i for i, path in enumerate(dataset.paths)}

    def images(todo: list[str]) -> Iterator[list[tuple[str, Tensor]]]:
        for item in stream.items(paths[path] for path in todo):
            yield [(item.path, item.image)]  # one by one: the sizes differ

    file = run.folder / "tags-train.jsonl"
    whole = file.with_suffix(".sha256")  # its hash, once all images are tagged
    changed = file.is_file() and whole.is_file() and digest(file).encode() != whole.read_bytes()
    if resumed and changed:
        cure = "restore it, or start over with --fresh (keeps the run)"
        raise RunError(f"{file} changed after it was written: {cure}")
    run.ranks.barrier()
    config = tada.config
    settings = config.tag_threshold, config.prompts, box, dataset.names(0)
    by = f"{config.tags} {tagger_key(config.tags, config.weights, *settings)}"
    if resumed and file.is_file():  # its options are those of this run
        by = made_by(file)
    elif run.ranks.is_main and (changed or not file.is_file() or made_by(file) != by):
        for old in (file, whole):
            old.unlink(missing_ok=True)
    run.ranks.barrier()
    run.print0(f"{file}: tags of {len(paths):,} training images by {config.tags}")
    tag_images(file, [*paths], images, tada.tagger, run.ranks, by)
    if run.ranks.is_main:
        replace_text(whole, digest(file))
    entries = map(json.loads, read_tag_lines(file, by).values())
    return {entry["image"]: [tag for tag, _ in entry["tags"]] for entry in entries}


# ---- the file of tags


def tagger_key(source: str, weights: str | Path, *settings: object) -> str:
    """Eight hex digits of the hash of a tagger's files and settings: "clip" or "ram"."""
    if source == "ram":
        files = [ram_folder(weights) / name for name in require_files(ram_folder(weights))]
    else:
        names = [] if str(weights) == "random" else prior_files(str(weights), ("clip", "tokenizer"))
        files = [locate(weights) / name for name in names]
    hashes = [digest_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((hashes, settings)).encode()).hexdigest()[:8]


def tag_images(
    file: Path,
    paths: Sequence[str],
    images: Callable[[list[str]], Iterable[list[tuple[str, Tensor | DataError]]]],
    tagger: Tagger,
    ranks: Ranks,
    by: str = "",
) -> list[str]:
    """Append a line for every image that `file` lacks, as soon as it is tagged; return what was unreadable.

    `images` yields batches of paths and uint8 images `(3, H, W)` of one size, or the error of a file. The
    ranks share the work; all return the sentences of all. Finally the lines are in the order of `paths`.
    Raises OSError when the disk is full: finished lines stay, and another call resumes from them.
    """
    done = read_tag_lines(file, by)
    if ranks.is_main and file.is_file():
        replace_text(file, "".join(done.values()))  # without a cut line
    todo, broken = [path for path in paths if path not in done][ranks.rank :: ranks.world], []
    ranks.barrier()  # only now may the file grow
    with tqdm(total=len(todo), desc="tagging", disable=None if ranks.is_main else True) as bar:
        for batch in images(todo):
            broken += [str(image) for _, image in batch if isinstance(image, DataError)]
            good = [(path, image) for path, image in batch if not isinstance(image, DataError)]
            if good:
                x = normalise(torch.stack([image for _, image in good]).to(ranks.device))
                entries = [(path, tags) for (path, _), tags in zip(good, tagger(x), strict=True)]
                lines = [{"image": path, "tags": tags} | ({"by": by} if by else {}) for path, tags in entries]
                append(file, "".join(json.dumps(line) + "\n" for line in lines))
            bar.update(len(batch))
    broken = ranks.all_gather_object(broken)
    if ranks.is_main:
        lines = read_tag_lines(file, by)
        order = {path: i for i, path in enumerate(paths)}
        ordered = sorted(lines, key=lambda path: order.get(path, len(order)))
        if ordered != [*lines]:
            replace_text(file, "".join(lines[path] for path in ordered))
    ranks.barrier()
    return broken


def append(file: Path, text: str) -> None:
    """Append whole lines, of one process at a time, and flush them to the disk."""
    try:
        with open(file, "a", encoding="utf-8", opener=no_link) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OSError(
            f"{file} cannot be written ({error.strerror}): finished lines stay, run again"
        ) from None


def made_by(file: Path) -> str:
    """The tagger of the first line; "" if it does not say, as in older runs, or is cut."""
    with file.open("rb") as f, suppress(ValueError, AttributeError, RecursionError):
        return str(json.loads(f.readline()).get("by", ""))
    return ""


def read_tag_lines(file: Path, by: str = "") -> dict[str, str]:
    """Path -> its line. A last line that a kill or a full disk cut is left out.

    Raises TadaError for a line that another tagger than `by` made.
    """
    *whole, _ = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    lines: dict[str, str] = {}
    for number, line in enumerate(whole, 1):
        try:
            entry = json.loads(line.decode("utf-8"))
            path, made = entry["image"], entry.get("by", "")
            assert isinstance(path, str) and all(isinstance(tag, str) for tag, _ in entry["tags"])
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
            cure = "delete the line, or give another file"
            raise TadaError(f"{file}, line {number}, is not of a tagger: {cure}") from None
        if made != by:
            maker = made or "another program"
            raise TadaError(f"{file}, line {number}, was made by {maker}, not by {by}: give another file")
        lines[path] = line.decode("utf-8") + "\n"
    return lines
