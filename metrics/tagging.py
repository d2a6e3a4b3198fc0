"""How well the tags of a file name the classes in each image: precision, recall, mAP, what is never found.

Top to bottom: which classes a tag names, the counts, the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from errors import DataError
from loading.tags import Scored, tag_key
from metrics.report import mean_average_precision

SYNONYMS = Path(__file__).parents[1] / "labels" / "synonyms.txt"
SHOWN = 30  # classes in a sentence


def classes_named(prompts: Sequence[str], synonyms: Path = SYNONYMS) -> dict[str, set[int]]:
    """`tag_key` of a tag -> the classes that it names: those of this name or with this synonym."""
    classes = {tag_key(name): k for k, name in enumerate(prompts)}
    named = {name: {k} for name, k in classes.items()}
    try:
        lines = synonyms.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{synonyms} cannot be read as UTF-8 ({error}): restore it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, tags = line.partition(":")
        if not colon:
            raise DataError(f"{synonyms}, line {number}: write `class: tag, tag`, not {line[:80]!r}")
        if tag_key(name) in classes:
            for tag in tags.split(","):
                named.setdefault(tag_key(tag), set()).add(classes[tag_key(name)])
    return named


@dataclass
class TagReport:
    """n images, K classes."""

    prompts: Sequence[str]
    present: Tensor  # (n, K) bool: the class is in the image's labels
    scores: Tensor  # (n, K) the highest score of a tag that names the class, -1 without one
    tags: int  # tags of all images
    naming: int  # of these, those that name a class
    right: int  # of these, those that name a class in their image
    untagged: int  # images without a tag

    @property
    def found(self) -> Tensor:
        """`(n, K)` bool: some tag names the class, which is in the image."""
        return (self.scores >= 0) & self.present

    @property
    def precision(self) -> float:
        """Of the tags that name a class, the share that names one in the image; nan without any."""
        return self.right / self.naming if self.naming else float("nan")

    @property
    def recall(self) -> float:
        """Of all (image, class in it), the share that some tag names."""
        return float(self.found.sum() / self.present.sum())

    @property
    def mAP(self) -> float:
        """The mean average precision of the scores, over the classes that occur."""
        return mean_average_precision(self.scores, self.present)

    @property
    def never(self) -> list[str]:
        """The classes that occur and that no tag names in an image that shows them."""
        missed = self.present.any(0) & ~self.found.any(0)
        return [name for name, x in zip(self.prompts, missed.tolist(), strict=True) if x]

    def __str__(self) -> str:
        n, occur = len(self.present), self.present.any(0)
        K, chance = int(occur.sum()), self.present[:, occur].float().mean()
        names = ", ".join(self.never[:SHOWN]) + (", ..." if len(self.never) > SHOWN else "")
        return (
            f"precision {self.precision:.1%} of the {self.naming:,} of {self.tags:,} tags that name a class\n"
            f"recall {self.recall:.1%} of the {int(self.present.sum()):,} classes in the images\n"
            f"mAP {self.mAP:.1%} over {K} classes; chance {chance:.1%}\n"
            f"never found: {len(self.never)} of {K} classes{': ' + names if names else ''}\n"
            f"images without a tag: {self.untagged:,} of {n:,} ({self.untagged / n:.1%})"
        )


def measure_tags(
    tags: Mapping[str, Scored], present: Mapping[str, Sequence[int]], prompts: Sequence[str]
) -> TagReport:
    """Compare the tags of images with the classes `present` in their label maps, both by `Dataset.paths`."""
    named, n, K = classes_named(prompts), len(present), len(prompts)
    truth, scores = torch.zeros(n, K, dtype=torch.bool), torch.full((n, K), -1.0)
    naming = right = 0
    for i, (path, classes) in enumerate(present.items()):
        truth[i, list(classes)] = True
        for tag, score in tags[path]:
            if named_classes := named.get(tag_key(tag)):
                naming += 1
                right += any(k in classes for k in named_classes)
                for k in named_classes:
                    scores[i, k] = max(scores[i, k], score)
    counts = sum(len(tags[path]) for path in present), naming, right, sum(not tags[path] for path in present)
    return TagReport(prompts, truth, scores, *counts)
