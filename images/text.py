"""Text in drawings: a font with accents and many scripts, letters for the others, text that fits.

The font is DejaVu Sans, which comes with matplotlib. Pillow's basic layout neither joins letters nor runs
from right to left, so such scripts are transliterated too.
"""

import unicodedata
from collections.abc import Iterable
from functools import cache

from anyascii import anyascii
from PIL import ImageFont


def font_file() -> str:
    import matplotlib  # takes a while: only where something is drawn

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, `size` in pixels."""
    return ImageFont.truetype(font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyphs() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font_file()).get_charmap())


def readable(text: str) -> str:
    """The text, in Latin letters where the font cannot draw it; "?" if nothing of it is left."""
    return "".join(map(drawable, unicodedata.normalize("NFC", text))) or "?" * bool(text)


@cache
def drawable(c: str) -> str:
    """The character, or what stands for it."""
    shaped = unicodedata.combining(c) or unicodedata.bidirectional(c) in ("R", "AL")
    known = ord(c) in glyphs() and c.isprintable() and not shaped
    return c if known else " " if c.isspace() else anyascii(c)


def note(texts: Iterable[str]) -> list[str]:
    """The sentence to add if some of the texts are transliterated."""
    replaced = any(readable(x).split() != unicodedata.normalize("NFC", x).split() for x in texts)
    return ["Names in scripts that the font lacks are transliterated."] * replaced


def fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut off where it is wider than `width`."""
    text = readable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """At most so many lines; what does not fit is cut off."""
    rows, words = [""], readable(text).split()
    for i, word in enumerate(words):
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        elif len(rows) == lines or not rows[-1]:
            rows[-1] = fitting(" ".join([rows[-1], *words[i:]]), font, width)
            break
        else:
            rows.append(fitting(word, font, width))
    return rows
