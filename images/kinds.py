"""What an image file is by its first bytes, and why some kinds are not read."""

import re
from typing import BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

CONVERT = "which is not read: convert it to PNG"
RAW = "is a camera raw file, of which only a small preview could be read: develop it to TIFF or PNG"

# What is said of a file -> how such a file begins (the formats' specifications; FACTS: file(1)'s magic).
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
LOSSY = "which changes class numbers: save labels as PNG"
LOSSY_LABELS = {  # read as images; who writes a GIF renumbers its colours
    f"is a JPEG image, {LOSSY}": rb"\xff\xd8\xff",
    f"is a GIF image, {LOSSY}": rb"GIF8",
    f"is a WebP image, {LOSSY}": rb"RIFF.{4}WEBP",
    f"is an AVIF image, {LOSSY}": rb".{4}ftyp(avi[fs]|mif1|msf1)",
}


def refusal(file: BinaryIO, labels: bool) -> str | None:
    """What the open file is and the cure, if it is of a kind that is not read, as an image or as `labels`."""
    head = file.read(512)
    for sentence, start in (FOREIGN | LOSSY_LABELS if labels else FOREIGN).items():
        if re.match(start, head, re.DOTALL):
            return sentence
    if tags := tiff_tags(file):
        # A preview comes first in DNG, NEF, ARW and others; DNGVersion, NewSubfileType and SubIFDs tell them.
        if 50706 in tags or (tags.get(254, 0) & 1 and (330 in tags or tags.next)):
            return RAW
        if labels and tags.get(259) in (6, 7):
            return f"is a TIFF compressed as JPEG, {LOSSY}"
    return None


def unidentified(file: BinaryIO) -> str:
    """Why Pillow cannot open the file, and the cure."""
    tags = tiff_tags(file)
    if tags and 256 in tags:
        form = f"{tags.get(277, 1)} bands, {tags.get(258, (1,))[0]} bits each, compression {tags.get(259, 1)}"
        return f"is a TIFF of {form}, which is not read: save it with 1, 3 or 4 bands of 8 bits"
    return "is not an image, or its first bytes are corrupt: replace or remove it"


def tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2 | None:
    """The tags of a TIFF's first image."""
    file.seek(0)
    head = file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    tags = ImageFileDirectory_v2(head + file.read(8) if b"+" in head[:4] else head)
    file.seek(tags.next)
    tags.load(file)
    return tags
