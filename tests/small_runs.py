"""Runs of six small steps, and how two of them are compared."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMES = ("images_per_second", "data_share", "memory_gib", "eta_seconds")  # may differ between two runs


def command(folder, run, *more):
    """The flags of a run of six small steps."""
    dataset = "panoptic" if (Path(folder) / "annotations").is_dir() else "folder"
    flags = f"--dataset {dataset} --data {folder} --run-dir {run} --model tiny --weights random --crop 64 "
    flags += "--short 96 --batch 4 --iterations 6 --save-every 2 --eval-every 3 --log-every 1 --workers 0 "
    return [*(flags + "--threads 1 --tags oracle --dropout 0.1").split(), *more]


def log_of(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(run, other):
    """Bit-equal models and optimisers, and equal logs."""
    for name in ("model.safetensors", "train.safetensors"):
        if (run / "last" / name).read_bytes() != (other / "last" / name).read_bytes():
            return False
    return log_of(run) == log_of(other)


def stops_after(steps, monkeypatch):
    """Let `train.main` end as by a second Ctrl-C after some steps; None: let it run."""
    import train

    done, step = [], train.train_step

    def dies(*args, **kwargs):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", dies)
