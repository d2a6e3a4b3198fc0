"""Drawings: labels over an image, attention of words, many images in one.

    overlay(image, labels, palette, classes, ["sea", "boat"]).save("beach.overlay.jpg")

Images are `(H, W, 3)` uint8 RGB, labels `(H, W)` uint8 with 255 = ignore, as in data.py; segments as in
panoptic.py. Top to bottom: the overlay of classes and of segments, its legend, the heat map, the mosaic, the
confusion matrix, text that fits.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from images.panoptic import index, runs, semantic

SMALLEST = 512  # of an image's longer side as drawn: smaller ones are enlarged, text must fit below
WIDEST, HIGHEST = 1600, 1320  # of an image as drawn: with its legend it is at most 1600 pixels high
ROWS = 4  # of classes in a legend, in 2 to 4 columns
TILE = 640  # the widest image in a mosaic
MOST_CLASSES, MOST_WORDS = 10, 24  # whose attention is drawn
NAMED = 40  # classes; a confusion matrix of more is drawn without names
COVER = 0.55  # of a class's colour over the image
LINE = 0.75  # of white in the line around a segment
PAPER, INK, GREY = (250, 249, 246), (28, 32, 40), (112, 116, 124)
HEAT = (8, 8, 24), (84, 18, 110), (188, 55, 84), (246, 136, 30), (253, 240, 170)  # rising in lightness


Names = Sequence[str]
Drawable = np.ndarray | Image.Image


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
    font, draw = ImageFont.load_default(text), ImageDraw.Draw(drawn)
    for segment, (y, x, room) in zip(segments, widest(shown, segments), strict=True):
        name = plain(classes[segment.label])
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
    place, found = index(values, segments), []
    order = place.argsort(kind="stable")
    for mine in np.split(order, place[order].searchsorted(range(len(segments) + 1)))[1:-1]:
        y, x, n = rows[mine], begins[mine], lengths[mine]
        found.append((0, 0, 0))
        if len(mine):
            long = np.flatnonzero(n >= 0.9 * n.max())
            best = long[np.abs(y[long] - np.median(y.repeat(n))).argmin()]
            found[-1] = float(y[best]), float(x[best] + n[best] / 2), int(n[best])
    return found


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
    font, line, margin, box = ImageFont.load_default(text), round(1.6 * text), text, text
    seen = sorted((k for k in range(len(classes)) if counts[k]), key=lambda k: -counts[k])
    entries = [f"{classes[k]}  {percent(counts[k] / sum(counts))}" for k in seen]
    room = width - 2 * margin
    cell = max((font.getlength(plain(entry)) for entry in entries), default=room) + 3 * box
    columns = min(max(int(room / cell), 2), 4)
    cell = room / columns
    if len(seen) > ROWS * columns:
        entries[ROWS * columns - 1 :] = [f"and {len(seen) - ROWS * columns + 1} more"]
    rows = -(-len(entries) // columns)
    word_rows = []
    if words is not None:
        word_rows = wrapped(f"words: {', '.join(words) or 'none'}", font, room, lines=2)

    height = 2 * margin + line * (rows + len(word_rows))
    canvas = Image.new("RGB", (width, drawn.height + height), PAPER)
    canvas.paste(drawn, ((width - drawn.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for i, entry in enumerate(entries):
        x, y = margin + i % columns * cell, drawn.height + margin + i // columns * line
        if i < ROWS * columns - 1 or len(entries) == len(seen):
            draw.rectangle((x, y, x + box, y + box), tuple(map(int, palette[seen[i]])), GREY)
        draw.text((x + 1.5 * box, y + box / 2), fitting(entry, font, cell - 2 * box), INK, font, "lm")
    for i, sentence in enumerate(word_rows, rows):
        draw.text((margin, drawn.height + margin + i * line + box / 2), sentence, GREY, font, "lm")
    return canvas


def heat(image: np.ndarray, strength: np.ndarray, title: str) -> Image.Image:
    """`strength (h, w)`, scaled from its lowest to its highest value, as a glow over the grey image."""
    size = drawn_size(*image.shape[:2])
    size = tuple(max(round(side * min(TILE / size[0], 1)), 1) for side in size)
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    low, high = float(strength.min()), float(strength.max())
    level = (strength.astype(np.float32) - low) / max(high - low, 1e-12)
    level = np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(level, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    drawn = Image.fromarray((0.45 * grey[..., None] + 0.65 * colours).clip(0, 255).astype(np.uint8))

    font = ImageFont.load_default(20)
    canvas = Image.new("RGB", (max(drawn.width, 160), drawn.height + 36), PAPER)
    canvas.paste(drawn, ((canvas.width - drawn.width) // 2, 0))
    place = canvas.width / 2, drawn.height + 18
    ImageDraw.Draw(canvas).text(place, fitting(title, font, canvas.width - 8), INK, font, "mm")
    return canvas


def attention_mosaic(
    image: Image.Image, maps: np.ndarray, classes: Names, words: Names | None
) -> Image.Image:
    """A tile for each word (class without `words`) with its share of all attention `maps (T, h, w)`; of many,
    those with the most.
    """
    names = classes if words is None else words or ["(no word)"]
    strength = maps.mean(axis=(1, 2))
    order = np.argsort(-strength, kind="stable")[: MOST_CLASSES if words is None else MOST_WORDS]
    image = image.copy()
    image.thumbnail((TILE, TILE))
    tiles = [heat(np.asarray(image), maps[i], f"{names[i]}  {percent(strength[i])}") for i in order]
    return mosaic(tiles, 3 if image.width > image.height else 4)


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


def confusion_matrix(confusion: Tensor, names: Names) -> Image.Image:
    """The share of each row, from white to dark blue as its root, so that rare confusions show.

    confusion `(K, K)` pixels [truth, prediction]. Up to 40 classes have their names, and percentages in the
    cells. A row without pixels is grey.
    """
    K, font = len(names), ImageFont.load_default(14)
    names = names if K <= NAMED else []
    side = 32 if names else max(1200 // K, 2)
    margin = 16 + int(max(map(font.getlength, [*names, "column: prediction"])))
    shares = confusion.double() / confusion.sum(1, keepdim=True)  # NaN without pixels
    shade = shares.sqrt()[..., None]
    colour = (255 + shade * torch.tensor([8 - 255, 48 - 255, 107 - 255])).nan_to_num(225)  # (K, K, 3)
    matrix = Image.fromarray(colour.round().to(torch.uint8).numpy())
    drawn = Image.new("RGB", (margin + K * side + 16, margin + K * side + 16), "white")
    drawn.paste(matrix.resize((K * side, K * side), Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(drawn)
    draw.rectangle((margin - 1, margin - 1, margin + K * side, margin + K * side), outline="lightgray")
    draw.multiline_text((margin - 8, margin - 40), "row: truth\ncolumn: prediction", "gray", font, "ra")
    above = Image.new("RGB", (margin, K * side), "white")  # the columns' names, before they are turned
    for k, name in enumerate(names):
        middle = (k + 0.5) * side
        draw.text((margin - 8, margin + middle), name, "black", font, anchor="rm")
        ImageDraw.Draw(above).text((8, middle), name, "black", font, anchor="lm")
        for column in (shares[k] >= 0.01).nonzero().flatten().tolist():
            place = margin + (column + 0.5) * side, margin + middle
            ink = "white" if shares[k, column] > 0.25 else "black"
            draw.text(place, f"{100 * shares[k, column]:.0f}", ink, font, anchor="mm")
    if names:
        drawn.paste(above.rotate(90, expand=True), (margin, 0))
    return drawn


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def plain(text: str) -> str:
    """ASCII, which is all that Pillow's own font has: accents are dropped, other letters become "?"."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


def fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut off where it is wider than `width`."""
    text = plain(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """At most so many lines; what does not fit is cut off."""
    rows, words = [""], plain(text).split()
    for i, word in enumerate(words):
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        elif len(rows) == lines or not rows[-1]:
            rows[-1] = fitting(" ".join([rows[-1], *words[i:]]), font, width)
            break
        else:
            rows.append(word)
    return rows
