"""What goes wrong around the commands, by kind: outputs that are closed or full, links and folders of others,
files that changed between two commands. Each ends in one sentence and code 2, or ends nothing.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command, log_of, same, stops_after

import eval as evaluation
import predict
import tag
import train
from assemble import build
from errors import DataWarning, TadaError
from metrics.report import FILES, move_earlier_results
from model import TadaConfig
from run.checkpoint import clean, save_model
from run.folder import Run
from run.predictions import Settings, read_list, to_do, write
from run.ranks import Ranks

ROOT = Path(__file__).parents[1]
HERE = Ranks(0, 1, torch.device("cpu"))
SLOW, SWEEP = pytest.mark.slow, pytest.mark.sweep
# Compare like with like: all runs here have --threads 1, and so have the processes that torchrun starts.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model of two classes, one with a name that is not ASCII."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = TadaConfig(("Straße", "sea"), model="tiny", crop=(64, 64), box=(64, 64), stride=(43, 43))
    save_model(build(config), file, {}, {})
    return str(file)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images of 64 x 64."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(np.full((64, 64, 3), ord(name), np.uint8)).save(folder / f"{name}.png")
    return folder


# ---- 1  killed at any moment

KILLER = """
import json, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch, train
torch.set_num_threads(1)

def start(number):
    child = os.fork()  # not a new process: the imports would take longer than the run
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(train.main({command!r} + ["--run", f"{{run}}/{{number}}"]))
    return child

run, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
began = time.monotonic()
assert os.waitpid(start(0), 0)[1] == 0
whole, number, found = time.monotonic() - began, 1, []
while len(found) < kills:
    child = start(number)
    time.sleep(chance.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        names = os.listdir(f"{{run}}/{{number}}") if os.path.isdir(f"{{run}}/{{number}}") else []
        saving = [x for x in names if x.startswith((".tmp-step", ".old-step", ".tmp-old"))]
        found.append((max([x for x in names if x.startswith("step-")], default="none"), bool(saving)))
    else:
        assert status == 0, status
        number += 1
assert os.waitpid(start(number), 0)[1] == 0
print(json.dumps({{"whole": whole, "runs": number, "killed": found}}))
"""


@pytest.mark.parametrize("kills", [pytest.param(8, marks=SLOW), pytest.param(50, marks=SWEEP)])
def test_killed_at_any_moment(folder, uninterrupted, tmp_path, kills):
    """SIGKILL at random moments, in a row until a run is complete: each ends as the one in one go."""
    seed, runs = random.randrange(2**32), tmp_path / "runs"
    script = KILLER.format(root=str(ROOT), command=command(folder, "replaced"))
    line = [sys.executable, "-c", script, str(runs), str(kills), str(seed)]
    ended = subprocess.run(line, check=False, capture_output=True, text=True)
    print(f"seed {seed}: {ended.stdout}")
    assert ended.returncode == 0, ended.stderr
    done = json.loads(ended.stdout)
    assert len(done["killed"]) == kills
    for number in range(done["runs"] + 1):
        assert same(runs / str(number), uninterrupted), number
        assert not [*(runs / str(number)).glob(".tmp*"), *(runs / str(number)).glob(".old*")]


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint(folder, uninterrupted, tmp_path, number):
    """Sent to the whole process group, loading workers too, as a terminal or a scheduler does."""
    run = tmp_path / "run"
    line = [sys.executable, "-u", str(ROOT / "train.py"), *command(folder, run, "--workers", "2")]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    signal.signal(signal.SIGHUP, before)
    output = ""
    for text in process.stdout:
        output += text
        if text.startswith("step 2/6"):
            os.killpg(process.pid, number)
            break
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "stopped at step" in output and "Traceback" not in output
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted)


@pytest.fixture
def damaged(folder, tmp_path, monkeypatch):
    """The images of `folder`, of which 3 breaks after the start has looked at them, as in a large set."""
    data = shutil.copytree(folder, tmp_path / "data")
    file = data / "images" / "train" / "3.png"
    file.write_bytes(file.read_bytes()[:500])
    monkeypatch.setattr(train, "check", partial(train.check, samples=1))
    return data


def test_unreadable_images_are_counted_across_resumptions(damaged, tmp_path, monkeypatch):
    """One of eight in each of three epochs, with a stop in between, is named and replaced each time."""
    run, more = tmp_path / "run", ["--eval-every", "6"]
    for stop in (5, None):
        with monkeypatch.context() as patch:
            stops_after(stop, patch)
            with pytest.warns(DataWarning, match=r"3\.png .*another image takes its place"):
                assert train.main(command(damaged, run, *more)) == (130 if stop else 0)
    assert [line["replaced"] for line in log_of(run) if "loss" in line][1::2] == [1, 2, 3]


def test_two_unreadable_images_of_eight_stop_training(damaged, tmp_path, capsys):
    """In the first epoch, before a checkpoint, with the rule in one sentence."""
    (damaged / "images" / "train" / "4.png").write_bytes(b"<!DOCTYPE html>")
    with pytest.warns(DataWarning, match=r"4\.png .*another image takes its place"):
        assert train.main(command(damaged, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"of the first [48] samples could not be read, more than one, or 1% of the images, an", error
    )
    assert not (tmp_path / "run" / "last").exists()


def test_two_processes_do_not_share_a_run(folder, tmp_path, capsys):
    first = Run(tmp_path / "run", HERE)
    first.claim()
    assert train.main(command(folder, tmp_path / "run")) == 2
    assert "another process" in capsys.readouterr().err


# ---- stdout and stderr closed, full, narrow


PRINTS = """
import sys, tqdm
from errors import TadaError, run_command

def work():
    for i in tqdm.tqdm(range(2000), disable=False):
        print("Straße", i)
    tqdm.tqdm.write("done")
    print("skipped", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
    if sys.argv[2:]:
        raise TadaError("one sentence")
    return 0

sys.exit(run_command("x", work))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize(
    "where", [">/dev/full", ">&-", "2>&-", "2>/dev/full", ">&- 2>&-", "| head -1", "2>&1 | head -1", "| cat"]
)
def test_no_output_ends_a_command(where, code, tmp_path):
    """The work is done, and the exit code is its own."""
    line = f"PYTHONIOENCODING=ascii {sys.executable} -c '{PRINTS}' {tmp_path}/done {'fail' * (code > 0)} "
    command = ["bash", "-c", f"{line} {where}; exit ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == code and (tmp_path / "done").read_text() == "done"
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    if where == "| cat":
        assert ended.stdout.startswith("Stra\\xdfe 0\n") and ended.stdout.endswith("done\n")


def test_a_closed_pipe_stops_no_image(model, photos, tmp_path, monkeypatch):
    """As `predict.py RUN DIR | head -1` leaves it."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert predict.main([model, str(photos), "--out", str(tmp_path / "out"), "--tags", "classes"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("?.png")) == ["a.png", "b.png", "c.png"]


# ---- links and folders of others


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of four images of 64 x 64, and two of validation."""
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            Image.fromarray(pixels[..., 0] // 128).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("sky\nsea\n")
    return root


def training(data: Path, run: Path, *more: str) -> int:
    flags = f"--dataset folder --data {data} --model tiny --weights random --crop 64 --short 64 --batch 2 "
    flags += "--iterations 1 --log-every 1 --workers 0 --threads 1 --tags clip --device cpu"
    return train.main([*flags.split(), "--run-dir", str(run), *more])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A complete run of one step."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert training(data, run) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_run_writes_through_no_link(data, tmp_path, capsys):
    """A link in the place of its file is replaced, of its folder refused by name."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert training(data, run, "--check") == 0
    (elsewhere / "val").mkdir(parents=True)
    files = ["log.jsonl", "inputs.jpg", "curve.png", "tags-train.jsonl", "tags-train.sha256"]
    for name in [name for file in ("config.json", *files) for name in (file, f".tmp-{file}")]:
        (elsewhere / name).write_bytes((run / name).read_bytes() if (run / name).exists() else b"mine")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(elsewhere / name)
    (run / "val").symlink_to(elsewhere / "val")
    before = content(elsewhere)
    assert training(data, run) == 0
    assert content(elsewhere) == before
    assert f"not drawn ([Errno 40] {run / 'val'} is a link, which is not followed" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir() if path.is_symlink()) == ["best", "last", "val"]
    (run / ".lock").unlink(), (run / ".lock").symlink_to(elsewhere / "new")
    assert training(data, run) == 2 and not (elsewhere / "new").exists()
    assert f"{run / '.lock'} is a link, which is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_folder_of_others_is_no_run(data, photos, flags, capsys):
    (photos / "config.json").write_text('{"options": 1}')
    for name in (".lock", ".tmp-1", ".old-1", "log.jsonl", "inputs.jpg"):
        (photos / name).write_text("mine")
    (photos / "step-1").mkdir()
    before = content(photos)
    assert training(data, photos, *flags) == 2
    assert f"{photos} holds a.png but no run: give a new or empty --run-dir" in capsys.readouterr().err
    assert content(photos) == before


def test_a_start_removes_what_runs_leave(tmp_path):
    ours = [".tmp-step-000002", ".old-step-000001", ".tmp-old-step-000003", ".tmp-best", ".tmp-config.json"]
    for name in (*ours, ".tmp-1", ".old-1", ".tmp-notes", ".lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "step-000001").mkdir()
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".lock", ".old-1", ".tmp-1", ".tmp-notes"]


def test_an_evaluation_takes_over_no_folder(trained, tmp_path, capsys):
    """Files with its names that it did not write stay; a link among its own is moved, not followed."""
    (tmp_path / "result.md").write_text("mine")
    assert evaluation.main([str(trained), "--workers", "0", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds result.md without a result.json of eval.py" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text('{"mIoU": 0.5, "sha256": ""}')
    for name in FILES[1:]:
        (out / name).symlink_to(tmp_path / "victim")
    assert move_earlier_results(out) == tmp_path / "out.1" and not [*out.iterdir()]
    for name in (".tmp-result.json", ".tmp-confusion.csv", ".tmp-confusion.png", ".tmp-panoptic"):
        (out / name).symlink_to(tmp_path / "victim")
    assert evaluation.main([str(trained), "--workers", "0", "--out", str(out)]) == 0
    assert not (tmp_path / "victim").exists() and not [path for path in out.iterdir() if path.is_symlink()]


def test_predictions_go_through_no_link(model, photos, tmp_path, capsys):
    out, victim = tmp_path / "out", tmp_path / "victim"
    (photos / "sub").mkdir(), (photos / "a.png").rename(photos / "sub" / "a.png")
    command = [model, str(photos), "--out", str(out), "--tags", "classes"]
    out.mkdir()
    for name in ("sub", ".lock"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(tmp_path / "nowhere")
        assert predict.main(command) == 2
        assert f"{out / name} is a link, which is not followed" in capsys.readouterr().err
        (out / name).unlink()
    (out / ".tmp-3").write_text("mine")
    for name in (".predictions.jsonl.tmp-0", ".tmp-predictions.jsonl", "predictions.jsonl", "b.png"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    assert predict.main(command) == 0
    assert not victim.exists() and (out / ".tmp-3").read_text() == "mine"
    assert len(read_list(out)) == 3 and (out / "sub" / "a.png").is_file()


# ---- what changed between two commands


def test_tags_that_changed_are_refused(data, run, capsys):
    """By the run that was trained with them; a start without a checkpoint makes them anew."""
    file = run / "tags-train.jsonl"
    whole = file.read_bytes()
    for changed in (whole[: len(whole) // 2], whole[:20], whole.replace(b"sea", b"sky", 1), b""):
        file.write_bytes(changed)
        assert training(data, run) == 2
        assert f"{file} changed after it was written: restore it, or" in capsys.readouterr().err
    for name in ("last", "best", "step-000001"):
        (run / name).unlink() if (run / name).is_symlink() else shutil.rmtree(run / name)
    assert training(data, run, "--check") == 0
    assert file.read_bytes() == whole


def test_a_line_of_tags_is_checked(data, run, capsys):
    """Also of a run before there was a hash."""
    (run / "tags-train.sha256").unlink(missing_ok=True)
    entry, *others = (run / "tags-train.jsonl").read_text().splitlines()
    (run / "tags-train.jsonl").write_text(
        "\n".join([json.dumps(json.loads(entry) | {"tags": [["sea"]]}), *others])
    )
    assert training(data, run) == 2
    assert "tags-train.jsonl, line 1, is not of a tagger" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["options", "versions", "read", "data"])
def test_settings_that_changed_are_one_sentence(data, run, key, capsys):
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 5}))
    code = evaluation.main([str(run), "--workers", "0"]) if key == "data" else training(data, run)
    assert code == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


def test_a_damaged_line_of_the_log_is_named(data, run, capsys):
    log = run / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b'{"step": 0, "caf\xe9": 1}\n' + whole)
    assert training(data, run) == 0
    assert f"{log}, line 1, is left out" in capsys.readouterr().out and log.read_bytes() == whole


def test_a_changed_line_of_predictions_is_not_used(tmp_path):
    """Each mutation is one sentence, or the image is predicted again."""
    image, settings = tmp_path / "a.png", Settings("00", {}, [1.0], False, False, {})
    Image.new("RGB", (8, 8)).save(image)
    record = {"path": str(image), "labels": "a.png"} | settings.of(str(image), ["sea"])
    record |= {"size": [8, 8], "tags": ["sea"], "shares": {"sea": 0.75, "sky": 0.25}}
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "a", record, {".overlay.jpg": b"", ".png": b""}, rank=0)
    file, how = tmp_path / "out" / "predictions.jsonl", ({str(image): "a"}, {str(image): ["sea"]})
    whole, chance = file.read_bytes(), random.Random(0)
    assert to_do(*how, tmp_path / "out", settings) == []
    used = []
    for _ in range(200):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole) - 1)] = chance.choice(b'0123456789ae.-"{}[],:\xe9')
        file.write_bytes(changed)
        try:
            if to_do(*how, tmp_path / "out", settings) == []:
                used.append(json.loads(changed))
        except TadaError as error:
            assert "predictions.jsonl" in str(error)
    assert all(line == json.loads(whole) for line in used)
    file.write_text(json.dumps(json.loads(whole) | {"labels": 5}) + "\n")
    with pytest.raises(TadaError, match="line 1, is not of predict.py"):
        read_list(tmp_path / "out")


# ---- names


def test_a_run_folder_whose_name_is_not_utf8(data, run, tmp_path, capsys):
    """Refused before training; a run that was moved into one is named."""
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    assert training(data, latin) == 2 and not latin.exists()
    assert "is not UTF-8, which checkpoints need: give another --run-dir" in capsys.readouterr().err
    run.rename(latin)
    assert evaluation.main([str(latin), "--workers", "0"]) == 2
    assert "is not UTF-8: rename what is not" in capsys.readouterr().err


def test_a_name_that_is_too_long_for_results_stops_no_folder(model, photos, tmp_path, capsys):
    long = "x" * 246 + ".png"
    shutil.copy(photos / "a.png", photos / long)
    out, tags = tmp_path / "out", tmp_path / "tags.jsonl"
    assert predict.main([model, str(photos), "--out", str(out), "--tags", "classes"]) == 1
    said = capsys.readouterr()
    assert f"skipped: {long[:-4]} is too long" in said.err and "3 predicted, 0 skipped, 1 unread" in said.out
    assert sorted(path.name for path in out.glob("?.png")) == ["a.png", "b.png", "c.png"]
    flags = "--by clip --names sea,sky --model tiny --weights random --workers 0 --device cpu"
    assert tag.main([str(photos), *flags.split(), "--out", str(tags)]) == 0
    assert len(tags.read_text().splitlines()) == 4
