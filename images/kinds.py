"""What a file is by its first bytes, where it is of a kind that is not read as an image."""

import re
from typing import BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

CONVERT = "which is not read: convert it to PNG"
RAW = "is a camera raw file, of which only a preview could be read: develop it to TIFF or PNG"

# What is said of a file: how such a file begins, by the formats' specifications and file(1)'s magic.
FOREIGN = {
    "is empty: replace or remove it": rb"\Z",
    "is a Git LFS pointer, not the file itself: run `git lfs pull`": rb"version https://git-lfs",
    "is a web page, not an image: download the image itself": rb"(?i)\s*(<!doctype html|<html)",
    f"is an SVG drawing, {CONVERT}": rb"(?i)\s*(<\?xml.*)?<svg",
    f"is an EPS or PostScript document, {CONVERT}": rb"%!PS|\xc5\xd0\xd3\xc6",
    f"is a PDF document, {CONVERT}": rb"%PDF",
    f"is a Photoshop document, {CONVERT}": rb"8BPS",
    f"is a HEIC image, {CONVERT}": rb".{4}ftyp(he|(mif1|msf1)(?!.{4}(.{4})*?avi[fs]))",
    f"is a JPEG XL image, {CONVERT}": rb"\xff\n|.{4}JXL ",
    f"is a JPEG 2000 image, {CONVERT}": rb"\xff\x4f\xff\x51|.{4}jP  ",
    RAW: rb".{4}ftypcrx|.{8}CR\x02|.{6}HEAPCCDR|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|FOVb",
}


def refusal(file: BinaryIO) -> str | None:
    """What the open file is, and the cure, if it is of a kind that is not read."""
    head = file.read(512)
    for sentence, start in FOREIGN.items():
        if re.match(start, head, re.DOTALL):
            return sentence
    tags = tiff_tags(file)  # DNG, NEF, ARW and others hold a preview first, and the image in SubIFDs
    if 50706 in tags or (tags.get(254, 0) & 1 and (330 in tags or tags.next)):  # DNGVersion, NewSubfileType
        return RAW
    return None


def unidentified(file: BinaryIO) -> str:
    """Why Pillow cannot open the file, and the cure."""
    if 256 not in (tags := tiff_tags(file)):
        return "is not an image, or its first bytes are corrupt: replace or remove it"
    form = f"bands {tags.get(277, 1)}, bits {tags.get(258, (1,))[0]}, compression {tags.get(259, 1)}"
    return f"is a TIFF of a form that is not read ({form}): save it with 1, 3 or 4 bands of 8 bits"


def bmp_bits(file: BinaryIO) -> int:
    """The bits a pixel of a BMP, which Pillow forgets (findings/pillow_bmp_grey_palette.sh)."""
    file.seek(14)
    header = file.read(16)
    return header[10] if header[0] == 12 else header[14]  # OS/2's header is 12 bytes long


def tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    """The tags of a TIFF's first image; none of any other file."""
    file.seek(0)
    head = file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return ImageFileDirectory_v2()
    tags = ImageFileDirectory_v2(head + file.read(8) if b"+" in head[:4] else head)
    file.seek(tags.next)
    tags.load(file)
    return tags
