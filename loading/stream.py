"""The order of samples, and batches in that order: the same for any number of ranks, workers and restarts.

    stream = TrainStream(dataset, Augment(crop=(512, 512), short=512, long=2048), batch=16, seed=0)
    for batch in stream.batches(position): ...  # `position`: global samples done, for resuming

Nothing here reads or moves a global random state: a sample is a function of (seed, epoch, index), the order
one of (seed, position). Images and labels stay bytes; `normalise` in loading/augment.py makes the model's
floats.
"""

import atexit
import math
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data import Dataset
from errors import DataError, DataWarning, RunError, Unreadable
from images.panoptic import Segment
from images.read import IGNORE, Size
from loading.augment import Augment, evaluation
from loading.jitter import Jitter
from mask2former import Rand

ORDER, SAMPLE, POINTS = 1, 2, 3  # keep the uses of a seed apart
TOLERATED = 0.01  # of the images may be unreadable; which of them were is in the output


def randomness(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample: on any rank, in any worker, after any resumption the same."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


def points_of(seed: int, position: int, device: torch.device) -> Rand:
    """Draws the points of one sample's loss: a function of (seed, position), whatever the ranks."""
    number = np.random.default_rng((POINTS, seed, position)).integers(2**63)
    return partial(torch.rand, generator=torch.Generator(device).manual_seed(int(number)))


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((ORDER, seed, epoch)).permutation(length)


@dataclass(frozen=True)
class Order:
    """Position in global samples -> (epoch, index): one permutation of 0..length-1 after the other."""

    length: int
    seed: int

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        return epoch, int(permutation(self.length, self.seed, epoch)[place])


def shard(start: int, count: int, rank: int, world: int, accumulate: int = 1) -> list[range]:
    """The positions that `rank` loads for the step of `count` samples from `start`, one range a micro-batch.

    The ranges of all ranks and micro-batches are disjoint, equally long, and together start..start+count-1:
    however a batch is divided, the step sees the same samples.
    """
    size, rest = divmod(count, world * accumulate)
    if rest or not size:
        parts = f"{world} ranks x {accumulate} micro-batches: use a multiple of {world * accumulate}"
        raise DataError(f"a batch of {count} cannot be divided into {parts}")
    firsts = [start + (a * world + rank) * size for a in range(accumulate)]
    return [range(first, first + size) for first in firsts]


class Item(NamedTuple):
    """One sample; the fields with defaults where the data set has segments."""

    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) uint8
    present: list[int]  # the classes of the whole image, of which training sees a crop
    position: int  # in global samples; in evaluation the index
    path: str
    skipped: list[str]  # a sentence for every unreadable file that this sample replaces
    owners: Tensor | None = None  # as in `View`
    classes: Tensor | None = None
    size: Size | None = None
    ids: np.ndarray | None = None  # (H, W) int32, in evaluation
    segments: Sequence[Segment] = ()


class Batch(NamedTuple):
    """One micro-batch of one rank, b items; bytes travel to the device, then `normalise` and `.long()`."""

    image: Tensor  # (b, 3, H, W) uint8
    labels: Tensor  # (b, H, W) uint8
    present: list[list[int]]
    positions: list[int]
    paths: list[str]
    skipped: list[str]
    owners: Tensor | None = None  # (b, H, W) int16; this and the next of samples with segments
    classes: list[Tensor] | None = None  # b times (T,) int64
    sizes: list[Size] | None = None


@dataclass
class TrainStream:
    """The training samples of one rank in their global order, endlessly, starting at any position.

    A file that cannot be decoded is named in a DataWarning and in its batch, and replaced by the next index.
    A label file with wrong content is a DataError.
    """

    dataset: Dataset
    augmentation: Augment | Jitter
    _: KW_ONLY
    batch: int
    seed: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        shard(0, self.batch, self.rank, self.world, self.accumulate)  # refuses a batch that cannot be divided
        self.order = Order(len(self.dataset), self.seed)

    def batches(self, position: int = 0) -> Iterator[Batch]:
        """Micro-batches, `accumulate` per step, from the step that starts at global sample `position`."""
        for batch in load_in_order(self, self.micro_batches(position), collate, self.workers, self.device):
            for sentence in batch.skipped:
                warnings.warn(f"{sentence}; another image takes its place", DataWarning, stacklevel=2)
            yield batch

    def refuse_many(self, replaced: int, position: int) -> None:
        """Raise RunError if `replaced` of the samples before `position`, over all ranks, are more than one,
        or 1 % of the images, for each epoch begun.
        """
        images = len(self.dataset)
        if replaced > math.ceil(position / images) * max(1, TOLERATED * images):
            share = f"{replaced} of the first {position:,} samples could not be read"
            limit = f"more than one, or {TOLERATED:.0%} of the images, an epoch"
            raise RunError(f"{share}, {limit}: repair or remove what is named above, give --fresh")

    def micro_batches(self, position: int) -> Iterator[range]:
        while True:
            yield from shard(position, self.batch, self.rank, self.world, self.accumulate)
            position += self.batch

    def __getitem__(self, position: int) -> Item | DataError:
        epoch, index = self.order(position)
        skipped: list[str] = []
        for i in range(index, index + min(len(self.dataset), 100)):
            try:
                return self.sample(position, epoch, i % len(self.dataset), skipped)
            except Unreadable as error:
                skipped.append(str(error))
            except DataError as error:
                return error  # raised in the main process: a worker would wrap it into a traceback
        return DataError(f"{len(skipped)} images in a row cannot be read, such as: {skipped[-1]}")

    def sample(self, position: int, epoch: int, index: int, skipped: list[str]) -> Item:
        rng = randomness(self.seed, epoch, index)
        ratio = rng.uniform(*self.augmentation.ratios)
        sample = self.dataset.load(index, *self.augmentation.box(ratio))
        image, labels, *targets = self.augmentation(sample, ratio, rng)
        present, path = classes_in(sample.labels), self.dataset.paths[index]
        return Item(image, labels, present, position, path, skipped, *targets)


def collate(items: list[Item | DataError]) -> Batch | DataError:
    """The items as one batch, or the first error."""
    if errors := [item for item in items if isinstance(item, DataError)]:
        return errors[0]
    images, labels, present, positions, paths, skipped, owners, classes, sizes, *_ = zip(*items, strict=True)
    maps, lists = (torch.stack(images), torch.stack(labels)), map(list, (present, positions, paths))
    batch = Batch(*maps, *lists, list(chain(*skipped)))
    if owners[0] is None:
        return batch
    return batch._replace(owners=torch.stack(owners), classes=list(classes), sizes=list(sizes))


def classes_in(labels: np.ndarray | Tensor) -> list[int]:
    """The classes of a label map, in order."""
    return np.flatnonzero(np.bincount(np.asarray(labels).ravel(), minlength=256)[:IGNORE]).tolist()


@dataclass
class EvaluationStream:
    """Images resized into a box (not if `short` is None), labels and segments at the original size."""

    dataset: Dataset
    short: int | None
    long: int | None
    workers: int = 0
    device: str = "cpu"

    def items(self, indices: Iterable[int]) -> Iterator[Item]:
        """One Item per index, in this order; a file that cannot be read is a DataError with its path."""
        yield from load_in_order(self, ([i] for i in indices), itemgetter(0), self.workers, self.device)

    def __getitem__(self, i: int) -> Item | DataError:
        try:
            sample = self.dataset.load(i, self.short, self.long)
        except DataError as error:
            return error
        image, labels = evaluation(sample.image, sample.labels, self.short, self.long)
        item = Item(image, labels, classes_in(labels), i, self.dataset.paths[i], [])
        return item._replace(ids=sample.ids, segments=sample.segments)


def load_in_order(
    items: "TrainStream | EvaluationStream",
    groups: Iterable[Iterable[int]],
    combine: Callable[[list], Any],
    workers: int,
    device: str,
) -> Iterator:
    """combine([items[i] for i in group]) of each group, made ahead by `workers`; raises any DataError."""
    loader = DataLoader(
        items,
        batch_sampler=groups,
        collate_fn=combine,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # without one, opening the iterator draws from the global generator
    )
    batches = iter(loader)
    # Workers that ignore SIGTERM must be shut down, or Python would wait for them forever at its exit.
    end = batches._shutdown_workers if workers else lambda: None
    atexit.register(end)
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        cure = "free memory or enlarge /dev/shm, or give fewer --workers"
        raise DataError(f"a loading process died ({str(error).splitlines()[0]}): {cure}") from None
    finally:
        atexit.unregister(end)
        end()


def in_order(pool: Executor, work: Callable[[Any], Any], inputs: Iterable[Any], ahead: int) -> Iterator[Any]:
    """work(x) of each input, in order, by the threads of `pool`, which are at most `ahead` results ahead."""
    futures = deque()
    for x in inputs:
        futures.append(pool.submit(work, x))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def ignore_signals(worker: int) -> None:
    """These reach the whole process group: the main process handles them, its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
