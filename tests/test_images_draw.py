"""images.py: whose colour lies where, what the legend says, sizes; attention; text that fits."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from images import draw
from images.draw import (
    HIGHEST,
    PAPER,
    WIDEST,
    mosaic,
    overlay,
    rounded,
    segment_overlay,
    widest,
)
from images.panoptic import Segment
from images.text import fitting, font_of, readable, wrapped

PALETTE = np.array([[255, 0, 0], [0, 0, 255], [0, 255, 0]], np.uint8)
CLASSES = ["sea", "sky", "boat"]
FONT = font_of(18)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_each_class_has_its_colour_over_the_image():
    """0.55 of the palette, 0.45 of the image; ignored pixels as they were."""
    image = np.full((512, 1024, 3), 100, np.uint8)
    labels = np.zeros((512, 1024), np.uint8)
    labels[:, 400:700] = 1
    labels[:, 700:] = 255
    found = pixels(overlay(image, labels, PALETTE, CLASSES))
    assert found.shape[1] == 1024
    assert found[200, 100].tolist() == [185, 45, 45]
    assert found[200, 500].tolist() == [45, 45, 185]
    assert found[200, 900].tolist() == [100, 100, 100]
    assert found[200, 399].sum() < found[200, 390].sum()  # a line along the border
    assert found[200, 400].tolist() == [45, 45, 185]


def test_colours_are_blended_to_one_level():
    """Every level under every class, 0.55 of its colour, as an array and as an image; lines 0.6 as bright."""
    levels = np.arange(256, dtype=np.uint8).repeat(4)[None, :, None].repeat(768, axis=0).repeat(3, axis=2)
    labels = np.repeat(np.array([0, 1, 2, 255], np.uint8), 192)[:, None].repeat(1024, axis=1)
    found = pixels(overlay(levels, labels, PALETTE, CLASSES))
    assert np.array_equal(found, pixels(overlay(Image.fromarray(levels), labels, PALETTE, CLASSES)))
    expected = np.where(labels[..., None] < 3, 0.45 * levels + 0.55 * PALETTE[labels % 3], levels)
    expected[[191, 383, 575]] *= 0.6
    assert np.abs(found[:768] - expected).max() <= 1


def test_the_image_shows_through():
    """A dark and a bright half under one class stay apart, each on its own side."""
    image = np.zeros((600, 800, 3), np.uint8)
    image[:, 400:] = 200
    found = pixels(overlay(image, np.zeros((600, 800), np.uint8), PALETTE, CLASSES))
    assert found[300, 700].tolist() == [230, 90, 90]
    assert found[300, 100].tolist() == [140, 0, 0]


def test_the_legend_shows_what_covers_most():
    """Squares of the palette's own colours below the image, largest first; none for what is not seen."""
    labels = np.full((512, 512), 2, np.uint8)
    labels[:100] = 1
    found = pixels(overlay(np.zeros((512, 512, 3), np.uint8), labels, PALETTE, CLASSES, ["a word"]))
    below = found[512:]
    place = {
        name: np.argwhere((below == colour).all(axis=2))
        for name, colour in zip(CLASSES, PALETTE, strict=True)
    }
    assert len(place["sea"]) == 0
    assert len(place["boat"]) > 100 and len(place["sky"]) > 100
    assert place["boat"][:, 1].max() < place["sky"][:, 1].min()


def test_segments_have_lines_around_them_and_names_on_them():
    """Two boats that touch, each with its name; a small one has no room for it; void stays as it is."""
    image, ids = np.full((512, 768, 3), 100, np.uint8), np.zeros((512, 768), np.int32)
    ids[:256, :300], ids[:256, 300:600], ids[400:410, 10:20] = 70_000, 5, 9
    segments = [Segment(70_000, 2, True), Segment(5, 2, True), Segment(9, 0, True)]
    found = pixels(segment_overlay(image, ids, segments, PALETTE, CLASSES))
    assert found[40, 299].min() > 180  # the line between the two
    assert found[40, 298].tolist() == found[40, 300].tolist() == [45, 185, 45]
    assert found[500, 700].tolist() == [100, 100, 100]
    for left in (0, 300):
        assert (found[100:150, left + 100 : left + 200] == 255).all(axis=2).any()  # white letters
    assert not (found[380:430, :60] == 255).all(axis=2).any()


def test_a_name_lies_where_its_segment_is_wide():
    ids, segments = (
        np.zeros((9, 20), np.int32),
        [Segment(7, 0, True), Segment(3, 0, True), Segment(5, 1, True)],
    )
    ids[1:8, 4:6] = 5
    ids[5:8, 2:14] = 5
    ids[:, 17:], ids[3, 0] = 3, 3
    assert widest(ids, segments) == [(0, 0, 0), (4, 18.5, 3), (6, 8, 12)]
    assert widest(ids, []) == []


def test_a_map_of_segments_is_read_as_often_for_many_as_for_few(monkeypatch):
    """To find where their names have room."""
    read, pad = [], np.pad
    monkeypatch.setattr(np, "pad", lambda x, *args, **kwargs: read.append(x.size) or pad(x, *args, **kwargs))
    for n in (4, 40):
        ids = 1 + np.arange(512 * 512, dtype=np.int32).reshape(512, 512) % n
        segments = [Segment(i + 1, 0, True) for i in range(n)]
        segment_overlay(np.zeros((512, 512, 3), np.uint8), ids, segments, PALETTE, CLASSES)
    assert read == [512 * 512] * 4  # twice each


def test_words_are_below_and_only_if_there_are_any_per_image():
    image, labels = np.zeros((512, 512, 3), np.uint8), np.zeros((512, 512), np.uint8)
    without, none, some, many = (
        overlay(image, labels, PALETTE, CLASSES, words)
        for words in (None, [], ["boat"], ["a rather long word"] * 40)
    )
    assert without.height < none.height == some.height < many.height
    assert not np.array_equal(none, some)
    assert many.height - some.height == some.height - without.height  # two lines at most


def test_many_classes_do_not_run_over():
    """150 classes: four rows, the last entry counts the rest."""
    labels = np.arange(512, dtype=np.uint16).repeat(512).reshape(512, 512) % 150
    palette = np.full((150, 3), 7, np.uint8)
    all_of_them = overlay(np.zeros((512, 512, 3), np.uint8), labels.astype(np.uint8), palette, ["x"] * 150)
    four = overlay(np.zeros((512, 512, 3), np.uint8), (labels % 16).astype(np.uint8), palette, ["x"] * 150)
    assert all_of_them.height == four.height
    squares = (pixels(all_of_them)[512:] == 7).all(axis=2).sum()
    assert squares == (pixels(four)[512:] == 7).all(axis=2).sum() * 15 // 16


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((1, 1), (512, 512)),
        ((1, 400), (1, 512)),
        ((400, 1), (512, 1)),
        ((128, 96), (512, 384)),
        ((700, 900), (700, 900)),
        ((3000, 4000), (1200, 1600)),
        ((4000, 3000), (1280, 960)),
    ],
)
def test_small_images_are_enlarged_and_huge_ones_reduced(size, drawn):
    labels = np.zeros(size, np.uint8)
    found = overlay(np.zeros((*size, 3), np.uint8), labels, PALETTE, CLASSES, ["sea"] * 99)
    covered = (pixels(found) == [140, 0, 0]).all(axis=2)  # PALETTE's red over black
    rows, columns = covered.any(axis=1), covered.any(axis=0)
    assert (rows.sum(), columns.sum()) == drawn
    assert max(found.size) <= 1600
    assert drawn[0] <= HIGHEST and drawn[1] <= WIDEST


def test_labels_may_be_larger_than_the_image():
    """The model's image with the labels of the file: they cover the same ground."""
    labels = np.zeros((2000, 3000), np.uint8)
    labels[:, 1500:] = 1
    found = pixels(overlay(np.full((128, 192, 3), 100, np.uint8), labels, PALETTE, CLASSES))
    assert found[500, 790].tolist() == [185, 45, 45]
    assert found[500, 810].tolist() == [45, 45, 185]


def test_attention_rises_with_strength_on_one_scale_for_all_words(monkeypatch):
    """Over a grey image: a word with little attention stays darker than one with much; the title has the ends
    of the scale.
    """
    titles, caption = [], draw.captioned
    monkeypatch.setattr(
        draw, "captioned", lambda image, x, *rest: titles.append(x) or caption(image, x, *rest)
    )
    ramp = np.linspace(0, 0.02, 8, dtype=np.float32)[None].repeat(6, axis=0)
    maps = np.stack([0.1 + ramp, 0.9 - ramp])
    image = Image.new("RGB", (800, 600), (100, 100, 100))
    found = pixels(draw.attention_mosaic(image, maps, CLASSES, ["flying saucer", "boat"])).sum(axis=2)
    assert titles == [
        "boat  89%",
        "flying saucer  11%",
        "attention of a pixel, from 10.0% (dark) to 90.0% (bright)",
    ]
    boat, saucer = (found[300, left + 40 : left + 620 : 20] for left in (0, 652))
    assert boat.min() > saucer.max() + 300
    assert (np.diff(boat) <= 0).all() and (np.diff(saucer) >= 0).all()
    flat = pixels(draw.attention_mosaic(image, np.full((1, 6, 8), 0.5), CLASSES, ["sea"]))
    assert len(np.unique(flat[100:500, 20:600].reshape(-1, 3), axis=0)) == 1  # nothing to see


@pytest.mark.parametrize("panoptic", [False, True])
def test_an_image_stands_beside_its_ground_truth_and_its_prediction(panoptic, monkeypatch):
    """Each under its name, in one size, whatever that of the labels; words only in the last legend."""
    titles, caption = [], draw.captioned
    monkeypatch.setattr(draw, "captioned", lambda image, x: titles.append(x) or caption(image, x))
    image = np.full((300, 400, 3), 100, np.uint8)
    truth, predicted = np.zeros((1200, 1600), np.uint8), np.ones((300, 400), np.uint8)
    targets = {"ground truth": truth, "prediction": predicted}
    if panoptic:
        segments = [Segment(7, 0, True)], [Segment(8, 1, True)]
        targets = {
            name: (np.full(x.shape, id, np.int16), segments[id - 7])
            for (name, x), id in zip(targets.items(), (7, 8))
        }
    names = {"palette": PALETTE, "classes": CLASSES}
    tiles = [pixels(tile) for tile in draw.compared(image, "x.png", targets, ["boat"], **names)]
    assert titles == ["x.png", "ground truth", "prediction"]
    assert [tile[250, 300].tolist() for tile in tiles] == [[100] * 3, [185, 45, 45], [45, 45, 185]]
    heights, widths = zip(*(tile.shape[:2] for tile in tiles), strict=True)
    assert widths == (512,) * 3 and heights[0] == 384 + draw.CAPTION < heights[1] < heights[2]


def test_a_mosaic_keeps_order_and_aspect():
    """Row by row; narrow images are enlarged to the width of the others, or to 640."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", size, c) for size, c in zip([(200, 100), (100, 150), (200, 40)], colours)]
    found = pixels(mosaic(images, 2))
    assert found.shape[:2] == (300 + 40 + 36, 400 + 36)
    assert found[12, 12].tolist() == [255, 0, 0] and found[111, 211].tolist() == [255, 0, 0]
    assert found[112, 12].tolist() == list(PAPER)  # lower than its neighbour
    assert found[311, 423].tolist() == [0, 255, 0]
    assert found[324, 12].tolist() == [0, 0, 255] and found[363, 211].tolist() == [0, 0, 255]
    assert found[324, 230].tolist() == list(PAPER)
    assert mosaic([Image.new("RGB", (4000, 1000))], 4).size == (640 + 24, 160 + 24)


@pytest.mark.parametrize("name", ["Straße", "Небо", "θάλασσα", "Café Ångström"])
def test_names_keep_their_letters(name):
    """None is drawn as the box of a glyph that the font lacks."""
    box = bytes(FONT.getmask("\uffff"))
    assert readable(name) == name and readable(unicodedata.normalize("NFD", name)) == name
    assert all(bytes(FONT.getmask(letter)) != box for letter in name if letter != " ")


@pytest.mark.parametrize(
    ("name", "latin"),
    [
        ("空", "Kong"),
        ("سماء", "sm'"),
        ("שמיים", "smyym"),
        ("ท้องฟ้า", "thongfa"),
        ("a\tb", "a b"),
        ("\ue000", "?"),
    ],
)
def test_other_names_are_in_latin_letters_and_the_legend_notes_it(name, latin):
    """Scripts that the font lacks, and those that run from right to left."""
    labels, image = np.zeros((512, 512), np.uint8), np.zeros((512, 512, 3), np.uint8)
    assert readable(name) == latin
    heights = [overlay(image, labels, PALETTE, [x, "", ""]).height for x in ("Небо", name)]
    assert (heights[1] > heights[0]) == (name != "a\tb")
    worded = [overlay(image, labels, PALETTE, CLASSES, [x]).height for x in ("Небо", name)]
    assert worded[1] - worded[0] == heights[1] - heights[0]


def test_text_fits():
    assert fitting("sea", FONT, 200) == "sea"
    short = fitting("a very long name of a class", FONT, 100)
    assert short.endswith("...") and "a very long name of a class".startswith(short[:-3])
    assert FONT.getlength(short) <= 100 < FONT.getlength("a very long n...")
    text = "words: sea, boat, a sandy beach, sky, cloud, sun, people"
    lines = wrapped(text, FONT, 160, lines=9)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(FONT.getlength(line) <= 160 for line in lines)
    two = wrapped(text, FONT, 160, lines=2)
    assert two[0] == lines[0] and two[1].endswith("...") and FONT.getlength(two[1]) <= 160
    assert wrapped("w" * 99, FONT, 160, lines=2)[0].endswith("...")
    long = wrapped("words: " + "w" * 99, FONT, 160, lines=2)
    assert long[0] == "words:" and long[1].endswith("...") and FONT.getlength(long[1]) <= 160


def test_a_share_is_never_rounded_to_nothing():
    assert [rounded(x) for x in (1.0, 0.426, 0.01, 0.0099, 1e-6)] == ["100%", "43%", "1%", "<1%", "<1%"]
