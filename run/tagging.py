"""The tags of the images of a training run: from a file, from the labels, or from CLIP, computed once."""

import json

from tqdm import tqdm

from data import Dataset
from loading.augment import normalise
from loading.stream import EvaluationStream
from loading.tags import TagSource, open_words
from model import Tada
from run.checkpoint import replace_text
from run.folder import Run
from run.options import Options
from weights.words import word_vectors


def open_tags(
    run: Run, tada: Tada, *, options: Options, train_set: Dataset, val_set: Dataset
) -> tuple[TagSource, TagSource]:
    """The tags of the images of training and of validation; the text vectors of a file's tags are cached."""
    paths = [dataset.path(i) for dataset in (train_set, val_set) for i in range(len(dataset))]
    words = open_words(options.condition, options.tags, train_set.prompts, options.data, paths)
    if words.table:
        cache_vectors(tada, sorted({word for tags in words.table.values() for word in tags} - {""}))
    if options.tags != "clip":
        return words, words
    table = tag_all(run, tada, dataset=train_set, workers=options.workers)
    return TagSource("clip", train_set.prompts, table), words


def cache_vectors(tada: Tada, words: list[str]) -> None:
    """Fill `tada.vectors` with the text vectors of words, from the cache on disk if it has them."""
    config = tada.config
    vectors = word_vectors(config.weights, tada.clip, tada.tokenizer, words, config.templates)
    tada.vectors |= zip(words, vectors, strict=True)


def tag_all(run: Run, tada: Tada, dataset: Dataset, workers: int) -> dict[str, list[str]]:
    """CLIP's tags of every training image, kept in the run folder's `tags-train.jsonl` for the next start."""
    file = run.folder / "tags-train.jsonl"
    if run.ranks.is_main and not file.is_file():
        run.print0(f"tagging {len(dataset):,} training images with CLIP")
        box = tada.config.box or (None, None)
        stream = EvaluationStream(dataset, *box, workers=workers, device=run.ranks.device.type)
        lines = []
        for item in tqdm(stream.items(range(len(dataset))), total=len(dataset), desc="tagging", disable=None):
            tags = tada.zero_shot_tags(normalise(item.image[None].to(run.ranks.device)))[0]
            lines.append(json.dumps({"image": item.path, "tags": tags}) + "\n")
        replace_text(file, "".join(lines))
    run.ranks.barrier()
    entries = map(json.loads, file.read_text().splitlines())
    return {entry["image"]: [tag for tag, _ in entry["tags"]] for entry in entries}
