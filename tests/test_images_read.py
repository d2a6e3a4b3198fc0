"""images/read.py and images/kinds.py: every file is read right, or refused by its name and what it is."""

import itertools
import os
import socket
import stat
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, JpegImagePlugin

from errors import DataError, Unreadable
from images.panoptic import Segment, read_map
from images.read import FORMATS, SUFFIXES, find_images, label_table, read_image, read_labels

ANY = label_table(range(255), ())  # a table that refuses nothing
RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4)
TURNED = [[8, 4, 0], [9, 5, 1], [10, 6, 2], [11, 7, 3]]  # by EXIF orientation 6, a quarter clockwise


def noise(H: int, W: int) -> np.ndarray:
    """A smooth coloured image (H, W, 3) uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (max(H // 8, 2), max(W // 8, 2), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BICUBIC))


def png(
    depth: int, colour: int, rows: list[bytes], size: tuple[int, int], *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG written out by hand, of `size` (W, H), with chunks `extra` before its pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def tiff(width: int, height: int, pixels: bytes, second: int = 0, **tags: int | tuple[int, ...]) -> bytes:
    """An uncompressed little-endian TIFF written out by hand; tags by their numbers, as t258=8.

    second: where the tags of a second image are.
    """
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 1024, 277: 1, 279: len(pixels)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries, after = b"", b""
    for tag, value in sorted(values.items()):
        value = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(value)}I", *value)
        if len(packed) > 4:
            packed, after = struct.pack("<I", 512 + len(after)), after + packed
        entries += struct.pack("<HHI", tag, 4, len(value)) + packed
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", second)
    return (head.ljust(512, b"\0") + after).ljust(1024, b"\0") + pixels


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---- formats ---------------------------------------------------------------------------------------------


def test_each_suffix_is_of_a_format_that_is_read(tmp_path):
    """A colour image in every format; of an animation the first frame; a JPEG of several images as well."""
    colours, later = Image.fromarray(noise(32, 48)), Image.new("RGB", (48, 32), "blue")
    for suffix in SUFFIXES:
        more = {"save_all": True, "append_images": [later]} if suffix in (".gif", ".webp", ".avif") else {}
        colours.save(tmp_path / f"x{suffix}", **({} if suffix == ".bmp" else {"quality": 95} | more))
        image, size = read_image(tmp_path / f"x{suffix}")
        assert (image.mode, image.size, size) == ("RGB", (48, 32), (32, 48)), suffix
        assert np.abs(np.asarray(image).astype(int) - noise(32, 48)).mean() < 8, suffix  # a GIF is dithered
        with Image.open(tmp_path / f"x{suffix}") as opened:
            assert opened.format in FORMATS
    large = Image.fromarray(noise(320, 480))
    large.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[later], exif=orientation(6))
    image, size = read_image(tmp_path / "camera.jpg", 20, 80)
    assert size == (480, 320) and image.size == (80, 120)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: replace or remove it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:6f\nsize 9\n", "Git LFS .*`git lfs pull`"),
        (b"\r\n<!DOCTYPE HTML><title>404</title>", "is a web page, .*download the image"),
        (b"<html lang='en'>", "is a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG .*: convert it"),
        (EPS, "is an EPS .*: convert it to PNG"),
        (b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS, "is an EPS"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"8BPS\0\1" + bytes(20), "is a Photoshop"),
        (HEIC, "is a HEIC image, .*: convert it to PNG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafheic", "is a HEIC image"),
        (b"\xff\x0a" + bytes(20), "is a JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is a JPEG 2000"),
        (b"\xff\x4f\xff\x51" + bytes(20), "is a JPEG 2000"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "is a camera raw file"),
        (b"FUJIFILMCCD-RAW 0201", "is a camera raw file"),
        (b"II*\0\x10\0\0\0CR\2\0", "is a camera raw file"),
        (b"plain text", "is not an image, or its first bytes are corrupt"),
    ],
)
@pytest.mark.parametrize("labels", [False, True])
def test_what_is_not_read_is_named(tmp_path, content, sentence, labels):
    """Whatever the suffix; the name stands first, the cure last."""
    path = write(tmp_path / "x.png", content + bytes(64) * bool(content))
    with pytest.raises(Unreadable, match=rf"^{path} {'.*' if 'Git' in sentence else ''}{sentence}"):
        read_labels(path, ANY) if labels else read_image(path)


def test_no_process_is_started(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for an EPS file, whatever its suffix."""
    started = []
    for place, name in [(subprocess, "Popen"), (os, "posix_spawn"), (os, "fork"), (os, "system")]:
        monkeypatch.setattr(place, name, lambda *args, **_: started.append(args))
    for content in (EPS, EPS.replace(b"%!PS", b" %!PS"), b"\n" + EPS):
        with pytest.raises(Unreadable, match=r"x\.jpg is (an EPS|not an image)"):
            read_image(write(tmp_path / "x.jpg", content))
    assert not started


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """To open a pipe would wait for ever; below a folder each is refused by its name like a damaged file."""
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 108 bytes
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    os.mkdir("folder.png")
    for name in ("pipe.png", "socket.png", "folder.png", "/dev/zero"):
        for read in (read_image, lambda x: read_labels(x, ANY), lambda x: read_map(Path(x), [])):
            with pytest.raises(Unreadable, match=rf"^{name} is a folder, pipe, socket or device"):
                read(name)
    found = find_images(["."], tmp_path / "out", {})
    assert [Path(path).name for path in found] == ["pipe.png", "socket.png"]
    with pytest.raises(Unreadable, match=r"^absent\.png cannot be read \(No such file"):
        read_image("absent.png")


@pytest.mark.parametrize(
    "fault",
    [RuntimeError, struct.error, OverflowError, EOFError, MemoryError, KeyError, AssertionError, TypeError],
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, fault):
    def fails(*_):
        raise fault

    path = tmp_path / "x.jpg"
    Image.fromarray(noise(16, 16)).save(path)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", fails)
    with pytest.raises(Unreadable, match=rf"^{path} cannot be read \({fault.__name__}\): replace"):
        read_image(path)


def test_a_damaged_avif_is_named(tmp_path):
    """Often under the name .jpg; cut, and with the start of its pixels overwritten."""
    assert AvifImagePlugin.SUPPORTED
    path = tmp_path / "x.jpg"
    Image.fromarray(noise(64, 64)).save(path, "AVIF")
    assert read_image(path)[1] == (64, 64)
    whole = path.read_bytes()
    read_image(write(path, whole.replace(b"ftypavif", b"ftypmif1", 1)))  # which HEIC may begin with, too
    start = whole.index(b"mdat") + 4
    for content in (
        whole[:40],
        whole[: len(whole) // 2],
        whole[:start] + bytes([255] * 20) + whole[start + 20 :],
    ):
        with pytest.raises(Unreadable, match=rf"^{path} (cannot be read|is not an image)"):
            read_image(write(path, content))


def test_a_tiff_that_is_not_read_is_described(tmp_path):
    path = write(tmp_path / "x.tif", tiff(4, 3, bytes(60), t258=(8,) * 5, t277=5))
    with pytest.raises(
        Unreadable, match=r"x\.tif is a TIFF of a form that .* \(bands 5, bits 8, compression 1\): save it"
    ):
        read_image(path)
    with pytest.raises(Unreadable, match=r"x\.tif is not an image, or its first bytes are corrupt"):
        read_image(write(path, b"II*\0" + struct.pack("<IHI", 8, 0, 0)))


def bmp(bits: int, row: bytes, palette: list[int], short: bool = False) -> bytes:
    """A BMP of 8 x 1 pixels with a palette of greys, written out by hand; `short`: with OS/2's header."""
    colours = b"".join(bytes([grey] * 3 + [0] * (not short)) for grey in palette)
    if short:
        header = struct.pack("<IHHHH", 12, 8, 1, 1, bits)
    else:
        header = struct.pack("<IiiHHIIiiII", 40, 8, 1, 1, bits, 0, len(row), 0, 0, len(palette), 0)
    start = 14 + len(header + colours)
    return b"BM" + struct.pack("<IHHI", start + len(row), 0, 0, start) + header + colours + row


def test_a_bmp_whose_bits_pillow_forgets_is_refused(tmp_path):
    """A palette of greys is dropped, and with it the number of bits; all others are read as stored."""
    path, two, stored = tmp_path / "x.bmp", [0, 255], bytes([0, 1, 1, 0, 1, 0, 0, 1])
    four, one = bytes([0x01, 0x10, 0x10, 0x01]), bytes([0b01101001, 0, 0, 0])
    for content in (bmp(8, stored, two), bmp(4, four, two), bmp(4, four, [*range(16)], short=True)):
        for read in (read_image, lambda x: read_labels(x, ANY)):
            with pytest.raises(
                Unreadable, match=r"x\.bmp is a BMP of [48] bits in greys, .*: save it as PNG"
            ):
                read(write(path, content))
    for content in (
        bmp(1, one, two),
        bmp(1, one, two, short=True),
        bmp(8, stored, [*range(256)]),
        bmp(8, stored, [*range(256)], short=True),
        bmp(8, stored, [7, 9]),
        bmp(4, four, [9, 7]),
    ):
        assert read_labels(write(path, content), ANY).tolist() == [[*stored]]


def test_other_formats_are_not_tried(tmp_path):
    """Pillow would read them, and run code that nobody asked for."""
    for form in ("PPM", "ICO", "TGA", "PCX"):
        Image.fromarray(noise(32, 32)).save(tmp_path / "x.png", form)
        with pytest.raises(Unreadable, match=r"x\.png is not an image, or its first bytes are corrupt"):
            read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "tags",
    [
        {"t50706": 0x401},
        {"t254": 1, "t330": 900},
        {"t254": 1, "second": 8},
        {"t254": 1, "t330": 900, "t262": 32803},
    ],
)
def test_the_preview_of_a_camera_raw_file_is_not_taken_for_it(tmp_path, tags):
    """DNG by its version; NEF, ARW and others by a first image that is a reduced one of images below it."""
    with pytest.raises(Unreadable, match=r"x\.dng is a camera raw file, .*: develop it to TIFF or PNG"):
        read_image(write(tmp_path / "x.dng", tiff(4, 3, RAMP.tobytes(), **tags)))
    for kept in ({"t254": 0, "t330": 900}, {"t254": 1}, {}):  # a pyramid, a preview alone
        image, _ = read_image(write(tmp_path / "x.tif", tiff(4, 3, RAMP.tobytes(), **kept)))
        assert (np.asarray(image)[..., 0] == RAMP).all()


# ---- orientation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_is_no_stripes(tmp_path, mode, compression):
    """Of every mode, packed or not, as image and as labels."""
    if mode == "I;16":
        stored = Image.fromarray(RAMP.astype(np.uint16) << 8)
    else:
        stored = Image.fromarray(RAMP).convert(mode) if mode != "P" else Image.fromarray(RAMP, "P")
        if mode == "P":
            stored.putpalette([value for value in range(256) for _ in "RGB"])
    path = tmp_path / "x.tif"
    stored.save(path, exif=orientation(6), compression=compression)
    image, size = read_image(path)
    assert size == (4, 3) and np.asarray(image)[..., 0].tolist() == TURNED
    if mode in ("L", "P"):
        assert read_labels(path, ANY).tolist() == TURNED
    elif mode in ("RGB", "RGBA"):
        assert read_labels(path, ANY, colours={(x, x, x): x for x in range(12)}).tolist() == TURNED


def test_labels_are_turned_as_images_are(tmp_path):
    """PNG as TIFF, class numbers, colours and panoptic ids."""
    for name in ("x.png", "x.tif"):
        Image.fromarray(RAMP).save(tmp_path / name, exif=orientation(6))
        assert read_labels(tmp_path / name, ANY).tolist() == TURNED
        assert np.asarray(read_image(tmp_path / name)[0])[..., 0].tolist() == TURNED
    ids = np.stack([RAMP, 0 * RAMP, 0 * RAMP], axis=2)
    Image.fromarray(ids).save(tmp_path / "ids.png", exif=orientation(6))
    assert read_map(tmp_path / "ids.png", [Segment(i, 0, False) for i in range(1, 12)]).tolist() == TURNED


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\xff\xff", b"nonsense", b"II*\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_counts_as_none(tmp_path, suffix, exif):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(noise(16, 24)).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    image, size = read_image(path)
    assert size == (16, 24) and np.abs(np.asarray(image).astype(int) - noise(16, 24)).mean() < 4
    if suffix == ".png":
        late = path.read_bytes()[:-12] + png(8, 0, [], (1, 1), (b"eXIf", exif))[33:].split(b"IDAT")[0][:-4]
        assert read_image(write(path, late + png(8, 0, [], (1, 1))[-12:]))[1] == (16, 24)


# ---- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["grey png", "palette png", "grey tiff", "packed tiff"])
def test_samples_of_few_bits_are_class_numbers(tmp_path, kind, bits):
    """As labels they are read as they are stored; an image in grey is spread over 0..255."""
    stored = np.arange(2**bits, dtype=np.uint8).repeat(8 // bits).reshape(2, -1)  # rows of whole bytes
    packed = np.packbits(stored[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1, axis=None)
    size, palette = stored.shape[::-1], (b"PLTE", bytes(range(3 << bits)))
    rows = [*packed.reshape(2, -1)]
    path = write(
        tmp_path / "x.png",
        {
            "grey png": png(bits, 0, [*map(bytes, rows)], size),
            "palette png": png(bits, 3, [*map(bytes, rows)], size, palette),
            "grey tiff": tiff(*size, packed.tobytes(), t258=bits),
            "packed tiff": tiff(*size, zlib.compress(packed.tobytes()), t258=bits, t259=8, t278=2),
        }[kind],
    )
    labels = read_labels(path, ANY)
    assert labels.dtype == np.uint8 and (labels == stored).all()
    if "palette" not in kind:
        assert (np.asarray(read_image(path)[0])[..., 1] == stored * (255 // (2**bits - 1))).all()
    with pytest.raises(DataError, match=rf"x\.png holds the value {2**bits - 1}: labels here are 0"):
        read_labels(path, label_table(range(2**bits - 1), ()))


def test_a_tiff_that_stores_white_as_0_is_no_label_file(tmp_path):
    """Its samples and its grey are opposite."""
    for bits in (1, 4, 8):
        path = write(tmp_path / "x.tif", tiff(8, 1, bytes(bits), t258=bits, t262=0))
        with pytest.raises(DataError, match=r"x\.tif stores white as 0 .*: save labels as PNG"):
            read_labels(path, ANY)
        assert np.asarray(read_image(path)[0]).min() == 255


@pytest.mark.parametrize("form", ["JPEG", "GIF", "WEBP", "AVIF", "TIFF"])
def test_a_label_file_that_loses_class_numbers_is_named(tmp_path, form):
    """Under the name .png, too: JPEG mixes classes; who writes a GIF renumbers its colours."""
    path = tmp_path / "x.png"
    how = {"compression": "jpeg"} if form == "TIFF" else {}
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(path, form, **how)
    with pytest.raises(
        Unreadable, match=rf"x\.png is {form}, which alters class numbers: save labels as PNG"
    ):
        read_labels(path, ANY)
    with pytest.raises(Unreadable, match="alters class numbers"):
        read_map(path, [])
    assert read_image(path)[1] == (16, 16)


COLOURS = {(128, 0, 0): 0, (0, 128, 0): 1, (1, 0, 128): 2, (255, 255, 255): 255, (0, 0, 0): 255}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_labels_in_colours_are_looked_up(tmp_path, mode, suffix):
    """Whatever their order in the table; transparency is no matter."""
    palette, ids = np.array([*COLOURS], np.uint8), np.random.default_rng(0).integers(0, 5, (37, 53))
    image = Image.fromarray(palette[ids]).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray((ids * 50).astype(np.uint8)))
    image.save(tmp_path / f"x{suffix}")
    for order in itertools.islice(itertools.permutations(COLOURS.items()), 0, None, 17):
        labels = read_labels(tmp_path / f"x{suffix}", ANY, colours=dict(order))
        assert labels.dtype == np.uint8 and (labels == np.array([*COLOURS.values()])[ids]).all()


def test_an_unknown_colour_is_named(tmp_path):
    """The most frequent one, with the number of its pixels and the file; below and above all known ones."""
    pixels = np.full((8, 8, 3), (128, 0, 0), np.uint8)
    pixels[:2], pixels[2, :3] = (254, 253, 252), (0, 0, 1)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    for known in (COLOURS, {(128, 0, 0): 0}):
        with pytest.raises(
            DataError,
            match=r"x\.png has colours that classes\.txt lacks \(2 in all, most often 254 253 252 in 16 ",
        ) as caught:
            read_labels(path, ANY, colours=known)
        assert not isinstance(caught.value, Unreadable)
    pixels[:2] = (128, 0, 0)
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match=r"\(1 in all, most often 0 0 1 in 3 pixels\)"):
        read_labels(path, ANY, colours=COLOURS)


def test_colours_change_nothing_for_class_numbers(tmp_path):
    """Grey and palette files hold class numbers; without colours RGB is refused with the cure."""
    palette = Image.fromarray(RAMP, "P")
    palette.putpalette([255 - x for x in range(256) for _ in "RGB"])
    for name, image in {"L.png": Image.fromarray(RAMP), "P.png": palette}.items():
        image.save(tmp_path / name)
        assert (read_labels(tmp_path / name, ANY, colours=COLOURS) == RAMP).all()
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png")
    for colours in (None, {}):
        with pytest.raises(
            DataError, match=r"has mode RGB: labels are class numbers .* add the colours to classes\.txt$"
        ):
            read_labels(tmp_path / "x.png", ANY, colours=colours)
    Image.new("LA", (4, 3)).save(tmp_path / "LA.png")
    with pytest.raises(DataError, match=r"has mode LA: labels are class numbers .* I;16\)$"):
        read_labels(tmp_path / "LA.png", ANY)
    with pytest.raises(DataError, match=r"\(mode 1, L, P or I;16\); use the other archive$"):
        read_labels(tmp_path / "x.png", ANY, "; use the other archive")


# ---- limits, names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [0, 2, 3])
def test_a_small_file_of_many_pixels_is_refused_by_every_reader(tmp_path, colour):
    extra = [(b"PLTE", bytes(6))] if colour == 3 else []
    path = write(tmp_path / "x.png", png(8, colour, [], (8_001, 8_000), *extra))
    for read in (read_image, lambda x: read_labels(x, ANY, colours=COLOURS), lambda x: read_map(x, [])):
        with pytest.raises(Unreadable, match=r"x\.png is too large \(8001x8000\): at most 64,000,000 pixels"):
            read(path)


def test_names_of_any_bytes_and_length_are_found_and_read(tmp_path):
    """250 bytes, and bytes that are not UTF-8."""
    content = png(8, 0, [bytes(4)], (4, 1))
    for name in (b"n" * 246 + b".png", b"\xff\xfe.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
    found = find_images([str(tmp_path)], tmp_path / "out", {})
    assert sorted(map(len, found.values())) == [2, 246]
    assert all(stat.S_ISREG(os.stat(path).st_mode) and read_image(path)[1] == (1, 4) for path in found)
    with pytest.raises(Unreadable, match=r"cannot be read"):
        read_image(f"{tmp_path}/a\0b.png")
