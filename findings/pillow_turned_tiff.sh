#!/bin/sh
# Pillow 13.0.0: an uncompressed TIFF whose tag Orientation is 5 to 8 (a quarter turn) is read in stripes when
# it is opened by its name. Image.open() sets `size` to the turned size already before it reads; load() maps the
# file into memory with that size as the form of the stored rows, and then turns them. By an open file nothing
# is mapped, the rows are read with the stored size, and the image is right; so it is with compression.
# Modes that are mapped: L, P, RGBA, CMYK, I;16. RGB is not, and is right either way.
# Who reads TIFF from cameras, scanners or phones should pass an open file.
#
# Output seen:
#   stored: [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
#   by name, mode L: [[9, 6, 3, 0], [10, 7, 4, 1], [11, 8, 5, 2]]
#   by file, mode L: [[8, 4, 0], [9, 5, 1], [10, 6, 2], [11, 7, 3]]
#   by name, mode RGB: [[8, 4, 0], [9, 5, 1], [10, 6, 2], [11, 7, 3]]
#   by name, mode L, LZW: [[8, 4, 0], [9, 5, 1], [10, 6, 2], [11, 7, 3]]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from PIL import Image

ramp, exif = np.arange(12, dtype=np.uint8).reshape(3, 4), Image.Exif()
exif[0x0112] = 6  # to be turned a quarter clockwise
turned = np.rot90(ramp, -1).tolist()


def read(name: str | object) -> list:
    with Image.open(name) as image:
        pixels = np.asarray(image)
    return (pixels if pixels.ndim == 2 else pixels[..., 0]).tolist()


def save(mode: str, compression: str | None = None) -> None:
    Image.fromarray(ramp).convert(mode).save("ramp.tif", exif=exif, compression=compression)


print(f"stored: {ramp.tolist()}")
save("L")
print(f"by name, mode L: {(wrong := read('ramp.tif'))}")
with open("ramp.tif", "rb") as file:
    print(f"by file, mode L: {(right := read(file))}")
save("RGB")
print(f"by name, mode RGB: {(colours := read('ramp.tif'))}")
save("L", "tiff_lzw")
print(f"by name, mode L, LZW: {(packed := read('ramp.tif'))}")
assert wrong != turned and right == colours == packed == turned, "this has changed"
PYTHON
