"""Many mixed images through predict.py, one in a hundred broken: all are predicted once, the broken listed,
the memory stays flat, and what is killed in the middle is finished by the same command.

`python -m pytest -m sweep -s tests/test_load.py` prints the figures of 10,000 images and two processes.
"""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from assemble import build
from images.read import find_images
from model import TadaConfig
from predict import load_model, predict_image
from run.checkpoint import save_model

ROOT = Path(__file__).parents[1]
TOTAL = "{done} predicted, {left} skipped, {broken} unreadable"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model of three classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = TadaConfig(("Straße", "sea", "sky"), model="tiny", crop=(64, 64), box=(64, 64), stride=(43, 43))
    save_model(build(config), file, {}, {})
    return str(file)


# ---- the images


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    """On its side, upright by its EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)


# What is read: suffix, and the file of an RGB image.
WHOLE: list[tuple[str, Callable[[Image.Image], bytes]]] = [
    (".jpg", lambda x: encoded(x, "JPEG")),
    (".JPG", lambda x: encoded(x.convert("L"), "JPEG")),
    (".jpeg", lambda x: encoded(x.convert("CMYK"), "JPEG")),
    (".jpg", turned),
    (".jpg", lambda x: encoded(x, "JPEG", progressive=True)),
    (".jpg", lambda x: encoded(x, "PNG")),  # of another format than its name
    (".png", lambda x: encoded(x, "PNG")),
    (".png", lambda x: encoded(x.convert("RGBA"), "PNG")),
    (".png", lambda x: encoded(x.quantize(16), "PNG", transparency=3)),
    (".png", lambda x: encoded(sixteen(x), "PNG")),
    (".png", lambda x: encoded(x.convert("1"), "PNG")),
    (".png", lambda x: encoded(x.convert("LA"), "PNG")),
    (".webp", lambda x: encoded(x, "WEBP")),
    (".webp", lambda x: encoded(x.convert("RGBA"), "WEBP", lossless=True)),
    (".bmp", lambda x: encoded(x, "BMP")),
    (".tif", lambda x: encoded(x, "TIFF")),
    (".tiff", lambda x: encoded(x.convert("CMYK"), "TIFF", compression="tiff_lzw")),
    (".gif", lambda x: encoded(x, "GIF", save_all=True, append_images=[x.rotate(180)])),
]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def huge() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def flipped(file: bytes) -> bytes:
    """One bit of a PNG's header, which its checksum tells."""
    return file[:19] + bytes([file[19] ^ 4]) + file[20:]


# What is not: suffix, the file from an RGB image (None: made otherwise), and what is said of it.
BROKEN: list[tuple[str, Callable[[Image.Image], bytes] | None, str]] = [
    (".png", lambda x: b"", "is empty"),
    (".jpg", lambda x: encoded(x, "JPEG")[:-200], "truncated"),
    (".jpg", lambda x: b"<!DOCTYPE html><html>404</html>", "is a web page"),
    (".png", lambda x: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    (".png", lambda x: flipped(encoded(x, "PNG")), "first bytes are corrupt"),
    (".png", lambda x: huge(), "is too large"),
    (".jpg", lambda x: encoded(x, "PDF"), "is a PDF document"),
    (".tif", lambda x: encoded(x.convert("F"), "TIFF"), "holds floating-point numbers"),
    (".avif", lambda x: encoded(x, "AVIF")[:-40], "cannot be read"),
    (".png", None, "is a folder, pipe, socket or device"),
]


@dataclass
class Folder:
    """Images below `path`: those that are whole with their upright (H, W), those that are broken."""

    path: Path
    whole: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # path -> what is said of it


PLACES = ("", "a b", "ä/Straße (2)", "c/[1]", os.fsdecode(b"caf\xe9"), "x.png")  # the folders, by turns


def draw(chance: random.Random, size: tuple[int, int]) -> Image.Image:
    small = np.frombuffer(chance.randbytes(90), np.uint8).reshape(5, 6, 3)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def draw_folder(path: Path, count: int, broken: int, large: int) -> Folder:
    """`count` images of 32 to 160 pixels a side; `large` of them have 1500 x 1000, `broken` are broken."""
    chance, folder = random.Random(18), Folder(path)
    kinds = [True] * (count - broken) + [False] * broken
    chance.shuffle(kinds)
    for i, whole in enumerate(kinds):
        size = chance.randint(32, 160), chance.randint(32, 160)
        size = (1500, 1000) if i % (count // large) == 5 else size
        image, where = draw(chance, size), path / PLACES[i // 2 % len(PLACES)] / f"{i // 500:02}"
        where.mkdir(parents=True, exist_ok=True)
        if whole:
            n = len(folder.whole)
            suffix, make = WHOLE[n % len(WHOLE)]
            file = where / f"image {i - i % 2 if suffix == '.bmp' else i}{suffix}"  # a.webp beside a.bmp
            assert not file.exists()
            file.write_bytes(make(image))
            folder.whole[str(file)] = size[::-1]
        else:
            suffix, make, said = BROKEN[len(folder.broken) % len(BROKEN)]
            file = where / f"bröken {i}{suffix}"
            file.write_bytes(make(image)) if make else os.mkfifo(file)
            folder.broken[str(file)] = said
        if i % 100 == 0:  # no images, or hidden ones
            for name in ("notes.txt", ".DS_Store", f"._{file.name}"):
                (where / name).write_text("no image")
    return folder


# ---- the command, and what is seen of it


def children(pid: int) -> list[int]:
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass
class Watch:
    """The processes of a command, until it ends or has written `until` lines of predictions."""

    code: int | None = None  # None: killed
    said: str = ""
    seconds: float = 0.0
    cpu: dict[int, float] = field(default_factory=dict)  # seconds by process
    memory: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # MB every 2 s

    def look(self, pid: int) -> None:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        except (OSError, IndexError):  # it has ended
            return
        self.memory[pid].append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.cpu[pid] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def longest(self, n: int) -> list[list[float]]:
        """The memory of the processes that lasted."""
        return sorted(self.memory.values(), key=len)[-n:]


def watched(command: list[str], out: Path, said: Path, until: float = float("inf")) -> Watch:
    """Run a command of predict.py; kill it and all its processes after `until` lines."""
    watch, start, next_look, count = Watch(), time.monotonic(), 0.0, 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        while process.poll() is None and count < until:
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 2
                for pid in children(process.pid) or [process.pid]:
                    watch.look(pid)
            if (out / "predictions.jsonl").exists() and until < float("inf"):
                count = (out / "predictions.jsonl").read_bytes().count(b"\n")
            time.sleep(0.02 if until < 100 else 0.5)
        watch.code = process.returncode
    finally:
        for pid in children(process.pid) + [process.pid]:  # torchrun's are groups of their own
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        while any(Path(f"/proc/{pid}/statm").exists() and alive(pid) for pid in watch.cpu):
            time.sleep(0.02)
    watch.said, watch.seconds = said.read_text(errors="surrogateescape"), time.monotonic() - start
    return watch


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def growth(memory: list[float]) -> tuple[float, float]:
    """Medians of the first and the last third of what was seen after the start, a tenth, 20 s at least."""
    memory = memory[max(len(memory) // 10, 10) :]
    assert len(memory) >= 15, "too few looks"
    third = len(memory) // 3
    return median(memory[:third]), median(memory[-third:])


def listed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def check(folder: Folder, model: str, tmp_path: Path, processes: int) -> tuple[Watch, Watch]:
    """Predict a folder, killed in the middle and run again; what stands on the disk then is right."""
    out = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun[: 5 * (processes > 1)], "predict.py", model, str(folder.path)]
    command += ["--out", str(out), "--tags", "classes"]
    first = watched(command, out, tmp_path / "said-1", until=len(folder.whole) // 2)
    assert first.code is None, first.said[-2000:]
    done = {file: file.stat().st_mtime_ns for file in out.rglob("*.png") if file.is_file()}
    assert len(folder.whole) * 0.4 < len(done) < len(folder.whole) * 0.9

    second = watched(command, out, tmp_path / "said-2")
    assert second.code == 1, second.said[-2000:]
    counts = {"done": len(folder.whole) - len(done), "left": len(done), "broken": len(folder.broken)}
    assert TOTAL.format(**counts) in second.said, second.said[-2000:]
    assert {file: file.stat().st_mtime_ns for file in done} == done  # nothing is predicted twice
    # Every one that is broken is listed once, with the reason.
    said = re.findall(r"^unreadable: (.*)$", second.said, re.MULTILINE)
    assert len(said) == len(folder.broken)
    for path, reason in folder.broken.items():
        shown = path.encode("utf-8", "backslashreplace").decode()
        (line,) = [line for line in said if line.startswith(f"{shown} ")]
        assert reason in line
    # Every other one has one line, and its files as a run without an interruption names them.
    lines = listed(out)
    names = find_images([str(folder.path)], tmp_path / "other", {})
    assert {line["path"]: line["labels"] for line in lines} == {
        path: f"{name}.png" for path, name in names.items() if path in folder.whole
    }
    assert len(lines) == len(folder.whole)
    stems = [line["labels"].removesuffix(".png") for line in lines]
    files = {f"{stem}{ending}" for stem in stems for ending in (".png", ".overlay.jpg")}
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert found == files | {"predictions.jsonl", ".lock"}
    # The files are whole; a sample is what Python gives.
    tada = load_model(model, "cpu")
    for i, line in enumerate(lines):
        with Image.open(out / line["labels"]) as image:
            assert image.mode == "P" and image.size == folder.whole[line["path"]][::-1]
            labels = np.asarray(image)
        assert tuple(line["size"]) == labels.shape
        with Image.open(out / f"{line['labels'].removesuffix('.png')}.overlay.jpg") as image:
            image.load()
        if i % (len(lines) // 20) == 0:
            assert np.array_equal(labels, predict_image(tada, line["path"]).labels)
    return first, second


# ---- the tests


def test_a_mixed_folder_is_finished_after_a_kill(model, one_thread, tmp_path):
    folder = draw_folder(tmp_path / "photos", count=70, broken=10, large=1)
    check(folder, model, tmp_path, processes=1)


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_ten_thousand_images(model, one_thread, tmp_path, capsys):
    """Through two processes. Memory: the last third's median is at most 5 % and 20 MB above the first's."""
    folder = draw_folder(tmp_path / "photos", count=10_000, broken=100, large=20)
    watches = check(folder, model, tmp_path, processes=2)
    grown = [growth(memory) for watch in watches for memory in watch.longest(2)]
    with capsys.disabled():
        for name, watch in zip(("killed at half", "the rest"), watches, strict=True):
            print(
                f"\n{name}: {watch.seconds:.0f} s, {sum(watch.cpu.values()):.0f} CPU seconds; MB of memory:"
            )
            for memory in watch.longest(2):
                print("  {:.0f}, at the end {:.0f}, at most {:.0f}".format(*growth(memory), max(memory)))
    assert all(late <= 1.05 * early + 20 for early, late in grown)
