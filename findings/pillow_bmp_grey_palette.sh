#!/bin/sh
# Pillow 13.0.0: a BMP of 4 or 8 bits a pixel whose palette is black and white is opened as mode "1" and its
# bytes are read as 1 bit a pixel; one of 4 bits with the palette 0, 1, 2, ... of greys as "L", 8 bits a pixel.
# BmpImagePlugin drops a grey palette and takes the new mode as the form of the stored samples, whatever
# their bits. No error is raised unless the rows are too short. Masks of two classes have such a palette.
# Who reads masks from BMP should compare the header's bits with the mode, or store PNG.
#
# Output seen:
#   stored: [0, 1, 1, 0, 1, 0, 0, 1]
#   8 bits, black and white: mode 1, [0, 0, 0, 0, 0, 0, 0, 0]
#   4 bits, black and white: mode 1, [0, 0, 0, 0, 0, 0, 0, 1]
#   1 bit, black and white: mode 1, [0, 1, 1, 0, 1, 0, 0, 1]
#   8 bits, black and red: mode P, [0, 1, 1, 0, 1, 0, 0, 1]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import io
import struct

import numpy as np
from PIL import Image


def read(bits: int, row: bytes, second: tuple[int, int, int] = (255, 255, 255)) -> tuple[str, list[int]]:
    """A BMP of 8 x 1 pixels and two colours."""
    palette = bytes(4) + bytes(second[::-1]) + b"\0"
    header = struct.pack("<IiiHHIIiiII", 40, 8, 1, 1, bits, 0, len(row), 0, 0, 2, 0)
    start = 14 + len(header) + len(palette)
    file = b"BM" + struct.pack("<IHHI", start + len(row), 0, 0, start) + header + palette + row
    image = Image.open(io.BytesIO(file))
    return image.mode, np.asarray(image).astype(int).ravel().tolist()


stored = [0, 1, 1, 0, 1, 0, 0, 1]
print(f"stored: {stored}")
eight, four = read(8, bytes(stored)), read(4, bytes([0x01, 0x10, 0x10, 0x01]))
one, red = read(1, bytes([0b01101001, 0, 0, 0])), read(8, bytes(stored), (255, 0, 0))
results = {"8 bits, black and white": eight, "4 bits, black and white": four}
results |= {"1 bit, black and white": one, "8 bits, black and red": red}
for name, (mode, pixels) in results.items():
    print(f"{name}: mode {mode}, {pixels}")
assert eight[1] != stored != four[1] and one[1] == red[1] == stored, "this has changed"
PYTHON
