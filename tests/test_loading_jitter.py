"""loading/jitter.py: the jitter against detectron2's rules, targets, batches for any ranks and restart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import damage, noise
from test_data_panoptic import own
from test_loading_augment import colour_of, far_from_others, painted

from data import Sample, open_dataset
from errors import DataWarning
from images.panoptic import Segment, positions, semantic
from loading.augment import nearest
from loading.jitter import UNOWNED, Jitter, fit_into, masks_of
from loading.stream import EvaluationStream, TrainStream, randomness

SEGMENTS = [Segment(70_000, 1, False), Segment(1, 0, True), Segment(9, 0, True, True)]


def picture(H: int, W: int) -> tuple[Image.Image, np.ndarray]:
    """Void above, stuff, a thing on the left, a crowd on the right."""
    ids = np.zeros((H, W), np.int32)
    ids[H // 4 :] = 70_000
    ids[H // 2 :, : W // 3] = 1
    ids[H // 2 :, -W // 4 :] = 9
    return Image.fromarray(noise(H, W)), ids


def jitter(image, ids, segments, crop, rng, scales=(0.1, 2.0)):
    """A sample as the stream jitters it: the ratio is the first number drawn."""
    augmentation = Jitter(crop, scales)
    sample = Sample(image, semantic(ids, segments), ids, segments)
    return augmentation(sample, rng.uniform(*augmentation.ratios), rng)


def rules(ids: np.ndarray, crop, rng) -> tuple[np.ndarray, int, int]:
    """The ids that detectron2 would show: mirror, then resize, then crop. And what of the crop they fill."""
    scale, mirror, place = rng.uniform(0.1, 2.0), rng.random() < 0.5, rng.random()
    ids = ids[:, ::-1] if mirror else ids
    H, W = ids.shape
    ratio = min(crop[0] * scale / H, crop[1] * scale / W)
    size = max(round(H * ratio), 1), max(round(W * ratio), 1)
    ids = nearest(ids, size, (0, 0, *size))
    top, left = round(max(size[0] - crop[0], 0) * place), round(max(size[1] - crop[1], 0) * place)
    shown = ids[top : top + crop[0], left : left + crop[1]]
    return shown, *shown.shape


@pytest.mark.parametrize("size", [(40, 60), (61, 33)])
def test_the_jitter_is_detectron2s(size):
    """Both orders of mirroring and resizing take the same label but where a centre falls between two."""
    image, ids = picture(*size)
    crop, filled, heights = (32, 48), 0, set()
    for seed in range(60):
        found = jitter(image, ids, SEGMENTS, crop, randomness(seed, 0, 0))
        shown, h, w = rules(ids, crop, randomness(seed, 0, 0))
        assert found.image.shape == (3, *crop)
        assert found.labels.shape == found.owners.shape == crop
        assert found.size == (h, w)
        padding = torch.ones(crop, dtype=torch.bool)
        padding[:h, :w] = False
        assert (found.image[:, padding] == 128).all()
        assert (found.labels[padding] == 255).all()
        assert (found.owners[padding] == UNOWNED).all()
        differ = found.labels[:h, :w].numpy() != semantic(np.ascontiguousarray(shown), SEGMENTS)
        assert differ.mean() <= 0.08
        filled += h == crop[0]
        heights.add(h)
    assert 10 < filled < 50  # some are smaller than the crop, some larger
    assert len(heights) > 8


def test_owners_classes_and_pixels_belong_together():
    """Colour the image by its ids: every pixel of a segment then shows that segment's colour."""
    _, ids = picture(48, 64)
    colour = {0: 0, 70_000: 80, 1: 160, 9: 240}
    grey = np.select([ids == id for id in colour], [*colour.values()]).astype(np.uint8)
    image = Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
    for seed in range(30):
        found = jitter(image, ids, SEGMENTS, (40, 40), randomness(seed, 1, 2))
        masks = masks_of(found.owners, len(found.classes))
        assert masks.shape == (len(found.classes), 40, 40)
        assert masks.flatten(1).any(1).all()  # what the crop does not show is not asked for
        assert torch.equal(masks.sum(0), (found.owners != UNOWNED).long())
        for k, mask in zip(found.classes.tolist(), masks, strict=True):
            middle = np.median(found.image[0][mask].numpy())
            assert abs(middle - {1: 80, 0: 160}[k]) <= 60  # bilinear, so blurred where it is tiny
            assert (found.labels[mask] == k).all()
        crowd = (found.labels != 255) & (found.owners == UNOWNED)
        assert (found.labels[crowd] == 0).all()


@given(painted(), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60)
def test_image_labels_and_owners_stay_together(sample, crop, seed, crowd):
    """Any sizes: an id is a label and a colour; no label, class or owner is new, and each owns a pixel."""
    image, shades = sample
    ids = np.where(shades == 255, 0, shades.astype(np.int32) * 257 + 5)
    labels = {id: (id - 5) // 257 for id in np.unique(ids).tolist() if id}
    segments = [Segment(id, k, k != 7, crowd and k == 1) for id, k in labels.items()]
    found = jitter(image, ids, segments, crop, randomness(seed, 0, 0))
    target, owners, classes = found.labels.numpy(), found.owners.numpy(), found.classes.numpy()
    assert set(np.unique(target)) <= {*labels.values(), 255}
    assert set(np.unique(owners)) - {UNOWNED} == {*range(len(classes))}
    owned = owners != UNOWNED
    assert (classes[owners[owned]] == target[owned]).all()
    lone = [s.label for s in segments if s.crowd]
    assert (owned == ((target != 255) & ~np.isin(target, lone))).all()
    h, w = found.size
    assert not owned[h:].any() and not owned[:, w:].any()
    ratio = randomness(seed, 0, 0).uniform(0.1, 2.0)
    shown = fit_into(ids.shape, (crop[0] * ratio, crop[1] * ratio))
    scale = max(x / y for x, y in zip(shown, ids.shape, strict=True))
    sure = far_from_others(target, scale) & (target != 255)
    assert (found.image.permute(1, 2, 0).numpy() == np.asarray(colour_of(target)))[sure].all()


def test_no_segment_at_all():
    image, _ = picture(20, 30)
    crowd = [Segment(9, 0, True, True)]
    for ids, segments in ((np.zeros((20, 30), np.int32), []), (np.full((20, 30), 9, np.int32), crowd)):
        found = jitter(image, ids, segments, (16, 16), randomness(0, 0, 0))
        assert found.classes.shape == (0,)
        assert found.classes.dtype == torch.int64
        assert (found.owners == UNOWNED).all()
        assert masks_of(found.owners, 0).shape == (0, 16, 16)


def test_fit_into_is_resize_scale():
    assert fit_into((427, 640), (640 * 0.5, 640 * 0.5)) == (214, 320)
    assert fit_into((640, 427), (64, 64)) == (64, 43)
    assert fit_into((10, 4000), (64, 64)) == (1, 64)
    assert fit_into((100, 100), (50, 200)) == (50, 50)


def test_more_than_a_hundred_segments():
    ids = np.arange(1, 401, dtype=np.int32).reshape(20, 20)
    segments = [Segment(id, id % 3, True) for id in range(1, 401)]
    image = Image.fromarray(noise(20, 20))
    found = jitter(image, ids, segments, (20, 20), randomness(0, 0, 0), scales=(1, 1))
    assert len(found.classes) == 400
    assert (masks_of(found.owners, 400).sum((1, 2)) == 1).all()


# ---- batches ---------------------------------------------------------------------------------------------


def stream(dataset, scales=(0.1, 2.0), **options) -> TrainStream:
    return TrainStream(dataset, Jitter((24, 32), scales), **{"batch": 4, "seed": 5} | options)


def take(batches, n: int) -> dict[int, tuple]:
    found = {}
    for _ in range(n):
        b = next(batches)
        for i, position in enumerate(b.positions):
            tensors = (b.image[i], b.labels[i], b.owners[i], b.classes[i])
            facts = (b.sizes[i], b.present[i], b.paths[i])
            found[position] = (*(x.numpy().tobytes() for x in tensors), *facts)
    return found


def test_ranks_micro_batches_workers_and_resumption_change_no_sample(tmp_path):
    dataset = open_dataset("panoptic", own(tmp_path, pictures=5), "train")
    expected = take(stream(dataset).batches(), 5)
    assert sorted(expected) == [*range(20)]
    assert len({sample[0] for sample in expected.values()}) > 15  # another jitter in each epoch
    for world, accumulate, workers in ((2, 1, 0), (1, 2, 1), (2, 2, 0)):
        found = {}
        for rank in range(world):
            options = {"world": world, "accumulate": accumulate, "workers": workers}
            found |= take(stream(dataset, rank=rank, **options).batches(), 5 * accumulate)
        assert found == expected
    assert take(stream(dataset).batches(8), 3) == {p: s for p, s in expected.items() if p >= 8}
    assert take(stream(dataset, seed=6).batches(), 5) != expected


def test_present_is_the_whole_image_and_a_damaged_file_is_replaced(tmp_path):
    own(tmp_path, pictures=3)
    damage(tmp_path / "annotations/panoptic_train/1.png", "cut")
    batches = stream(open_dataset("panoptic", tmp_path, "train"), batch=3).batches()
    with pytest.warns(DataWarning, match="panoptic_train/1.png .*another image takes its place"):
        batch = next(batches)
    assert sorted(batch.paths) in (["train/0.png", "train/2.png", "train/2.png"],)
    assert batch.present == 3 * [[0, 1]]


def test_scenes_are_batched_too():
    batch = next(stream(open_dataset("scenes", "", "train"), scales=(0.5, 2)).batches())
    assert batch.image.shape == (4, 3, 24, 32)
    assert batch.owners.dtype == torch.int16
    assert all(owners.max() == len(classes) - 1 for owners, classes in zip(batch.owners, batch.classes))


def test_evaluation_keeps_the_truth_at_its_own_size(tmp_path):
    dataset = open_dataset("panoptic", own(tmp_path), "val")
    for workers in (0, 1):
        items = list(EvaluationStream(dataset, 48, 192, workers).items([1, 0]))
        assert [item.position for item in items] == [1, 0]
        assert items[0].image.shape == (3, 48, 72)
        assert items[0].labels.shape == items[0].ids.shape == (24, 36)
        assert items[0].present == [0, 1]
        assert [s.id for s in items[0].segments] == [70_000, 1, 300, 4]
        assert (items[0].labels.numpy() == semantic(items[0].ids, items[0].segments)).all()
        assert (positions(items[0].ids, items[0].segments) >= 0).sum() == (items[0].ids > 0).sum()
