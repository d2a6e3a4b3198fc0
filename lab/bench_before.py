"""Compare whole commands with those of commit 82e1c58, from which the work on speed began.

    python -m lab.bench_before  # needs that commit in the checkout's history

Both read the same checkpoint, made by the older one, and the same files. CPU seconds of all threads (of
predict.py seconds by the clock), in turns, whole processes with threads that sleep while they wait; of
train.py the difference between a long and a short run, which is what a step takes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from PIL import Image

from errors import Parser, TadaError, run_command
from images import scenes

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
        evaluate = ["eval.py", model, "--split", "test", "--limit", str(images), *TINY]
        cases: dict[str, Callable[[Path, Path], float]] = {
            "train.py --help, CPU s": lambda side, out: run(side, "train.py", "--help")[0],
            "train.py, tiny, CPU s a step": step,
            f"eval.py, {images} drawn images, CPU s": lambda side, out: run(
                side, *evaluate, "--out", str(out)
            )[0],
            f"predict.py, {photos} photographs of 12 megapixels, s": lambda side, out: run(
                side, "predict.py", model, seen, "--out", str(out), *TINY
            )[1],
        }
        table = []
        for case, measure in cases.items():
            seconds: dict[Path, list[float]] = {ROOT: [], before: []}
            for i in range(rounds):
                for side in (ROOT, before)[:: -1 if i % 2 else 1]:
                    seconds[side].append(measure(side, home / f"{len(table)}-{i}-{side.name}"))
            ours, theirs = seconds.values()
            ratio = median(new / old for new, old in zip(ours, theirs, strict=True))
            table.append({"case": case, "now": median(ours), "before": median(theirs), "ratio": ratio})
            print(table[-1], flush=True)
        return table


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lab.bench_before",
        description="Measure the commands against those of an earlier commit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=500, help="drawn images that eval.py reads")
    parser.add_argument("--photos", type=int, default=200, help="photographs that predict.py reads")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    options = parser.parse_args(argv)

    def work() -> int:
        print("| case | now | before | ratio |\n|---|---|---|---|")
        for row in rows(options.images, options.photos, options.rounds):
            print(f"| {row['case']} | {row['now']:.2f} | {row['before']:.2f} | {row['ratio']:.2f} |")
        return 0

    return run_command("bench_before", work)


if __name__ == "__main__":
    sys.exit(main())
