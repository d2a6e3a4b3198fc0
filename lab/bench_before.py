"""Compare whole commands with those of commit 82e1c58, from which the work on speed began.

    python -m lab.bench_before  # needs that commit in the checkout's history

Both read the same checkpoint, made by the older one, and the same files. CPU seconds of all threads (of
predict.py seconds by the clock), in turns, whole processes with threads that sleep while they wait; of
train.py the difference between a long and a short run, which is what a step takes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from PIL import Image

from errors import TadaError, run_command
from images import scenes
from lab.bench_peers import in_turns, ratio, table

ROOT, BEFORE = Path(__file__).parents[1], "82e1c58"
SHORT, LONG = 4, 44  # steps of train.py
PHOTO = 4000, 3000  # pixels
TINY = ["--weights", str(ROOT / "weights/tiny")]


def check_out(folder: Path) -> Path:
    """The older commit in a new folder."""
    folder.mkdir()
    script = f"set -o pipefail; git -C '{ROOT}' archive {BEFORE} | tar -x"
    if subprocess.run(["bash", "-c", script], cwd=folder, check=False, capture_output=True).returncode:
        raise TadaError(f"the history of this checkout lacks commit {BEFORE}: fetch all of it")
    return folder


def run(folder: Path, *command: str) -> tuple[float, float]:
    """CPU seconds of a command of the checkout in `folder` with its processes, and seconds by the clock."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    before, start = os.times(), time.perf_counter()
    line = [sys.executable, *command]
    subprocess.run(line, cwd=folder, env=environment, check=True, capture_output=True)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return spent, time.perf_counter() - start


def step(folder: Path, out: Path) -> float:
    """CPU seconds of a training step."""
    spent = []
    for steps in (SHORT, LONG):
        command = f"train.py --run {out}/{steps} --iterations {steps} --lr 1e-3 --batch 8".split()
        spent.append(run(folder, *command, "--eval-every", "999", "--save-every", "999", *TINY)[0])
    return (spent[1] - spent[0]) / (LONG - SHORT)


def photographs(folder: Path, count: int) -> Path:
    """Enlarged scenes as JPEGs of 12 megapixels."""
    folder.mkdir()
    for i in range(count):
        image = Image.fromarray(scenes.draw(i % 4).image).resize(PHOTO, Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03}.jpg", quality=90)
    return folder


def rows(images: int, photos: int, rounds: int) -> list[dict]:
    """Measure every command `rounds` times on each side: medians, and the median of the ratios."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        before, model = check_out(home / "before"), str(home / "model")
        run(before, "train.py", "--run", model, "--iterations", "20", *TINY)
        seen = str(photographs(home / "photos", photos))
        evaluate = ["eval.py", model, "--split", "test", "--limit", str(images), *TINY, "--out"]
        predict = ["predict.py", model, seen, *TINY, "--out"]
        cases: dict[str, Callable[[Path, Path], float]] = {
            "train.py --help, CPU s": lambda side, out: run(side, "train.py", "--help")[0],
            "train.py, tiny, CPU s a step": step,
            f"eval.py, {images} drawn images, CPU s": lambda side, out: run(side, *evaluate, str(out))[0],
            f"predict.py, {photos} photographs of 12 megapixels, s": lambda side, out: run(
                side, *predict, str(out)
            )[1],
        }
        found, new = [], partial(tempfile.mkdtemp, dir=home)
        for case, measure in cases.items():
            sides = (lambda _, x=x, of=measure: of(x, Path(new(), "out")) for x in (ROOT, before))
            now, then = in_turns(rounds, *sides)
            row = {"case": case, "now": median(now), "before": median(then), "ratio": ratio(now, then)}
            print(row, flush=True)
            found.append(row)
        return found


if __name__ == "__main__":
    sys.exit(run_command("bench_before", lambda: print(table(rows(images=500, photos=200, rounds=3)))))
