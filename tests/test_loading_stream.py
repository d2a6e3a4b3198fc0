"""loading/stream.py: the order of samples, batches for any ranks, workers and restart, unreadable files."""

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import damage, folder, names, noise, save

from data import Dataset, Sample, open_dataset
from errors import DataError, DataWarning, RunError
from loading import stream as module
from loading.augment import Augment
from loading.stream import EvaluationStream, Order, TrainStream, in_order, permutation, randomness, shard

# ---- the order -------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(length, seed, epoch):
    order = Order(length, seed)
    seen = [order(position) for position in range(epoch * length, (epoch + 1) * length)]
    assert {e for e, _ in seen} == {epoch}
    assert sorted(i for _, i in seen) == [*range(length)]


def test_epochs_and_seeds_differ():
    orders = [[Order(50, seed)(50 * epoch + i)[1] for i in range(50)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    first = [randomness(*key).random() for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))]
    assert len(set(first)) == 4
    assert first[0] == first[4]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_all_ranks_together_load_each_global_batch_once(world, accumulate, size, length, start):
    """For any ranks, micro-batches, step and length, also one below the batch; so each epoch is complete."""
    batch = world * accumulate * size
    parts = [shard(start, batch, rank, world, accumulate) for rank in range(world)]
    assert all(len(part) == accumulate and {len(x) for x in part} == {size} for part in parts)
    assert sorted(p for part in parts for x in part for p in x) == [*range(start, start + batch)]

    order, steps = Order(length, seed=3), -(-length // batch)
    loaded = [
        order(p)
        for step in range(steps)
        for rank in range(world)
        for x in shard(step * batch, batch, rank, world, accumulate)
        for p in x
    ]
    assert sorted(i for epoch, i in loaded if epoch == 0) == [*range(length)]


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(
        DataError, match="a batch of 16 cannot be divided into 3 ranks x 2 .* a multiple of 6"
    ):
        shard(0, 16, 0, 3, 2)
    with pytest.raises(DataError, match="a batch of 2 cannot be divided"):
        dataset = open_dataset("folder", folder(tmp_path), "train")
        TrainStream(dataset, Augment((8, 8), 8, 32), batch=2, seed=0, world=4)


# ---- batches ---------------------------------------------------------------------------------------------


def stream(dataset, crop=(16, 24), short=24, long=96, **options) -> TrainStream:
    return TrainStream(dataset, Augment(crop, short, long), **{"batch": 4, "seed": 5} | options)


def take(batches, n: int) -> dict[int, tuple]:
    """The samples of the next n batches by position."""
    found = {}
    for _ in range(n):
        batch = next(batches)
        for i, position in enumerate(batch.positions):
            found[position] = (
                batch.image[i].numpy().tobytes(),
                batch.labels[i].numpy().tobytes(),
                batch.paths[i],
            )
    return found


def test_ranks_micro_batches_workers_and_resumption_change_no_sample(tmp_path):
    """7 images, batches of 4, 6 steps: more than three epochs."""
    dataset = open_dataset("folder", folder(tmp_path, pictures=7), "train")
    expected = take(stream(dataset).batches(), 6)
    assert sorted(expected) == [*range(24)]
    assert {expected[p][2] for p in range(7)} == set(names(dataset))
    assert len({image for image, _, _ in expected.values()}) == 24  # another augmentation in each epoch
    for world, accumulate, workers in ((2, 1, 0), (1, 2, 2), (2, 2, 1), (4, 1, 0)):
        found = {}
        for rank in range(world):
            options = {"world": world, "accumulate": accumulate, "workers": workers}
            found |= take(stream(dataset, rank=rank, **options).batches(), 6 * accumulate)
        assert found == expected
    for position in (4, 8, 20):
        resumed = take(stream(dataset).batches(position), (24 - position) // 4)
        assert resumed == {p: sample for p, sample in expected.items() if p >= position}


class Numbered(Dataset):
    """n images whose one pixel is their number."""

    def __init__(self, n: int):
        super().__init__("numbered", "train", ["a"], np.zeros((1, 3), np.uint8), [str(i) for i in range(n)])

    def load(self, i: int, short: int | None = None, long: int | None = None) -> Sample:
        return Sample(Image.new("RGB", (1, 1), (i, 0, 0)), np.zeros((1, 1), np.uint8))


@given(st.data(), st.integers(1, 70), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40)
def test_the_samples_of_a_step_do_not_depend_on_how_it_is_split(data, n, world, accumulate, size):
    """Any number of images, ranks, micro-batches, workers; from any step: one permutation after the other."""
    batch, seed, first = (
        world * accumulate * size,
        data.draw(st.integers(0, 2**32)),
        data.draw(st.integers(0, 9)),
    )
    steps = data.draw(st.integers(1, 4))
    workers = data.draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2]))
    augmentation = Augment((1, 1), 1, 1, ratios=(1.0, 1.0), colours=False)
    parts = {"batch": batch, "seed": seed, "world": world, "accumulate": accumulate, "workers": workers}
    found = {}
    for rank in range(world):
        batches = TrainStream(Numbered(n), augmentation, rank=rank, **parts).batches(first * batch)
        for micro in islice(batches, steps * accumulate):
            shown = micro.image[:, 0, 0, 0].tolist()
            assert [str(x) for x in shown] == micro.paths and len(shown) == size
            assert not found.keys() & set(micro.positions)
            found |= dict(zip(micro.positions, shown, strict=True))
        batches.close()
    places = range(first * batch, (first + steps) * batch)
    epochs = range(places[0] // n, places[-1] // n + 1)
    order = {epoch: permutation(n, seed, epoch).tolist() for epoch in epochs}
    assert found == {place: order[place // n][place % n] for place in places}
    assert all(sorted(x) == [*range(n)] for x in order.values())


def test_one_image_fills_a_batch(tmp_path):
    dataset = open_dataset("folder", folder(tmp_path, pictures=1), "train")
    batch = next(stream(dataset, batch=8).batches())
    assert (batch.image.shape, batch.labels.shape) == ((8, 3, 16, 24), (8, 16, 24))
    assert (batch.image.dtype, batch.labels.dtype) == (torch.uint8, torch.uint8)
    assert batch.paths == ["images/train/000.png"] * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_random_state_is_read_or_moved(tmp_path, workers):
    """torch, numpy and random stay where they were; other states there give the same samples."""
    dataset = open_dataset("folder", folder(tmp_path), "train")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()
        found.append(take(stream(dataset, workers=workers).batches(), 2))
        items = [*EvaluationStream(dataset, 24, 96, workers=workers).items(range(3))]
        assert [item.position for item in items] == [0, 1, 2]
        after = torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()
        assert before == after
    assert found[0] == found[1]


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Handlers:
    """A data set that tells how its process treats signals."""

    def __len__(self):
        return 4

    @property
    def paths(self):
        return [str([signal.getsignal(number) == signal.SIG_IGN for number in STOPPING])] * 4

    def load(self, i, short=None, long=None):
        return Sample(Image.new("RGB", (30, 20)), np.zeros((20, 30), np.uint8))


def test_workers_ignore_the_signals_that_stop_the_main_process():
    before = [signal.getsignal(number) for number in STOPPING]
    assert next(stream(Handlers(), workers=1).batches()).paths == ["[True, True, True]"] * 4
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_memory_is_pinned_for_cuda_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "DataLoader", lambda *a, pin_memory, **k: asked.append(pin_memory) or [])
    for device in ("cpu", "cuda", "cuda:1"):
        list(stream(Handlers(), device=device).batches())
    assert asked == [False, True, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next(tmp_path, workers):
    """Named in a warning; the sample in its place is what its own index gives in this epoch."""
    root = folder(tmp_path, pictures=12)
    good = open_dataset("folder", root, "train")
    clean = stream(good)
    damage(root / "images/train/003.png", "cut")
    (root / "labels/train/004.png").write_bytes(b"")
    broken = stream(open_dataset("folder", root, "train"), workers=workers)
    batches = broken.batches()
    with pytest.warns(DataWarning) as caught:
        found = take(batches, 3)
    sentences = [str(warning.message) for warning in caught]
    assert sorted(re.search(r"\w+/train/\d+\.png", sentence)[0] for sentence in sentences) == [
        "images/train/003.png",
        "labels/train/004.png",
        "labels/train/004.png",  # once in its place, once as the stand-in for 003
    ]
    order = Order(12, 5)
    for position, (image, _, path) in found.items():
        epoch, index = order(position)
        index = 5 if index in (3, 4) else index
        assert path == good.paths[index]
        assert image == clean.sample(position, epoch, index, []).image.numpy().tobytes()


@pytest.mark.parametrize(("images", "an_epoch"), [(50, 1), (199, 1), (200, 2), (350, 3), (1000, 10)])
def test_one_image_or_one_percent_an_epoch_may_be_unreadable(images, an_epoch):
    """Wherever in their epochs they are: the same files are met again in each."""
    refuse_many = stream(range(images)).refuse_many
    for position, epochs in ((1, 1), (images, 1), (images + 1, 2), (7 * images, 7)):
        refuse_many(epochs * images // 100 or 1, position)
        refuse_many(epochs * an_epoch, position)
        with pytest.raises(RunError, match=r"an epoch: repair or remove what is named above, give --fresh"):
            refuse_many(max(epochs, epochs * images // 100) + 1, position)


def test_nothing_readable_ends_at_once(tmp_path):
    root = folder(tmp_path, pictures=3)
    for i in range(3):
        damage(root / f"images/train/{i:03}.png", "empty")
    with pytest.raises(DataError, match="3 images in a row cannot be read"):
        next(stream(open_dataset("folder", root, "train")).batches())


def test_a_loading_process_that_ends_is_named(tmp_path, monkeypatch):
    """Killed for its memory, or for want of shared memory."""
    dataset = open_dataset("folder", folder(tmp_path, 4), "train")
    monkeypatch.setattr(dataset, "load", lambda *arguments: os._exit(9))
    with pytest.raises(DataError, match=r"a loading process died \(.*\): free memory .*--workers"):
        next(stream(dataset, workers=1).batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_labels_and_evaluation_files_are_named_in_one_sentence(tmp_path, workers):
    """Also from a worker: no traceback in the message. Evaluation does not skip an unreadable image."""
    root = folder(tmp_path, pictures=3)
    dataset = open_dataset("folder", root, "train")
    save(np.full((24, 36), 7, np.uint8), root / "labels/train/001.png")
    with pytest.raises(DataError, match=r"^\S*001\.png holds the value 7: labels here are 0\.\.1, 255$"):
        take(stream(dataset, workers=workers).batches(), 3)
    damage(root / "images/train/002.png", "cut")
    items = EvaluationStream(dataset, None, None, workers=workers).items([0, 2])
    item = next(items)
    assert (item.path, item.image.shape, item.labels.shape) == ("images/train/000.png", (3, 24, 36), (24, 36))
    with pytest.raises(DataError, match=r"^\S*images/train/002\.png cannot be read \(.*$") as caught:
        next(items)
    assert "\n" not in str(caught.value)


def test_large_images_are_decoded_reduced_in_training(tmp_path, monkeypatch):
    """The stream asks for the very box that augment draws; the samples hardly differ from whole decoding."""
    root = folder(tmp_path, pictures=1, size=(480, 720))
    save(noise(480, 720), root / "images/train/000.jpg", quality=95)
    (root / "images/train/000.png").unlink()
    dataset = open_dataset("folder", root, "train")
    load, decoded = dataset.load, []

    def spy(i, short=None, long=None):
        sample = load(i, short, long)
        decoded.append(((short, long), sample.image.size))
        return sample

    monkeypatch.setattr(dataset, "load", spy)
    reduced = next(stream(dataset, crop=(32, 48), short=48, long=192, batch=8).batches())
    boxes = [randomness(5, p, 0).uniform(0.5, 2) for p in range(8)]
    assert [box for box, _ in decoded] == [(int(48 * r), int(192 * r)) for r in boxes]
    assert {size for _, size in decoded} >= {(360, 240), (180, 120)}
    monkeypatch.setattr(dataset, "load", lambda i, short, long: load(i))
    whole = next(stream(dataset, crop=(32, 48), short=48, long=192, batch=8).batches())
    assert torch.equal(reduced.labels, whole.labels)
    assert (reduced.image.int() - whole.image.int()).abs().float().mean() < 1.5


def test_a_process_in_any_locale_ends_with_its_workers(tmp_path):
    """LANG=C and a folder with umlauts; an error while the loop is open, and the workers deaf to SIGTERM."""
    root = folder(tmp_path / "größe", pictures=2)
    program = """if True:
        import sys, data
        from loading import stream
        from loading.augment import Augment
        from loading.check import check
        dataset = data.open_dataset("folder", sys.argv[1], "train")
        print(len(check(dataset).sizes))
        batches = stream.TrainStream(dataset, Augment((8, 8), 8, 32), batch=2, seed=0, workers=2).batches()
        next(batches)
        raise SystemExit("the loop is open")
    """
    environment = {
        **os.environ,
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONPATH": str(Path(module.__file__).parents[1]),
    }
    command = [sys.executable, "-c", program, root]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "2\n", "the loop is open\n")


@pytest.mark.parametrize("ahead", [1, 3])
def test_threads_work_in_order_and_not_far_ahead(ahead):
    """The slowest first: results come in the order of the inputs, of which few are taken beforehand."""
    taken, done = [], []

    def inputs():
        for i in range(9):
            taken.append(i)
            yield i

    def work(i: int) -> int:
        time.sleep(0.03 * (i % 3 == 0))
        return i

    with ThreadPoolExecutor(4) as pool:
        for i in in_order(pool, work, inputs(), ahead):
            done.append(i)
            assert len(taken) - len(done) == min(ahead, 9 - len(done))
    assert done == taken == [*range(9)]
    with ThreadPoolExecutor(4) as pool, pytest.raises(ZeroDivisionError):
        [*in_order(pool, lambda i: 1 // i, [1, 0], ahead)]
