"""Drawings: labels over an image, attention of words, many images in one.

    overlay(image, labels, palette, classes, ["sea", "boat"]).save("beach.overlay.jpg")

Images are `(H, W, 3)` uint8 RGB, labels `(H, W)` uint8 with 255 = ignore, as in data.py; segments as in
panoptic.py. Top to bottom: the overlay of classes and of segments, its legend, an image with its overlays,
the attention of words, the mosaic.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from images.colours import COVER
from images.panoptic import index, runs, semantic
from images.text import fitting, font_of, note, readable, wrapped

SMALLEST = 512  # of an image's longer side as drawn: smaller ones are enlarged, text must fit below
WIDEST, HIGHEST = 1600, 1280  # of an image as drawn: with its legend it is at most 1600 pixels high
LEGEND_ROWS = 4  # of classes in a legend, in 2 to 4 columns
TILE = 640  # the widest image in a mosaic
CAPTION = 36  # pixels above an image, for a line of text
MOST_CLASSES, MOST_WORDS = 10, 24  # whose attention is drawn
LINE = 0.75  # of white in the line around a segment
PAPER, INK, GREY = (250, 249, 246), (28, 32, 40), (112, 116, 124)
HEAT = (8, 8, 24), (84, 18, 110), (188, 55, 84), (246, 136, 30), (253, 240, 170)  # rising in lightness

Names = Sequence[str]
Drawable = np.ndarray | Image.Image
Target = np.ndarray | tuple[np.ndarray, Sequence]  # labels (H, W), or ids (H, W) and their segments


def overlay(
    image: Drawable, labels: np.ndarray, palette: np.ndarray, classes: Names, words: Names | None = None
) -> Image.Image:
    """The image under the colours of its labels `(H, W)`, over a legend; at most 1600 pixels wide and high.

    palette `(K, 3)` uint8. The legend has the classes that cover most, and the `words` that the model
    uses, None if it uses none per image. Ignored pixels keep their colour.
    """
    blended, shown = covered(image, labels, palette)
    edges = borders(shown)
    blended[edges] = (0.6 * blended[edges]).round()
    return with_legend(Image.fromarray(blended), labels, palette, classes, words)


def segment_overlay(
    image: Drawable,
    ids: np.ndarray,
    segments: Sequence,
    palette: np.ndarray,
    classes: Names,
    words: Names | None = None,
) -> Image.Image:
    """As `overlay`, with a light line around each segment, and its class written on it where there is room.

    ids `(H, W)`, 0 = void; segments have an `id` and a `label`.
    """
    labels = semantic(ids, segments)
    blended, _ = covered(image, labels, palette)
    h, w = blended.shape[:2]
    shown = np.asarray(Image.fromarray(ids.astype(np.int32)).resize((w, h), Image.Resampling.NEAREST))
    lines = borders(shown)
    blended[lines] = (LINE * 255 + (1 - LINE) * blended[lines]).round()
    drawn = Image.fromarray(blended)
    text = min(max(w // 45, 12), 24)
    font, draw = font_of(text), ImageDraw.Draw(drawn)
    for segment, (y, x, room) in zip(segments, widest(shown, segments), strict=True):
        name = readable(classes[segment.label])
        if font.getlength(name) <= room:
            middle = x, min(max(y, text), h - text)
            draw.text(middle, name, "white", font, "mm", stroke_width=2, stroke_fill=INK)
    return with_legend(drawn, labels, palette, classes, words)


def covered(image: Drawable, labels: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image under the colours, `(h, w, 3)` uint8, and the labels `(h, w)`, at the size as drawn."""
    size, K = drawn_size(*labels.shape), len(palette)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    drawn = image.resize(size, Image.Resampling.BICUBIC)
    shown = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
    colours = shown.copy()
    colours.putpalette(palette.tobytes())
    cover = shown.point([round(255 * COVER)] * K + [0] * (256 - K))
    return np.array(Image.composite(colours.convert("RGB"), drawn, cover)), np.asarray(shown)


def widest(ids: np.ndarray, segments: Sequence) -> list[tuple[float, float, int]]:
    """Of each segment, the middle (y, x) and length of a long run near to its middle row; zeros without."""
    ended = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1)  # no run continues in the next row
    values, lengths = runs(ended)
    rows, begins = np.divmod(lengths.cumsum() - lengths, ids.shape[1] + 1)
    place, middles = index(values, segments), []
    order = place.argsort(kind="stable")
    for mine in np.split(order, place[order].searchsorted(range(len(segments) + 1)))[1:-1]:
        y, x, n = rows[mine], begins[mine], lengths[mine]
        middles.append((0, 0, 0))
        if len(mine):
            long = np.flatnonzero(n >= 0.9 * n.max())
            best = long[np.abs(y[long] - np.median(y.repeat(n))).argmin()]
            middles[-1] = float(y[best]), float(x[best] + n[best] / 2), int(n[best])
    return middles


def drawn_size(H: int, W: int) -> tuple[int, int]:
    """(width, height) of an image as drawn, Pillow's order."""
    scale = min(max(SMALLEST / max(H, W), 1), WIDEST / W, HIGHEST / H)
    return max(round(scale * W), 1), max(round(scale * H), 1)


def borders(labels: np.ndarray) -> np.ndarray:
    """Where the pixel to the right or below has another label, `(H, W)` bool."""
    below = np.pad(labels, ((0, 1), (0, 1)), "edge")
    return (labels != below[1:, :-1]) | (labels != below[:-1, 1:])


def with_legend(
    drawn: Image.Image, labels: np.ndarray, palette: np.ndarray, classes: Names, words: Names | None
) -> Image.Image:
    """The image over a table of the classes of its `labels`, and the words."""
    counts = Image.fromarray(labels).histogram()
    width = max(drawn.width, SMALLEST)
    text = min(max(width // 40, 14), 24)
    font, line, margin, box = font_of(text), round(1.6 * text), text, text
    seen = sorted((k for k in range(len(classes)) if counts[k]), key=lambda k: -counts[k])
    entries = [f"{classes[k]}  {rounded(counts[k] / sum(counts))}" for k in seen]
    room = width - 2 * margin
    cell = max((font.getlength(readable(entry)) for entry in entries), default=room) + 3 * box
    columns = min(max(int(room / cell), 2), 4)
    cell = room / columns
    if len(seen) > LEGEND_ROWS * columns:
        entries[LEGEND_ROWS * columns - 1 :] = [f"and {len(seen) - LEGEND_ROWS * columns + 1} more"]
    rows = -(-len(entries) // columns)
    sentences = []
    if words is not None:
        sentences = wrapped(f"words: {', '.join(words) or 'none'}", font, room, lines=2)
    sentences += [fitting(sentence, font, room) for sentence in note([*entries, *(words or [])])]

    height = 2 * margin + line * (rows + len(sentences))
    canvas = Image.new("RGB", (width, drawn.height + height), PAPER)
    canvas.paste(drawn, ((width - drawn.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for i, entry in enumerate(entries):
        x, y = margin + i % columns * cell, drawn.height + margin + i // columns * line
        if i < LEGEND_ROWS * columns - 1 or len(entries) == len(seen):
            draw.rectangle((x, y, x + box, y + box), tuple(map(int, palette[seen[i]])), GREY)
        draw.text((x + 1.5 * box, y + box / 2), fitting(entry, font, cell - 2 * box), INK, font, "lm")
    for i, sentence in enumerate(sentences, rows):
        draw.text((margin, drawn.height + margin + i * line + box / 2), sentence, GREY, font, "lm")
    return canvas


def compared(
    image: np.ndarray, title: str, targets: dict[str, Target], words: Names | None, **names: Any
) -> list[Image.Image]:
    """Tiles for a mosaic: the image under its title, and under each target, which may have another size.

    The legend of the last target has the `words`; `names` are palette and classes.
    """
    size = tile_size(*image.shape[:2])
    tiles = [captioned(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), title)]
    for name, target in targets.items():
        labels, *segments = target if isinstance(target, tuple) else (target,)
        labels = labels.astype(np.int32) if segments else labels
        small = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        over, last = segment_overlay if segments else overlay, name == [*targets][-1]
        tiles.append(captioned(over(image, small, *segments, **names, words=words if last else None), name))
    return tiles


def tile_size(H: int, W: int) -> tuple[int, int]:
    """(width, height) of an image in a mosaic, Pillow's order."""
    w, h = drawn_size(H, W)
    return min(w, TILE), max(round(h * min(TILE / w, 1)), 1)


def captioned(image: Image.Image, text: str, least: int = SMALLEST) -> Image.Image:
    """The image under a line of text, at least so wide."""
    canvas = Image.new("RGB", (max(image.width, least), image.height + CAPTION), PAPER)
    canvas.paste(image, ((canvas.width - image.width) // 2, CAPTION))
    font, place = font_of(CAPTION // 2), (canvas.width / 2, CAPTION / 2)
    ImageDraw.Draw(canvas).text(place, fitting(text, font, canvas.width - 8), INK, font, "mm")
    return canvas


def attention_mosaic(
    image: Image.Image, maps: np.ndarray, classes: Names, words: Names | None
) -> Image.Image:
    """A tile for each word (class without `words`) with its share of all attention `maps (T, h, w)`; of many,
    those with the most. All tiles have one scale, whose ends are in the title.
    """
    names = classes if words is None else words or ["(no word)"]
    strength = maps.mean(axis=(1, 2))
    order = np.argsort(-strength, kind="stable")[: MOST_CLASSES if words is None else MOST_WORDS]
    image = image.copy()
    image.thumbnail((TILE, TILE))
    low, high = float(maps[order].min()), float(maps[order].max())
    levels = (maps[order].astype(np.float32) - low) / max(high - low, 1e-12)
    titles = [f"{names[i]}  {rounded(strength[i])}" for i in order]
    tiles = [captioned(glow(image, x), y, 160) for x, y in zip(levels, titles, strict=True)]
    title = f"attention of a pixel, from {low:.1%} (dark) to {high:.1%} (bright)"
    return captioned(mosaic(tiles, 3 if image.width > image.height else 4), title)


def glow(image: Image.Image, level: np.ndarray) -> Image.Image:
    """`level (h, w)`, 0 = dark to 1 = bright, over the grey image."""
    size = tile_size(image.height, image.width)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    level = np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    return Image.fromarray((0.45 * grey[..., None] + 0.65 * heat(level)).clip(0, 255).astype(np.uint8))


def heat(level: np.ndarray) -> np.ndarray:
    """The colours `(..., 3)` of levels in 0..1, in 0..255."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(level, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)


def mosaic(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The images in rows, each as wide as the widest or 640 pixels; a row is as high as its highest."""
    gap, width = 12, min(max(image.width for image in images), TILE)
    columns = min(columns, len(images))
    tiles = [image.resize((width, max(round(image.height * width / image.width), 1))) for image in images]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    canvas = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            canvas.paste(tile, (gap + i * (width + gap), top))
        top += height + gap
    return canvas


def rounded(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"
