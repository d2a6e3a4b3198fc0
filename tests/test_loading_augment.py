"""loading/augment.py: labels stay under their pixels, sizes, the share of one class, every step of colour."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from test_data import save

from data import Sample
from images.read import fit, read_image
from loading import augment as module
from loading.augment import (
    Augment,
    choose_window,
    evaluation,
    nearest,
    normalise,
    photometric,
    recolour,
    resize,
)


def augment(image, labels, crop, short, long, rng):
    """Image and labels of a sample, as the stream augments it: the ratio is the first number drawn."""
    augmentation = Augment(crop, short, long)
    ratio = rng.uniform(*augmentation.ratios)
    return augmentation(Sample(image, labels), ratio, rng)[:2]


def test_normalise():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert normalise(image)[1, :, 3, 4].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)
    assert normalise(image).dtype == torch.float32
    assert image[0, 1, 0, 0] == 51  # the input stays


def test_without_resizing_and_colours_an_image_is_mirrored_and_no_more():
    """Whatever its size: the crop is a part of it, padded if it is smaller."""
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (20, 30, 3), np.uint8), rng.integers(0, 9, (20, 30), np.uint8)
    augmentation = Augment((20, 30), 20, 80, ratios=(1.0, 1.0), colours=False)
    seen = set()
    for seed in range(20):
        view = augmentation(Sample(Image.fromarray(image), labels), 1.0, np.random.default_rng(seed))
        mirrored = not np.array_equal(view.labels, labels)
        expected = [x[:, ::-1] if mirrored else x for x in (image, labels)]
        assert np.array_equal(view.image.permute(1, 2, 0), expected[0])
        assert np.array_equal(view.labels, expected[1])
        seen.add(mirrored)
    assert seen == {False, True}


sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@given(sizes, sizes, st.data())
@settings(max_examples=100, deadline=None)
def test_a_window_is_that_part_of_the_whole(original, size, draw):
    """Labels: equal to the definition, pixel by pixel. Image: Pillow's whole resize, to rounding."""
    ends = [sorted(draw.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in size]
    (top, bottom), (left, right) = ends
    window = (top, left, bottom, right)
    labels = np.random.default_rng(0).integers(0, 256, original, dtype=np.uint8)
    found = nearest(labels, size, window)
    rows = [int((y + 0.5) * original[0] / size[0] + 1e-9) for y in range(top, bottom)]
    columns = [int((x + 0.5) * original[1] / size[1] + 1e-9) for x in range(left, right)]
    assert found.tolist() == [[labels[y, x] for x in columns] for y in rows]

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*original, 3), dtype=np.uint8))
    whole = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    part = np.asarray(resize(picture, original, size, window)).astype(int)
    assert part.shape == (bottom - top, right - left, 3)
    difference = np.abs(part - whole[top:bottom, left:right])
    assert difference.max() <= 2  # noise, rounded twice; at most 1 in all but a millionth of the pixels


def ramps(H: int, W: int) -> tuple[Image.Image, np.ndarray]:
    """Red grows with x, green with y; the labels are painted from the colour: 8 x 8 tiles."""
    red, green = np.meshgrid((np.arange(W) + 0.5) * 256 / W, (np.arange(H) + 0.5) * 256 / H)
    image = np.stack([red, green, 0 * red], axis=2).astype(np.uint8)
    return Image.fromarray(image), (image[..., 0] // 32 + 8 * (image[..., 1] // 32)).astype(np.uint8)


@given(
    st.integers(20, 90), st.integers(20, 90), st.integers(8, 70), st.integers(8, 70), st.integers(0, 10_000)
)
@settings(max_examples=60, deadline=None)
def test_labels_stay_under_their_colours(H, W, height, width, seed):
    """Through scale, crop, flip and padding a label is the tile its colour names, to half a source pixel."""
    image, labels = ramps(H, W)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "photometric", lambda image, rng: image)
        pixels, target = augment(image, labels, (height, width), 40, 160, np.random.default_rng(seed))
    assert (pixels.shape, target.shape) == ((3, height, width), (height, width))
    inside = target != 255
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert inside[:rows, :columns].all()  # padding is on the right and below
    assert (pixels[:, ~inside] == 128).all()
    pixels, target = pixels[:, inside].int(), target[inside].int()
    for colour, tile, step in ((pixels[0], target % 8, 256 / W), (pixels[1], target // 8, 256 / H)):
        slack = step / 2 + 2  # of nearest against bilinear, and rounding
        assert (colour >= 32 * tile - slack).all()
        assert (colour < 32 * (tile + 1) + slack).all()


@st.composite
def painted(draw):
    """Labels in two to nine rectangles, some of them ignored, and the image painted from them."""
    size = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    values = draw(st.lists(st.sampled_from([0, 1, 7, 254, 255]), min_size=9, max_size=9))
    cuts = [[0, *sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))), n] for n in size]
    rows, columns = (np.repeat(range(3), np.diff(cut)) for cut in cuts)
    labels = np.array(values, np.uint8).reshape(3, 3)[rows][:, columns]
    return colour_of(labels), labels


def colour_of(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([labels, 255 - labels, labels // 2], axis=2))


def far_from_others(labels: np.ndarray, scale: float) -> np.ndarray:
    """Pixels of the resized map that no filter can have mixed with others: two source pixels, or two here."""
    reach = 2 * int(np.ceil(2 + 2 * scale)) + 1
    whole = labels.astype(int)
    low, high = (f(whole, reach, mode="constant", cval=-1) for f in (minimum_filter, maximum_filter))
    return low == high


@given(
    painted(), st.tuples(st.integers(1, 80), st.integers(1, 80)), st.integers(4, 60), st.integers(0, 10_000)
)
@settings(max_examples=60)
def test_no_label_leaves_its_colour_and_none_is_new(sample, crop, short, seed):
    """Any sizes; the distortion of colours draws its numbers last and moves no label."""
    image, labels = sample
    results = []
    for colours in (False, True):
        rng = np.random.default_rng(seed)
        augmentation = Augment(crop, short, 4 * short, colours=colours)
        ratio = rng.uniform(*augmentation.ratios)
        results.append(augmentation(Sample(image, labels), ratio, rng))
    found, other = results
    assert torch.equal(found.labels, other.labels)
    target = found.labels.numpy()
    assert set(np.unique(target)) <= {*np.unique(labels), 255}
    scale = max(x / y for x, y in zip(fit(labels.shape, *augmentation.box(ratio)), labels.shape, strict=True))
    sure = far_from_others(target, scale) & (target != 255)  # 255 is padding, too
    pixels = found.image.permute(1, 2, 0).numpy()
    assert (pixels == np.asarray(colour_of(target)))[sure].all()


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (20, 400)])
def test_augment_resizes_into_the_drawn_box(size):
    """The first number drawn is the ratio; both sides of the box are scaled; then padding fills the crop."""
    image, labels = Image.new("RGB", size[::-1]), np.zeros(size, np.uint8)
    for seed in range(8):
        _, target = augment(image, labels, (200, 300), 64, 96, np.random.default_rng(seed))
        ratio = np.random.default_rng(seed).uniform(0.5, 2)
        h, w = fit(size, int(64 * ratio), int(96 * ratio))
        expected = torch.full((200, 300), 255)
        expected[:h, :w] = 0
        assert torch.equal(target.long(), expected)


def test_augment_mirrors_every_second_image_and_scales_evenly():
    """Half of 200 are flipped; ratios 0.5 to 2 are uniform; the crop lies anywhere."""
    image, labels = ramps(64, 64)
    flips, starts, scales = 0, [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "photometric", lambda image, rng: image)
        for seed in range(200):
            pixels, _ = augment(image, labels, (16, 24), 64, 256, np.random.default_rng(seed))
            red, green = pixels[0, 8].int(), pixels[1, :, 12].int()
            flips += int(red[0] > red[-1])
            scales.append(15 * 4 / max(int(green[-1] - green[0]), 1))
            starts.append(int(green[0]))
    assert 80 <= flips <= 120
    assert 0.45 < min(scales) < 0.6
    assert 1.8 < max(scales) < 2.2
    assert np.mean(scales) == pytest.approx(1.25, abs=0.1)
    assert min(starts) < 10
    assert max(starts) > 170


def test_crops_that_show_one_class_are_drawn_again():
    """Of two classes most crops hold at least 25 % of the rarer; of one class alone the 11th crop stays."""
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 50:] = 1
    labels[:10] = 255
    share = []
    for seed in range(100):
        window, cut = choose_window(labels, (100, 100), (30, 30), np.random.default_rng(seed))
        assert (cut == nearest(labels, (100, 100), window)).all()
        count = np.bincount(cut.ravel(), minlength=256)[:255]
        share.append(count.max() / count.sum())
    # A fifth of all windows would do: ten tries miss with 0.79 ** 10 = 9 %.
    assert np.mean(np.array(share) < 0.75) > 0.8

    class Counting:
        drawn = 0

        def integers(self, stop):
            self.drawn += 1
            return 0

    for only in (labels * 0, labels * 0 + 255):
        rng = Counting()
        assert choose_window(only, (100, 100), (30, 30), rng)[0] == (0, 0, 30, 30)
        assert rng.drawn == 22
    rng = Counting()
    assert choose_window(labels * 0, (20, 30), (30, 30), rng)[0] == (0, 0, 20, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (37, 53), (7, 300)])
def test_any_size_gives_a_crop_and_an_evaluation_image(size):
    image, labels = Image.new("RGB", size[::-1], (10, 20, 30)), np.ones(size, np.uint8)
    for seed in range(4):
        pixels, target = augment(image, labels, (64, 128), 64, 256, np.random.default_rng(seed))
        assert (pixels.shape, target.shape) == ((3, 64, 128), (64, 128))
        assert (pixels.dtype, target.dtype) == (torch.uint8, torch.uint8)
        assert target[0, 0] == 1
    pixels, target = evaluation(image, labels, 64, 256)
    assert tuple(target.shape) == size
    assert tuple(pixels.shape[1:]) == fit(size, 64, 256)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]


def test_evaluation_resizes_the_image_alone():
    image, labels = ramps(60, 90)
    pixels, target = evaluation(image, labels, 40, 160)
    assert pixels.shape == (3, 40, 60)
    assert (target.numpy() == labels).all()
    expected = np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR))
    assert (pixels.permute(1, 2, 0).numpy() == expected).all()
    pixels, _ = evaluation(image, labels, None, None)
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_reduced_decoding_is_exact_enough(ram, tmp_path):
    """3216x4288, decoded at 1/2 to 1/8: once resized, within a level of whole decoding on average."""
    path = ram / "images/demo3.jpg"
    full, size = read_image(path)
    assert size == (4288, 3216)
    for short, reduced in ((700, 1), (500, 2), (260, 4), (130, 8)):
        image, same = read_image(path, short, 4 * short)
        assert same == size
        assert image.size == (3216 // reduced, 4288 // reduced)
        target = fit(size, short, 4 * short)
        window = (10, 20, target[0] // 2, target[1] - 7)
        difference = np.abs(
            np.asarray(resize(image, size, target, window)).astype(int)
            - np.asarray(resize(full, size, target, window))
        )
        assert difference.mean() < 0.9
        assert np.quantile(difference, 0.99) <= 4


def test_odd_sizes_stay_in_place_when_reduced(tmp_path):
    """A quarter of 1001x635 is 250.25x158.75, stored as 251x159: borders must not move by 3/4 of a pixel."""
    picture = np.zeros((635, 1001, 3), np.uint8)
    picture[-80:, :, 0] = picture[:, -80:, 2] = 255
    image, size = read_image(save(picture, tmp_path / "x.png"), 50, 100)
    assert image.size == (1001, 635)  # a PNG cannot be reduced
    image, size = read_image(save(picture, tmp_path / "x.jpg", quality=98, subsampling=0), 50, 100)
    assert (image.size, size) == ((251, 159), (635, 1001))
    pixels = evaluation(image, np.zeros(size, np.uint8), 50, 100)[0].double() / 255
    h, w = fit(size, 50, 100)
    assert pixels[0, :, 0].sum().item() == pytest.approx(80 * h / 635, abs=0.05)
    assert pixels[2, 0].sum().item() == pytest.approx(80 * w / 1001, abs=0.05)


class Script:
    """A generator that gives what the test wrote down, and records the ranges that it was asked for."""

    def __init__(self, *numbers: float):
        self.numbers, self.asked = list(numbers), []

    def random(self):
        return self.numbers.pop(0)

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.numbers.pop(0)

    def integers(self, low, high):
        self.asked.append((low, high))
        return self.numbers.pop(0)


YES, NO = 0.4, 0.6  # of a coin


@pytest.mark.parametrize(
    ("script", "asked", "expected"),
    [
        ((NO, NO, NO, NO, NO), [], (100, 50, 200)),
        ((YES, -32, NO, NO, NO, NO), [(-32, 32)], (68, 18, 168)),
        ((YES, 32, NO, NO, NO, NO), [(-32, 32)], (132, 82, 232)),
        ((NO, YES, YES, 1.5, NO, NO), [(0.5, 1.5)], (150, 75, 255)),  # contrast early
        ((NO, NO, NO, NO, YES, 0.5), [(0.5, 1.5)], (50, 25, 100)),  # contrast late
        ((NO, NO, YES, 0.5, NO, NO), [(0.5, 1.5)], (150, 125, 200)),  # saturation: towards the value 200
        ((NO, NO, YES, 1.5, NO, NO), [(0.5, 1.5)], (67, 0, 200)),  # saturation 0.75 -> 1: chroma 150 -> 200
        ((YES, 32, YES, YES, 1.5, NO, NO), [(-32, 32), (0.5, 1.5)], (198, 123, 255)),  # brightness first
    ],
)
def test_photometric_steps_by_hand(script, asked, expected):
    rng = Script(*script)
    image = torch.tensor([100, 50, 200], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 3)
    found = photometric(image, rng)
    assert found[:, 1, 2].tolist() == list(expected)
    assert (rng.asked, rng.numbers) == (asked, [])


def test_hue_turns_by_two_degrees_up_to_36():
    """OpenCV's half degrees -18..17 (the upper bound exclusive), between saturation and the late contrast."""
    rng = Script(NO, NO, YES, 0.5, YES, -18, YES, 0.5)
    found = photometric(torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(3, 1, 1), rng)
    r, g, b = colorsys.hsv_to_rgb((-36 % 360) / 360, 0.5, 1)
    assert found.flatten().tolist() == [round(127.5 * x) for x in (r, g, b)]
    assert rng.asked == [(0.5, 1.5), (-18, 18), (0.5, 1.5)]


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 1.5), st.integers(-18, 17))
@settings(max_examples=40, deadline=None)
def test_recolour_is_hsv(seed, saturation, hue):
    """Against colorsys, with greys, black, white and pure colours among the pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 5)).astype(np.float32)
    pixels[:, 0] = np.array([[0, 255, 77, 255, 0], [0, 255, 77, 0, 255], [0, 255, 77, 0, 255]])
    found = pixels.copy()
    recolour(found, saturation, 2 * hue)
    for y in range(4):
        for x in range(5):
            h, s, v = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255))
            expected = colorsys.hsv_to_rgb((h + 2 * hue / 360) % 1, min(s * saturation, 1), v)
            assert found[:, y, x] == pytest.approx(255 * np.array(expected), abs=0.02)


def plain_photometric(image, rng):
    """The definition, without strips and with a branch at every pixel."""

    def distort(x, low, high, step):
        return step(x, rng.uniform(low, high)).clamp(0, 255) if rng.random() < 0.5 else x

    x = distort(image.float(), -32, 32, torch.add)
    early = rng.random() < 0.5
    x = distort(x, 0.5, 1.5, torch.mul) if early else x
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    turn = int(rng.integers(-18, 18)) if rng.random() < 0.5 else 0
    if saturation != 1 or turn != 0:
        r, g, b = x
        value, chroma = x.amax(0), x.amax(0) - x.amin(0)
        unit = chroma.clamp(min=1e-6)
        hue = torch.where(value == g, 2 + (b - r) / unit, 4 + (r - g) / unit)
        hue = torch.where(value == r, (g - b) / unit, hue) + 2 * turn / 60
        chroma = torch.minimum(chroma * saturation, value)
        away = [(hue + n).remainder(6) for n in (5, 3, 1)]
        x = torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in away])
    x = x if early else distort(x, 0.5, 1.5, torch.mul)
    return x.round().to(torch.uint8)


@pytest.mark.parametrize("step", [1, 51, 85])
def test_photometric_equals_its_definition_to_the_last_bit(step):
    """Runs resume with the pixels of before. A step of 51 or 85 has many pixels of two equal channels."""
    image = np.random.default_rng(step).integers(0, 255 // step + 1, (3, 150, 90)) * step
    image = torch.from_numpy(image.astype(np.uint8))
    for seed in range(60):
        found, expected = (f(image, np.random.default_rng(seed)) for f in (photometric, plain_photometric))
        assert torch.equal(found, expected), seed
