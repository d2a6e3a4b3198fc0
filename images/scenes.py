"""The drawn data set: 128x128 images with labels, instances and tags, each a pure function of its index.

A place is drawn first, then its sky and ground from far to near, then things from its table, far ones first.
Six pairs of classes (`PAIRS`) share colour and texture: a small patch of sea is a patch of sky. Layout,
neighbours and outline distinguish them, so labels depend on the whole image, and tags give information that a
patch lacks. `ambiguity=0` paints the second member of every pair in a colour of its own: the control, with
equal labels.

Randomness comes from two generators with guaranteed streams (Python's `Random.random`, the raw bits of
numpy's PCG64), and the arithmetic on pixels is elementwise: a version draws the same bytes everywhere.
Top to bottom: tables, the brush, sky and ground, things, from the canvas to the scene, the command.
"""

import argparse
import sys
from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from errors import Parser, run_command

VERSION = 1  # raise it with any change of drawing: results of different versions must not be compared
SIZE = 128  # image height and width; every length below is in these pixels
TAG_PIXELS = 64  # a class that covers less is painted over: its tag would not be visible
SPLITS = {
    "train": range(512),
    "val": range(100_000, 100_200),
    "test": range(200_000, 200_500),
    "pretrain": range(1_000_000, 2_000_000),
}

# fmt: off
PAINTED = ((0, 0, 0), (0, 0, 0))  # the colour is one of PAINTS
STYLES = {  # class or pair: (ends of its colour RGB, texture, its strength, colour in label maps of each)
    "sea sky": (((88, 142, 194), (138, 182, 216)), "waves", 0.03, (28, 84, 160), (150, 205, 245)),
    "cloud sheep": (((226, 226, 230), (244, 242, 238)), "fluff", 0.03, (255, 255, 255), (255, 190, 215)),
    "snow sand": (((218, 210, 198), (240, 236, 230)), "drift", 0.025, (205, 225, 235), (240, 210, 120)),
    "road river": (((98, 106, 120), (124, 134, 148)), "ripple", 0.05, (70, 70, 80), (60, 150, 200)),
    "bush tree": (((48, 98, 46), (82, 126, 58)), "leaves", 0.11, (120, 190, 60), (20, 100, 40)),
    "boat shed": (PAINTED, "planks", 0.05, (200, 40, 40), (130, 80, 40)),
    "grass": (((122, 162, 72), (152, 182, 84)), "blades", 0.06, (150, 220, 130)),
    "mountain": (((124, 118, 132), (150, 142, 146)), "stone", 0.05, (150, 130, 160)),
    "pavement": (((176, 164, 152), (198, 188, 176)), "stone", 0.03, (200, 180, 170)),
    "building": (((150, 104, 88), (176, 164, 150)), "stone", 0.02, (110, 90, 130)),
    "house": (((232, 200, 150), (210, 170, 148)), "stone", 0.02, (220, 130, 60)),
    "car": (PAINTED, "stone", 0.01, (90, 20, 140)),
    "person": (PAINTED, "stone", 0.02, (230, 20, 120)),
    "cow": (((96, 62, 44), (132, 84, 54)), "fluff", 0.04, (140, 60, 20)),
    "lamp": (((58, 62, 66), (72, 72, 72)), "stone", 0.0, (255, 240, 60)),
    "sun": (((255, 234, 140), (255, 216, 108)), "stone", 0.0, (255, 170, 0)),
    "rock": (((128, 122, 116), (146, 138, 128)), "stone", 0.07, (110, 110, 110)),
    "umbrella": (PAINTED, "stone", 0.01, (0, 190, 170)),
}
UNLIKE = {  # the second members of the pairs at ambiguity 0
    "sky": (238, 206, 176), "sheep": (150, 104, 60), "sand": (226, 176, 84),
    "river": (64, 168, 158), "tree": (196, 128, 40), "shed": (116, 74, 134),
}
GRAINS = {  # texture: height and width of its cells, at least 3, which a small autoencoder can still draw
    "waves": (3, 16), "fluff": (5, 5), "drift": (5, 9), "ripple": (3, 8), "leaves": (4, 4), "planks": (4, 24),
    "blades": (6, 3), "stone": (6, 7),
}
PAINTS = (
    (186, 62, 52), (58, 98, 152), (222, 172, 72), (62, 132, 122),
    (226, 222, 212), (140, 84, 62), (92, 88, 92),
)
SKINS = ((236, 196, 164), (198, 146, 108), (124, 84, 60))
TROUSERS = ((56, 62, 88), (74, 66, 60), (120, 108, 92))
HAIRS = ((52, 48, 50), (104, 76, 54), (200, 160, 90))
ROOFS = ((164, 72, 56), (126, 74, 60), (96, 84, 92))
DARK, BARK, GLASS, LIT, WHITE = (52, 48, 50), (104, 76, 54), (92, 112, 130), (255, 216, 124), (236, 233, 226)

LIGHTS = (  # (how often, what multiplies every colour): noon, morning, overcast, evening
    (0.50, (1.0, 1.0, 1.0)), (0.18, (1.0, 0.95, 0.86)), (0.16, (0.86, 0.88, 0.91)), (0.16, (1.0, 0.84, 0.70)),
)
NIGHT, GLOW = (0.46, 0.50, 0.70), (120, 92, 46)  # multiplies; is added around the sun and lit lamps
NIGHTS = {"night town": 1.0, "harbour": 0.35}  # how often it is night, elsewhere 0.1

FOOTING = {  # thing: (height at the lower edge, width / height, how near 0..1 it is put, what it stands on)
    "sheep": (34, 1.3, 0.95, "grass snow sand"),
    "bush": (34, 1.8, 0.95, "grass snow sand pavement"),
    "tree": (100, 0.6, 0.70, "grass snow sand pavement"),
    "boat": (66, 1.4, 0.80, "sea river"),
    "shed": (60, 1.4, 0.75, "grass snow sand pavement sea"),
    "house": (92, 1.1, 0.50, "grass snow sand"),
    "car": (36, 1.6, 0.90, "road"),
    "person": (54, 0.5, 0.95, "grass snow sand pavement"),
    "cow": (42, 1.6, 0.95, "grass snow sand"),
    "lamp": (96, 0.2, 0.80, "grass snow pavement"),
    "rock": (28, 1.9, 0.95, "grass snow sand sea"),
    "umbrella": (64, 1.2, 0.90, "sand pavement grass"),
}
VARIETY = {"bush": (0.7, 1.6), "tree": (0.5, 1.15)}  # of heights, elsewhere 0.85..1.15


class Place(NamedTuple):
    """A row of the table of places."""

    odds: float
    horizon: tuple[float, float]  # as a fraction of the image's height
    above: float  # how often it is seen from above, without sky
    ground: str  # far to near: class, outline, begin 0..1, odds
    back: str  # what stands along the horizon
    must: str  # things that are always put
    may: str  # things that fill up to 3..8; a repeated name is more likely


PLACES = {
    "beach": Place(1.2, (0.2, 0.5), 0.45, "sea flat 0 1, sand shore .4 1",
        "", "umbrella boat", "umbrella umbrella person person boat shed rock tree cloud cloud sun"),
    "islands": Place(0.9, (0.15, 0.6), 0.55, "sea flat 0 1, sand isles 0 1",
        "", "boat", "boat boat tree tree shed rock rock person cloud cloud sun bush"),
    "harbour": Place(1.1, (0.25, 0.5), 0.45, "sea flat 0 1, pavement quay .45 1",
        "", "boat shed", "boat boat shed shed lamp person cloud sun rock"),
    "coast": Place(1.0, (0.2, 0.5), 0.4, "sea flat 0 1, grass shore .35 1",
        "", "boat sheep", "sheep sheep shed rock bush house cloud cloud tree person"),
    "winter shore": Place(0.9, (0.2, 0.45), 0.4, "sea flat 0 1, sand shore .25 1, snow shore .6 1",
        "", "boat", "boat shed shed rock person tree bush cloud sheep"),
    "meadow": Place(1.1, (0.25, 0.75), 0.3, "grass hills 0 1, river strip 0 .5",
        "", "sheep", "sheep sheep sheep cow tree bush bush cloud cloud sun"),
    "farm": Place(1.0, (0.3, 0.6), 0.25, "grass hills 0 1, road strip 0 .6",
        "", "shed cow", "shed house cow cow sheep tree bush car person cloud sun"),
    "valley": Place(1.1, (0.35, 0.55), 0, "grass hills 0 1, river strip 0 .9, road strip 0 .35",
        "peaks", "tree", "tree bush rock boat boat cow sheep car cloud cloud house person"),
    "park": Place(1.0, (0.3, 0.5), 0.3, "grass hills 0 1, pavement strip 0 .4, river strip 0 .5",
        "building", "bush person", "tree tree bush bush person person lamp cloud umbrella boat"),
    "street": Place(1.1, (0.45, 0.6), 0.2, "pavement flat 0 1, road strip 0 1",
        "house", "car", "car car person person lamp tree bush cloud sun umbrella"),
    "night town": Place(0.9, (0.45, 0.62), 0, "pavement flat 0 1, river strip 0 .6, road strip 0 .6",
        "building", "lamp", "lamp car car boat boat person tree bush shed cloud"),
    "ski slope": Place(1.0, (0.3, 0.6), 0.3, "snow slope 0 1",
        "peaks", "tree person", "tree tree tree person person shed rock bush cloud cloud sun"),
    "winter village": Place(1.0, (0.35, 0.6), 0.25, "snow hills 0 1, river strip 0 .4, road strip 0 .5",
        "", "house", "house tree tree bush person car lamp shed sheep cloud"),
    "desert": Place(1.1, (0.3, 0.65), 0.15, "sand hills 0 1, river strip 0 .3, road strip 0 .5",
        "mesas", "tree rock", "rock rock bush tree car person shed cow sun cloud sheep"),
}
# Sway and lean of the edges of bands.
OUTLINES = {"flat": (0, 0), "quay": (0, 34), "hills": (5, 8), "slope": (3, 50), "shore": (4, 40)}
# fmt: on

PAIRS = tuple(tuple(names.split()) for names in STYLES if " " in names)
LOOKS = {name: style[:3] for names, style in STYLES.items() for name in names.split()}
CLASSES = tuple(LOOKS)
PALETTE = np.array([colour for style in STYLES.values() for colour in style[3:]], np.uint8)
THINGS = frozenset(FOOTING) | {"cloud", "sun", "building"}


class Scene(NamedTuple):
    """One image and its ground truth."""

    image: np.ndarray  # (128, 128, 3) uint8 RGB
    labels: np.ndarray  # (128, 128) uint8 class index, every pixel labelled
    instances: np.ndarray  # (128, 128) int32: 0 for stuff, 1.. for things
    place: str
    tags: tuple[str, ...]  # the classes in `labels`, in their order; each covers at least 64 pixels


def draw(index: int, ambiguity: float = 1.0) -> Scene:
    """Draw the scene of an index >= 0 (`SPLITS`); `ambiguity` in 0..1 blends from own to shared colours."""
    if index < 0 or not 0 <= ambiguity <= 1:
        raise ValueError(f"scene {index}, ambiguity {ambiguity}: need an index >= 0 and an ambiguity in 0..1")
    b = Brush(Random(f"scenes {VERSION} {index}"), ambiguity)
    paint_ground(b)
    paint_things(b)
    return develop(b, index)


def pick(r: Random, items, odds=None):
    """Return a random item, with probability proportional to `odds` (default: uniform)."""
    odds = odds or [1] * len(items)
    t = r.random() * sum(odds)
    for item, share in zip(items, odds):
        t -= share
        if t < 0:
            break
    return item


@lru_cache(1000)
def path(text: str) -> list[tuple[float, float]]:
    """`"u v  u v  ..."` as points."""
    numbers = [float(word) for word in text.split()]
    return list(zip(numbers[::2], numbers[1::2]))


class Brush:
    """The random choices of a scene, and a canvas of twice its size that stores colour and identity together.

    The canvas's fourth channel is an id per pixel: ids below 24 are classes of stuff, every thing takes the
    next free one. Shapes are given in a frame: the image's pixels for stuff; for a thing the origin at its
    foot, v upwards, its height the unit, possibly mirrored.
    """

    def __init__(self, r: Random, ambiguity: float):
        self.r, self.ambiguity = r, ambiguity
        self.place = pick(r, list(PLACES), [place.odds for place in PLACES.values()])
        place = PLACES[self.place]
        low, high = place.horizon
        self.above = r.random() < place.above
        self.top = 0 if self.above else SIZE * (low + (high - low) * r.random())  # where the ground begins
        self.horizon = -0.4 * SIZE if self.above else self.top  # where things would have no height
        self.names = place.must.split()
        while len(self.names) < 3 + 6 * r.random():
            self.names.append(pick(r, place.may.split()))
        self.night = r.random() < NIGHTS.get(self.place, 0.1)
        light = pick(r, [tint for _, tint in LIGHTS], [odds for odds, _ in LIGHTS])
        self.tint = NIGHT if self.night else light
        self.shade = {name: r.random() for name in CLASSES}  # where in its range a colour of stuff lies
        for first, second in PAIRS:  # uniform, and always different within a pair
            self.shade[second] = (self.shade[first] + 0.5) % 1
        self.canvas = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
        self.pen = ImageDraw.Draw(self.canvas)
        self.classes = list(range(len(CLASSES)))  # class of every id
        self.shadows, self.glows = [], []  # (id, x, y, radius)
        self.along = None  # whether the last road, path or river leads towards the horizon
        self.below = ""  # what the current thing stands on

    def colour(self, name: str, t: float) -> tuple[float, ...]:
        """Return the class's colour at t in 0..1 of its range."""
        ends = LOOKS[name][0]
        shared = PAINTS[int(t * len(PAINTS))] if ends == PAINTED else [a + t * (z - a) for a, z in zip(*ends)]
        keep = self.ambiguity if name in UNLIKE else 1.0
        return tuple(keep * c + (1 - keep) * own for c, own in zip(shared, UNLIKE.get(name, shared)))

    def stuff(self, name: str, x=0.0, y=0.0, wide=1.0, high=1.0) -> tuple[float, ...]:
        """Select this class of stuff, in a frame, for the next shapes; return its colour."""
        self.id, self.x, self.y, self.right, self.down = CLASSES.index(name), 2 * x, 2 * y, 2 * wide, 2 * high
        return self.colour(name, self.shade[name])

    def thing(self, name: str, x: float, y: float, height: float) -> tuple[float, ...]:
        """Select a new thing that stands at (x, y) for the next shapes; return its colour."""
        self.id, self.x, self.y, self.down = len(self.classes), 2 * x, 2 * y, -2 * height
        self.right = self.down if self.r.random() < 0.5 else -self.down
        self.classes.append(CLASSES.index(name))
        return self.colour(name, self.r.random())

    def ink(self, colour, shade: float, lit: bool) -> tuple[int, ...]:
        tint = (1, 1, 1) if lit else self.tint
        return *[min(255, int(c * t * shade)) for c, t in zip(colour, tint)], self.id

    def points(self, points) -> list[tuple[float, float]]:
        points = path(points) if isinstance(points, str) else points
        return [(self.x + self.right * u, self.y + self.down * v) for u, v in points]

    def poly(self, colour, points, shade: float = 1.0, lit: bool = False) -> None:
        self.pen.polygon(self.points(points), self.ink(colour, shade, lit))

    def box(self, colour, u0, v0, u1, v1, shade: float = 1.0, lit: bool = False) -> None:
        self.poly(colour, ((u0, v0), (u0, v1), (u1, v1), (u1, v0)), shade, lit)

    def oval(self, colour, u, v, ru, rv, shade: float = 1.0, lit: bool = False) -> None:
        ((x, y),), ru, rv = self.points([(u, v)]), abs(self.right) * ru, abs(self.down) * rv
        self.pen.ellipse((x - ru, y - rv, x + ru, y + rv), self.ink(colour, shade, lit))

    def line(self, colour, points, width: float, shade: float = 1.0) -> None:
        width = max(2, round(abs(self.down) * width))
        self.pen.line(self.points(points), self.ink(colour, shade, False), width)


def paint_ground(b: Brush) -> None:
    """Paint the sky with sun and clouds, the row along the horizon, then the ground from far to near."""
    place = PLACES[b.place]
    layers = [layer.split() for layer in place.ground.split(", ")]
    band(b, layers[0][0] if b.above else "sky", -40, 0, 0)
    if not b.above:
        if "sun" in b.names and not b.night:
            sun(b)
        for _ in range(b.names.count("cloud")):
            cloud(b, b.horizon)
        if place.back in ("peaks", "mesas"):
            mountains(b, place.back)
        elif place.back:
            terrace(b, place.back)
    for name, outline, begin, odds in layers:
        if b.r.random() >= float(odds):
            continue
        if outline == "isles":
            isles(b, name)
        elif outline == "strip":
            strip(b, name)
        else:
            band(b, name, b.top + float(begin) * (SIZE - b.top), *OUTLINES[outline])


def band(b: Brush, name: str, y: float, sway: float, lean: float) -> None:
    """Fill everything below an edge that sways (straight if `sway` is 0) and leans to one side."""
    r, colour = b.r, b.stuff(name)
    phase, turns, lean = 2 * pi * r.random(), 1.3 + 1.9 * r.random(), lean * (2 * r.random() - 1)
    steps = [i / 32 for i in range(33)]
    edge = [(SIZE * t, y + sway * sin(phase + 2 * pi * turns * t) + lean * (t - 0.5)) for t in steps]
    b.poly(colour, [*edge, (SIZE, SIZE), (0, SIZE)])
    if lean and y > b.top:
        b.line(colour, edge, 0.9, 1.12)


def isles(b: Brush, name: str) -> None:
    r, colour = b.r, b.stuff(name)
    for _ in range(1 + int(3 * r.random())):
        x, y = SIZE * r.random(), b.top + (SIZE - b.top) * (0.25 + 0.65 * r.random())
        width, phase = (24 + 34 * r.random()) * (0.4 + 0.6 * y / SIZE), 2 * pi * r.random()
        rim = [(pi * i / 12, width * (1 + 0.12 * sin(pi * i / 4 + phase))) for i in range(25)]
        rim = [(x + q * cos(a), y + 0.32 * q * sin(a)) for a, q in rim]
        b.poly(colour, rim)
        b.line(colour, rim, 0.9, 1.12)


def strip(b: Brush, name: str) -> None:
    """A road (even edges, marks), a path or a river (uneven banks, glints), towards the horizon or across."""
    r, colour, wild = b.r, b.stuff(name), float(name == "river")
    b.along = r.random() < 0.65 if b.along is None else not b.along  # a second strip crosses the first
    phases, lean = [2 * pi * r.random() for _ in range(3)], 2 * r.random() - 1
    width, near, far = 0.17 + 0.1 * r.random(), 0.2 + 0.6 * r.random(), 0.2 + 0.6 * r.random()
    room, edges = SIZE - b.top, []
    for t in [i / 32 for i in range(33)]:
        sway = wild * (0.6 * sin(7 * t + phases[0]) + 0.3 * sin(13 * t + phases[1]))
        sway += 0.35 * lean * sin(pi * t)
        half = width * (1 + 0.45 * wild * sin(9 * t + phases[2]))
        if b.along:
            y = b.top - 1 + (room + 2) * t**1.5
            x = SIZE * (far + (near - far) * t + 0.35 * sway * (0.25 + 0.75 * t))
            half *= SIZE * max(0.05, (y - b.horizon) / (SIZE - b.horizon))
            edges.append(((x - half, y), (x + half, y)))
        else:
            y = b.top + room * (0.3 + 0.35 * near + 0.16 * sway + 0.15 * lean * t)
            edges.append(((SIZE * t, y - 0.5 * half * room), (SIZE * t, y + 0.5 * half * room)))
    left, right = zip(*edges)
    b.poly(colour, left + right[::-1])
    b.line(colour, left, 0.8, 1.25)
    b.line(colour, right, 0.8, 1.25)
    for i in range(2, 31, 3) if name != "pavement" else ():
        f = 0.5 + 0.7 * wild * (r.random() - 0.5)
        start, end = ([u + f * (v - u) for u, v in zip(left[j], right[j])] for j in (i, i + 1))
        if wild and b.along:
            end = start[0] + 0.15 * (right[i][0] - left[i][0]), start[1]
        b.line(WHITE, [start, end], 0.9)


def mountains(b: Brush, kind: str) -> None:
    """Peaks, some with snow on top, or the flat-topped mesas of a desert."""
    r = b.r
    snowy = kind == "peaks" and r.random() < 0.6
    for _ in range(2 + int(3 * r.random())):
        x, foot, height = SIZE * r.random(), b.horizon + 30, b.horizon * (0.35 + 0.5 * r.random()) + 30
        frame = x, foot, height * (0.7 + 0.5 * r.random()), -height
        colour = b.stuff("mountain", *frame)
        if kind == "mesas":
            b.poly(colour, "-.8 0  -.6 .3  -.5 .35  -.42 .7  .4 .7  .5 .35  .62 .3  .8 0", 1.06)
            b.poly(colour, "-.1 0  .1 .3  .12 .7  .4 .7  .5 .35  .62 .3  .8 0", 0.86)
        else:
            b.poly(colour, "-1 0  -.5 .56  -.36 .6  0 1  1 0", 1.06)
            b.poly(colour, "0 1  -.12 .6  .1 0  1 0", 0.86)
        if snowy:
            b.poly(b.stuff("snow", *frame), "0 1  -.34 .62  -.2 .72  -.08 .56  .1 .7  .24 .56  .36 .64")


def terrace(b: Brush, name: str) -> None:
    """Houses or buildings side by side along the horizon."""
    r, x, tall = b.r, -10.0, name == "building"
    while x < SIZE + 10:
        height = 24 + (b.horizon - 20) * r.random() ** 1.5 if tall else 26 + 12 * r.random()
        width = height * (0.56 if tall else 0.95)
        colour = b.thing(name, x + width / 2, b.horizon + (10 if tall else 2), height)
        MAKERS[name](b, colour)
        x += width * (1.5 if r.random() < 0.2 else 1)


def paint_things(b: Brush) -> None:
    """Find a place for every thing, at a size given by its distance, and paint from far to near."""
    r, spots = b.r, []  # (y, x, height, half its width, name, what it stands on)
    ground = np.array(b.classes)[np.array(b.canvas.getchannel("A"))[::2, ::2]]
    for _ in range(b.names.count("cloud") if b.above else 0):
        cloud(b, 0.8 * SIZE)
    for name in [name for name in b.names if name in FOOTING]:
        size, shape, nearest, footing = FOOTING[name]
        low, high = VARIETY.get(name, (0.85, 1.15))
        for _ in range(60):
            x, y = SIZE * (0.05 + 0.9 * r.random()), SIZE - (SIZE - b.top) * (0.01 + 0.9 * r.random())
            t, below = (y - b.horizon) / (SIZE - b.horizon), CLASSES[ground[int(y), int(x)]]
            height = size * max(t, 0.25) * (low + (high - low) * r.random())
            height *= 0.7 if below == "river" else 1
            half = 0.5 * shape * height
            free = all(abs(x - spot[1]) > 0.8 * (half + spot[3]) or abs(y - spot[0]) > 16 for spot in spots)
            if t <= nearest and free and below in footing.split():
                spots.append((y, x, height, half, name, below))
                break
    for y, x, height, half, name, b.below in sorted(spots):
        colour = b.thing(name, x, y, height)
        if b.below not in ("sea", "river"):
            b.shadows.append((b.id, x, y, half))
        MAKERS[name](b, colour)


def puffs(b: Brush, colour, blobs, below: float = 0.84) -> None:
    """Round blobs (u, v, radius), darker below: clouds, sheep, bushes and trees."""
    for u, v, q in blobs:
        b.oval(colour, u, v, q, q, below)
    for u, v, q in blobs:
        b.oval(colour, u - 0.1 * q, v + 0.18 * q, 0.84 * q, 0.8 * q)


def fronds(b: Brush, colour, u: float, v: float, tips: str) -> None:
    """Leaves that arch from (u, v): palms and agaves."""
    for du, dv in path(tips):
        over, under = (u + 0.55 * du, v + 0.05 + 0.7 * dv), (u + 0.5 * du, v - 0.1 + 0.5 * dv)
        leaf = [(u, v + 0.04), over, (u + du, v - 0.07 + dv), under, (u, v - 0.08)]
        b.poly(colour, leaf, pick(b.r, (0.84, 1, 1)))


def sun(b: Brush) -> None:
    r = b.r
    radius, x, y = 6 + 4 * r.random(), SIZE * (0.1 + 0.8 * r.random()), b.horizon * (0.2 + 0.6 * r.random())
    b.oval(b.thing("sun", x, y, radius), 0, 0, 1, 1, lit=True)
    b.glows.append((b.id, x, y, 2 * radius))


def cloud(b: Brush, lowest: float) -> None:
    r, n = b.r, 4 + int(5 * b.r.random())
    colour = b.thing("cloud", SIZE * r.random(), lowest * (0.2 + 0.75 * r.random()), 12 + 14 * r.random())
    low = [(0.4 * (i - (n - 1) / 2), 0.22, 0.18 + 0.08 * r.random()) for i in range(n)]
    us = [0.3 * n * (r.random() - 0.5) for _ in range(n)]
    high = [(u, 0.4 + 0.3 * r.random(), 0.22 + 0.16 * r.random()) for u in us]
    puffs(b, colour, low + high, pick(r, (0.84, 0.6)))


def sheep(b: Brush, colour) -> None:
    for u in (-0.4, -0.24, 0.2, 0.36):
        b.box(DARK, u - 0.05, 0, u + 0.05, 0.4)
    body = path("-.4 .55  -.2 .68  .08 .7  .3 .6  -.15 .48  .15 .48")
    puffs(b, colour, [(u + 0.05 * b.r.random(), v, 0.25) for u, v in body])
    b.oval(DARK, 0.62, 0.66, 0.16, 0.2, 1.3)
    b.oval(DARK, 0.5, 0.8, 0.12, 0.06)
    b.oval(colour, 0.52, 0.86, 0.12, 0.1)


def bush(b: Brush, colour) -> None:
    """Round; on sand an agave."""
    r, n = b.r, 3 + int(3 * b.r.random())
    if b.below == "sand":
        fronds(b, colour, 0, 0.2, "-.9 .1  -.75 .45  .9 .1  .75 .45  -.45 .75  .45 .75  0 .85")
    else:
        us = [1.5 * (i / (n - 1) - 0.5) for i in range(n)]
        puffs(b, colour, [(u, 0.26 + 0.36 * (1 - u * u) * r.random(), 0.26 + 0.16 * r.random()) for u in us])
        puffs(b, colour, [(0.3 * r.random() - 0.15, 0.4, 0.4)])


def tree(b: Brush, colour) -> None:
    """A palm on sand, a fir on snow, elsewhere a fir or a tree with a round crown."""
    r = b.r
    if b.below == "sand":
        b.poly(BARK, "-.05 0  .05 0  .14 .45  .13 .85  .08 .85  .06 .45")
        fronds(b, colour, 0.1, 0.88, "-.42 -.1  -.36 .12  -.1 -.28  .2 -.26  .4 .1  .42 -.14")
    elif b.below == "snow" or r.random() < 0.25:
        b.box(BARK, -0.04, 0, 0.04, 0.2)
        for v, w in path(".12 .3  .36 .24  .6 .17"):
            b.poly(colour, [(-w, v), (w, v), (0, v + 0.4)], 0.84)
            b.poly(colour, [(-w, v), (0.06, v), (0, v + 0.4)])
    else:
        b.box(BARK, -0.05, 0, 0.05, 0.45)
        b.poly(BARK, "0 .3  .16 .5  .12 .52  0 .38")
        crown = path("0 .78  -.2 .62  .2 .62  0 .58  -.12 .74  .14 .74")
        puffs(b, colour, [(u, v, 0.17 + 0.06 * r.random()) for u, v in crown])


def boat(b: Brush, colour) -> None:
    """With sails or with a cabin."""
    trim = b.colour("boat", b.r.random())
    if b.r.random() < 0.5:
        b.line(BARK, "0 .2  0 1", 0.04)
        b.poly(trim, ".05 .3  .05 .98  .5 .3")
        b.poly(trim, "-.05 .3  -.05 .86  -.42 .3", 0.84)
    else:
        b.line(BARK, ".25 .4  .25 1  .75 .45", 0.03)
        b.box(trim, -0.5, 0.28, 0.12, 0.72)
        b.box(colour, -0.56, 0.7, 0.18, 0.78, 0.84)
        b.box(GLASS, -0.4, 0.5, -0.22, 0.64)
        b.box(GLASS, -0.14, 0.5, 0.04, 0.64)
    b.poly(colour, "-.72 .32  -.55 0  .5 0  .8 .38")
    b.poly(colour, ".15 .345  .1 0  .5 0  .8 .38", 0.84)


def shed(b: Brush, colour) -> None:
    """A gable with a barn door or with a door and a window; on stilts in the sea."""
    trim = b.colour("shed", b.r.random())
    for u in (-0.55, -0.05, 0.45) if b.below == "sea" else ():
        b.box(BARK, u, -0.2, u + 0.1, 0)
    b.poly(colour, "-.62 0  -.62 .62  0 .95  .62 .62  .62 0")
    b.box(colour, -0.62, 0, 0.62, 0.2, 0.84)
    b.poly(trim, "-.74 .54  -.74 .66  0 1.04  .74 .66  .74 .54  0 .9", 0.84)
    if b.r.random() < 0.5:
        b.box(trim, -0.22, 0, 0.22, 0.5)
        b.line(colour, "-.2 0  .2 .5", 0.05, 0.84)
        b.line(colour, "-.2 .5  .2 0", 0.05, 0.84)
    else:
        b.box(trim, -0.08, 0, 0.2, 0.46)
        b.box(GLASS, -0.46, 0.24, -0.2, 0.44)


def house(b: Brush, colour) -> None:
    """On snow, with a white roof."""
    roof = WHITE if b.below == "snow" else pick(b.r, ROOFS)
    b.box((150, 96, 80), 0.2, 0.6, 0.34, 1.0)
    b.box(colour, -0.5, 0, 0.5, 0.55)
    b.poly(roof, "-.6 .52  -.36 .92  .36 .92  .6 .52")
    b.box(roof, -0.6, 0.5, 0.6, 0.55, 0.8)
    b.box((110, 70, 50), -0.1, 0, 0.1, 0.34)
    for u in (-0.42, 0.2):
        b.box(WHITE, u - 0.03, 0.17, u + 0.25, 0.45)
        window(b, u, 0.2, u + 0.22, 0.42)


def building(b: Brush, colour) -> None:
    b.box(colour, -0.27, 0, 0.27, 1)
    b.box(colour, 0.12, 0, 0.27, 1, 0.86)
    for i in range(15):
        u, v = 0.16 * (i % 3) - 0.21, 0.12 + 0.175 * (i // 3)
        window(b, u, v, u + 0.1, v + 0.1)


def window(b: Brush, *corners: float) -> None:
    lit = b.night and b.r.random() < 0.6
    b.box(LIT if lit else GLASS, *corners, lit=lit)


def car(b: Brush, colour) -> None:
    """From behind on a road to the horizon, from the side on a road across."""
    if b.along:
        b.box(DARK, -0.62, 0, -0.38, 0.3)
        b.box(DARK, 0.38, 0, 0.62, 0.3)
        b.poly(colour, "-.7 .16  -.7 .62  -.58 .62  -.44 1  .44 1  .58 .62  .7 .62  .7 .16")
        b.poly(GLASS, "-.5 .62  -.38 .92  .38 .92  .5 .62")
        b.box(DARK, -0.7, 0.16, 0.7, 0.26)
        b.oval(PAINTS[0], -0.55, 0.46, 0.12, 0.09, lit=b.night)
        b.oval(PAINTS[0], 0.55, 0.46, 0.12, 0.09, lit=b.night)
    else:
        b.poly(colour, "-1.1 .18  -1.1 .5  -.75 .6  -.5 1  .4 1  .7 .6  1.1 .5  1.1 .18")
        b.poly(GLASS, "-.62 .6  -.42 .9  -.08 .9  -.08 .6")
        b.poly(GLASS, ".02 .6  .02 .9  .33 .9  .56 .6")
        b.box(LIT, 1.0, 0.38, 1.1, 0.48, lit=b.night)
        for u in (-0.65, 0.65):
            b.oval(DARK, u, 0.2, 0.22, 0.22)
            b.oval((170, 170, 172), u, 0.2, 0.1, 0.1)


def person(b: Brush, colour) -> None:
    """On snow, with skis."""
    if b.below == "snow":
        b.line(DARK, "-.4 0  .4 0  .46 .05", 0.05)
        b.line(DARK, ".3 .55  .38 0", 0.03)
    b.poly(pick(b.r, TROUSERS), "-.13 .48  -.16 0  -.04 0  0 .34  .05 0  .16 0  .13 .48")
    b.poly(colour, "-.13 .44  -.17 .78  .17 .78  .13 .44")
    b.line(colour, "-.16 .75  -.25 .48", 0.08, 0.85)
    b.line(colour, ".16 .75  .27 .52", 0.08, 0.85)
    b.oval(pick(b.r, SKINS), 0, 0.89, 0.11, 0.12)
    b.oval(pick(b.r, HAIRS), -0.02, 0.95, 0.11, 0.08)


def cow(b: Brush, colour) -> None:
    for u in (-0.55, -0.38, 0.25, 0.42):
        b.box(colour, u - 0.06, 0, u + 0.06, 0.45, 0.75)
    b.poly(colour, "-.66 .4  -.68 .82  -.5 .88  .45 .88  .56 .7  .5 .42  0 .34")
    b.oval(WHITE, -0.3, 0.66, 0.18, 0.14)
    b.oval(WHITE, 0.22, 0.58, 0.15, 0.13)
    b.line(colour, "-.66 .8  -.76 .4", 0.05, 0.75)
    b.poly(colour, ".4 .86  .6 1  .78 .94  .96 .66  .84 .58  .5 .62", 0.92)
    b.oval(SKINS[0], 0.88, 0.64, 0.1, 0.08)
    b.line(WHITE, ".62 .98  .58 1.1", 0.05)


def lamp(b: Brush, colour) -> None:
    b.box(colour, -0.09, 0, 0.09, 0.05)
    b.line(colour, "0 0  0 .86", 0.06)
    b.oval(LIT if b.night else WHITE, 0, 0.91, 0.1, 0.085, lit=b.night)
    b.poly(colour, "-.13 .96  0 1.05  .13 .96")
    if b.night:
        b.glows.append((b.id, b.x / 2, (b.y + 0.92 * b.down) / 2, 0.1 * abs(b.down)))


def rock(b: Brush, colour) -> None:
    peak = 0.2 * b.r.random() - 0.4, 0.85 + 0.15 * b.r.random()
    b.poly(colour, [(-0.9, 0), (-0.75, 0.45), peak, (0.4, 1), (0.8, 0.4), (0.95, 0)])
    b.poly(colour, [(-0.75, 0.45), peak, (0.4, 1), (-0.05, 0.5)], 1.15)
    b.poly(colour, ".4 1  .8 .4  .95 0  .2 0  -.05 .5", 0.8)


def umbrella(b: Brush, colour) -> None:
    b.line(WHITE, "0 0  0 .9", 0.05)
    rim = [(0.62 * cos(pi * i / 10), 0.55 + 0.45 * sin(pi * i / 10)) for i in range(11)]
    for i in range(0, 10, 2):
        hem = (0.124 * (5 - i), 0.55), (0.124 * (3 - i), 0.55)
        b.poly(WHITE if i % 4 else colour, [hem[0], *rim[i : i + 3], hem[1]])


MAKERS = {
    "sheep": sheep, "bush": bush, "tree": tree, "boat": boat, "shed": shed, "house": house, "car": car,
    "building": building, "person": person, "cow": cow, "lamp": lamp, "rock": rock, "umbrella": umbrella,
}  # fmt: skip


def develop(b: Brush, index: int) -> Scene:
    """Paint over regions that are too small, then add texture, distance, shadow, glow and noise."""
    bits = np.random.PCG64([VERSION, index])
    classes, canvas = np.array(b.classes), np.array(b.canvas)
    counts = np.bincount(classes[canvas[::2, ::2, 3]].ravel(), minlength=len(CLASSES))
    keep = (counts >= TAG_PIXELS)[classes[canvas[..., 3]]]
    canvas = canvas if keep.all() else smear(canvas, keep)
    ids = canvas[::2, ::2, 3]
    labels = classes[ids]
    counts = np.bincount(labels.ravel(), minlength=len(CLASSES))
    rows, columns = np.arange(SIZE)[:, None], np.arange(SIZE)
    oy, ox = (int(n) for n in bits.random_raw(2) % SIZE)
    kind = np.array([list(GRAINS).index(look[1]) for look in LOOKS.values()])
    strength = np.array([look[2] for look in LOOKS.values()], np.float32)
    light = 1 + strength[labels] * textures()[kind[labels], rows + oy, columns + ox]
    light *= distance(labels, counts)[labels, rows]
    shadow = np.zeros(ids.shape, bool)
    for id, x, y, half in b.shadows:
        if counts[b.classes[id]]:
            shadow |= ((columns - x - 0.3 * half) / (1.1 * half)) ** 2 + ((rows - y) / (0.3 * half)) ** 2 < 1
    light[shadow & (ids < len(CLASSES))] *= 0.8
    rgb = np.asarray(Image.fromarray(canvas).convert("RGB").reduce(2), np.float32) * light[..., None]
    for id, x, y, radius in b.glows:
        if counts[b.classes[id]]:
            near = 1 + ((columns - x) ** 2 + (rows - y) ** 2) / radius**2
            rgb += np.array(GLOW, np.float32) / np.float32(near**2)[..., None]
    first, second = bits.random_raw(2 * rgb.size // 8).view(np.uint8).reshape(2, *rgb.shape)
    sigma = np.float32(1 + 1.5 * b.r.random())
    rgb += (first.astype(np.int16) + second - 255) * (sigma / 104.5)  # a triangle; its own deviation is 104.5
    image = (rgb + 0.5).clip(0, 255).astype(np.uint8)
    visible = np.unique(ids[ids >= len(CLASSES)])
    number = np.zeros(len(classes), np.int32)
    number[visible] = np.arange(1, len(visible) + 1)
    tags = tuple(name for name, count in zip(CLASSES, counts) if count)
    return Scene(image, labels.astype(np.uint8), number[ids], b.place, tags)


@lru_cache(1)
def textures() -> np.ndarray:
    """Return a tile of smooth noise per kind of GRAINS, (8, 256, 256) float32 in [-2, 2]."""
    tiles = []
    for i, (height, width) in enumerate(GRAINS.values()):
        rows, columns = 2 * SIZE // height + 1, 2 * SIZE // width + 1
        noise = np.random.PCG64([VERSION, i]).random_raw(rows * columns).astype(np.uint8)
        smooth = Image.fromarray(noise.reshape(rows, columns))
        smooth = smooth.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
        tiles.append(np.asarray(smooth, np.float32)[: 2 * SIZE, : 2 * SIZE] / 64 - 2)
    return np.stack(tiles)


def smear(canvas: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Replace every pixel that is not kept by the nearest kept one to its left, else to its right."""
    column = np.arange(len(keep))
    left = np.maximum.accumulate(np.where(keep, column, -1), axis=1)
    right = np.minimum.accumulate(np.where(keep, column, len(keep))[:, ::-1], axis=1)[:, ::-1]
    return canvas[column[:, None], np.where(left >= 0, left, right)]


def distance(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return brightness by class and row, (24, 128): sky and ground are darker at their far end."""
    table = np.ones((len(CLASSES), SIZE), np.float32)
    for i, name in enumerate(CLASSES):
        if counts[i] and name not in THINGS and name != "mountain":
            rows = np.flatnonzero((labels == i).any(axis=1))
            table[i] = 0.88 + 0.24 * (np.arange(SIZE) - rows[0]) / max(1, rows[-1] - rows[0])
    return table


def write_folder(root: Path, counts: dict[str, int]) -> None:
    """Write evenly spaced scenes of each split as `--dataset folder` reads them: images, labels, classes."""
    for split, count in counts.items():
        indices = SPLITS[split]
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene, name = draw(indices[i * len(indices) // count]), f"{i:06d}.png"
            Image.fromarray(scene.image).save(root / "images" / split / name)
            Image.fromarray(scene.labels).save(root / "labels" / split / name)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def main(argv: list[str] | None = None) -> int:
    """Write evenly spaced scenes of a split as PNG files, to view and to predict on."""
    kind = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("python -m images.scenes", description="Draw scenes as PNG files.", formatter_class=kind)
    parser.add_argument("--split", choices=list(SPLITS), default="test", help="which range of indices")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of scenes")
    parser.add_argument("--out", default="scenes", metavar="DIR", help="output folder")
    whole = "instead, a data set for `train.py --dataset folder`: N images of train, N / 6 of val"
    parser.add_argument("--folder", action="store_true", help=whole)
    options = parser.parse_args(argv)
    indices = SPLITS["train" if options.folder else options.split]
    if not 1 <= options.count <= len(indices):
        parser.error(f"--count {options.count}: need 1 to {len(indices)}, the size of {options.split}")
    folder = Path(options.out)

    def work() -> None:
        if options.folder:
            write_folder(folder, {"train": options.count, "val": max(options.count // 6, 1)})
            print(f"{folder}: {options.count} scenes of train, {max(options.count // 6, 1)} of val")
            return
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(options.count):
            index = indices[i * len(indices) // options.count]
            Image.fromarray(draw(index).image).save(folder / f"{index:06d}.png")
        print(f"{folder}: {options.count} scenes of {options.split}")

    return run_command("images.scenes", work)


if __name__ == "__main__":
    sys.exit(main())
