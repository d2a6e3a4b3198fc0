"""What goes wrong around a run: each of 30 faults is injected into a whole run here, or beside its component
by the tests that are named below its title. Each ends in one sentence and code 2, or ends nothing.
"""

import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import command, log_of, same, stops_after

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
from run.predictions import read_list
from run.ranks import TIMEOUT, Ranks

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
        os._exit(train.main({command!r} + ["--run-dir", f"{{run}}/{{number}}"]))
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


# ---- 2  killed inside a save
# test_run_checkpoint.py: test_a_crash_at_any_moment_leaves_intact_steps
# test_run_checkpoint.py: test_a_crash_while_a_step_is_written_again
# test_run_checkpoint.py: test_a_crash_while_a_refused_step_is_written_again
# test_run_checkpoint.py: test_files_are_synced_before_the_rename
# test_train.py: test_the_same_command_resumes_exactly, test_the_last_step_is_validated_on_resuming


def test_a_start_removes_what_runs_leave(tmp_path):
    ours = [".tmp-step-000002", ".old-step-000001", ".tmp-old-step-000003", ".tmp-best", ".tmp-config.json"]
    for name in (*ours, ".tmp-1", ".old-1", ".tmp-notes", ".lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "step-000001").mkdir()
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".lock", ".old-1", ".tmp-1", ".tmp-notes"]


# ---- 3  stopped by a scheduler or a closed terminal
# test_loading_stream.py: test_workers_ignore_the_signals_that_stop_the_main_process


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


def torchrun(run, *more, script=ROOT / "train.py"):
    """The command of a run of two processes without dropout, which one process would draw otherwise."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *more]
    return [*line, str(script), *command(run.parent / "folder", run, "--dropout", "0", "--device", "cpu")]


def reached(line, start):
    """A process in a group of its own, and what it printed up to a line that starts so."""
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output = ""
    for text in process.stdout:
        output += text
        if text.startswith(start):
            return process, output
    raise AssertionError(output)


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """The folder of a run of two processes in one go, and of one that SIGTERM stopped after step 2."""
    root = tmp_path_factory.mktemp("pair")
    (root / "folder").symlink_to(folder)
    subprocess.run(torchrun(root / "whole"), cwd=ROOT, check=True, capture_output=True, timeout=300)
    process, output = reached(torchrun(root / "stopped"), "step 2/6")
    process.terminate()
    output += process.communicate(timeout=60)[0]
    (root / "output").write_text(output)
    assert process.returncode, output
    return root


@SLOW
def test_two_processes_stop_together(pair):
    """torchrun hands the signal on: one sentence, one checkpoint. Row 5 continues from it."""
    output = (pair / "output").read_text()
    step = int(os.readlink(pair / "stopped" / "last").removeprefix("step-"))
    assert output.count(f"stopped at step {step}; the same command resumes from there") == 1 and 2 <= step < 6
    assert log_of(pair / "stopped")[-1]["step"] == step and "train.py: " not in output


# ---- 4  Ctrl-C, and again
# test_commands.py: test_ctrl_c_during_the_imports_ends_quietly


def test_a_second_ctrl_c_leaves_at_once(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    """The first one leaves a checkpoint of its step, the second loses the steps since the last."""
    run, step = tmp_path / "run", train.train_step
    for presses, last in ((1, "step-000002"), (2, "step-000002")):
        left = [presses]

        def pressed(*args, left=left, **kwargs):
            for _ in range(left.pop() if left else 0):
                signal.raise_signal(signal.SIGINT)
            return step(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", pressed)
        assert train.main(command(folder, run)) == 130
        assert os.readlink(run / "last") == last
        said = capsys.readouterr()
        assert ("stopped at step 2; the same command" in said.out) == (presses == 1)
        assert said.err == "interrupted: what is written is kept, the same command resumes from it\n" * (
            presses == 2
        )
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted)


# ---- 5  one of the processes dies
# test_train.py: test_the_same_command_resumes_exactly


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SWEEP)])
def test_a_run_whose_process_was_killed_is_finished(pair, tmp_path, restarts):
    """The other process ends, too, and the same command resumes. torchrun's own restart is such a resumption,
    but torch 2.13 hangs in every second one where gloo connects the processes, before our code.
    """
    run = tmp_path / "run"
    shutil.copytree(pair / "stopped", run, symlinks=True)
    (tmp_path / "folder").symlink_to(pair / "folder")
    process, output = reached(torchrun(run, f"--max-restarts={restarts}"), "step ")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [x for x in children if b"\0RANK=1\0" in Path(f"/proc/{x}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    try:
        output += process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        assert restarts, "the other process hangs"
        process.terminate()
        output += process.communicate(timeout=60)[0]
    assert "train.py: " not in output, "an error of ours"
    print(f"{restarts} restarts: torchrun ended with {process.returncode}")
    if restarts == 0 or process.returncode:
        assert process.returncode and output.count("resuming from step") == 1
        subprocess.run(torchrun(run), cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert same(run, pair / "whole")


# ---- 6  an error on one process alone
# test_train.py: test_a_loss_that_is_not_finite_on_one_rank_stops_all
# test_eval.py: test_a_process_whose_own_files_fail_prints_its_error


@pytest.mark.parametrize("rank", ["0", "1"])
def test_unreadable_images_of_other_processes_count(folder, tmp_path, capsys, monkeypatch, rank):
    """All processes reach the limit at the same step, and process 0 says so."""
    reduce = Ranks.all_reduce

    class OneOfTwo(Ranks):
        def all_reduce(self, x):
            """The last number of a step's losses and counts is that of replaced images."""
            x = reduce(self, x)
            return x + 2 * (torch.arange(len(x)) == len(x) - 1) if x.dtype == torch.float64 else x

    monkeypatch.setattr(train, "init_distributed", lambda device: OneOfTwo(0, 1, torch.device("cpu")))
    monkeypatch.setenv("RANK", rank)
    assert train.main(command(folder, tmp_path / "run")) == 2
    assert ("2 of the first 4 samples could not be read" in capsys.readouterr().err) == (rank == "0")


WRONG = """
import sys
sys.path[:0] = [{root!r}]
from functools import partial
import train
train.check = partial(train.check, samples=1)
sys.exit(train.main(sys.argv[1:]))
"""


@SWEEP
def test_a_wrong_label_on_one_process_ends_the_other(folder, tmp_path):
    """Its sentence is printed by the process that has it; no hang in a collective."""
    shutil.copytree(folder, tmp_path / "folder")
    file = tmp_path / "folder" / "labels" / "train" / "3.png"
    Image.fromarray(np.full_like(np.array(Image.open(file)), 99)).save(file)
    script = tmp_path / "worker.py"
    script.write_text(WRONG.format(root=str(ROOT)))
    line = torchrun(tmp_path / "run", script=script)
    ended = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert re.search(
        r"^train.py: \S+3\.png holds the value 99: labels here are 0\.\.23", ended.stderr, re.MULTILINE
    )


# ---- 7  a full disk at a checkpoint
# test_run_checkpoint.py: test_a_full_disk_leaves_earlier_steps
# test_run_checkpoint.py: test_a_full_disk_while_a_step_is_written_again
# test_run_folder.py: test_a_full_disk_stops_no_run
# test_train.py: test_the_best_step_is_one_that_was_saved


def test_a_full_disk_ends_a_run_only_at_its_last_step(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    """By the system's own limit on the size of files, at steps 4 and 6 of six."""
    run, write_step, limit = tmp_path / "run", train.checkpoint.write_step, resource.RLIMIT_FSIZE
    before = resource.getrlimit(limit)

    def full(folder, step, **named):
        resource.setrlimit(limit, (100_000, before[1]) if step in (4, 6) else before)
        try:
            return write_step(folder, step, **named)
        finally:
            resource.setrlimit(limit, before)

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint, "write_step", full)
        assert train.main(command(folder, run)) == 2
    said = capsys.readouterr()
    assert f"no checkpoint at step 4: {run / 'step-000004'} could not be written (" in said.out
    assert re.fullmatch(
        rf"train.py: {run / 'step-000006'} could not be written \(.+\): free space.*\n", said.err
    )
    assert os.readlink(run / "last") == "step-000003" and not [*run.glob(".tmp*")]
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted)


# ---- 8  an output folder that cannot be written
# test_eval.py: test_bad_input_is_one_sentence
# test_predict.py: test_errors_are_one_sentence_and_exit_2


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model(
    data, tmp_path, monkeypatch, capsys, place
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(train, "build", None)
    assert training(data, tmp_path / place) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / place) in error and "give a" in error
    assert (tmp_path / "file").read_text() == "mine"


# ---- 9  an image that cannot be read
# test_loading_stream.py: test_an_unreadable_image_is_replaced_by_the_next
# test_loading_stream.py: test_one_image_or_one_percent_an_epoch_may_be_unreadable
# test_loading_stream.py: test_wrong_labels_and_evaluation_files_are_named_in_one_sentence
# test_predict.py: test_an_unreadable_image_is_listed_and_the_rest_continues


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


# ---- 10  a file without its counterpart, or of another size
# test_loading_check.py: test_check_names_every_kind_of_fault, test_check_lists_at_most_ten
# test_data_panoptic.py: test_missing_files_are_told_by_name, test_files_that_do_not_fit


# ---- 11  labels of another mode
# test_data.py: test_label_modes, test_labels_in_colours
# test_images_read.py: test_samples_of_few_bits_are_class_numbers


# ---- 12  a label that is no class
# test_data.py: test_label_values_out_of_range
# test_train.py: test_a_label_out_of_range_is_named_before_training


# ---- 13  nothing but ignored pixels, no segment
# test_decoders.py: test_an_ignored_batch_has_zero_gradients
# test_adapter.py: test_multi_hot_of_ignored_crops
# test_mask2former.py: test_images_without_segments
# test_loading_jitter.py: test_no_segment_at_all
# test_eval.py: test_an_image_without_any_label
# test_metrics_judge.py: test_an_image_without_predicted_segments_is_counted


# ---- 14  no image, one, fewer than a batch
# test_data.py: test_the_wrong_root_is_refused
# test_loading_stream.py: test_one_image_fills_a_batch, test_a_batch_that_does_not_divide_is_refused
# test_loading_stream.py: test_all_ranks_together_load_each_global_batch_once


# ---- 15  images of every size and kind
# test_loading_augment.py: test_any_size_gives_a_crop_and_an_evaluation_image
# test_inference.py: test_any_size
# test_data.py: test_every_kind_of_image_becomes_rgb, test_images_stand_upright
# test_predict.py: test_any_image, test_a_rotated_image_is_read_upright


# ---- 16  a huge image in a small file
# test_data.py: test_huge_images_are_refused_unread
# test_images_read.py: test_a_small_file_of_many_pixels_is_refused_by_every_reader
# test_predict.py: test_a_large_photograph


# ---- 17  a loss that is not finite
# test_train.py: test_a_loss_or_gradient_that_is_not_finite_changes_nothing


def test_no_checkpoint_holds_what_is_not_finite(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    """One sentence with the step's images; the last checkpoint is the one before, and resumes."""
    run, step, done = tmp_path / "run", train.train_step, []

    def poisoned(model, tada, *rest, **named):
        done.append(1)
        if len(done) == 4:
            tada.decoder.classifier[-1].bias.data[0] = np.nan
        return step(model, tada, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poisoned)
        assert train.main(command(folder, run)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"train.py: not finite: .*, in (images/train/\d\.png(, |:)){4}.*--fresh\n", error)
    assert os.readlink(run / "last") == "step-000003"
    tensors = [x for file in run.rglob("*.safetensors") for x in load_file(file).values()]
    assert tensors and all(x.isfinite().all() for x in tensors)
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted)


# ---- 18  costs that are not finite in the matching
# test_mask2former.py: test_costs_that_are_not_finite_make_the_loss_nan
# test_train.py: test_a_loss_that_is_not_finite_on_one_rank_stops_all


# ---- 19  a checkpoint that is damaged, of others, or newer
# test_run_checkpoint.py: test_foreign_files_are_refused, test_truncated_files_are_refused
# test_run_checkpoint.py: test_files_of_other_versions_are_refused, test_a_flipped_byte_is_detected
# test_run_checkpoint.py: test_incomplete_steps_are_skipped, test_settings_that_lack
# test_train.py: test_a_run_without_an_intact_checkpoint_is_not_overwritten
# test_train.py: test_a_model_that_changed_on_the_disk_is_refused


def test_a_damaged_checkpoint_is_skipped(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    """One bit of the newest step: the run resumes from the one before, and ends the same."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stops_after(5, patch)
        assert train.main(command(folder, run)) == 130
    damaged = run / "step-000004" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert train.main(command(folder, run)) == 0
    output = capsys.readouterr().out
    assert "step-000004 is skipped: model.safetensors changed after it was written" in output
    assert "resuming from step 3 in" in output
    assert same(run, uninterrupted)


# ---- 20  other settings, tags or data at a resumption
# test_train.py: test_a_run_does_not_resume_with_other_settings, test_a_run_does_not_resume_with_other_data
# test_train.py: test_a_run_without_its_config_is_named
# test_run_folder.py: test_only_free_settings_may_change
# test_run_folder.py: test_other_data_is_refused_and_another_time_is_printed


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
@pytest.mark.parametrize("value", ["5", "[" * 100_000])
def test_settings_that_changed_are_one_sentence(data, run, key, value, capsys):
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "?"}).replace('"?"', value))
    code = evaluation.main([str(run), "--workers", "0"]) if key == "data" else training(data, run)
    assert code == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


# ---- 21  a file that would run code
# test_weights_load.py: test_a_pickle_is_never_executed
# test_run_checkpoint.py: test_foreign_files_are_refused
# test_weights_fetch.py: test_ram_is_fetched_and_kept_as_one_safetensors_file


# ---- 22  hostile weights
# test_weights_load.py: test_what_is_not_weights_is_named, test_a_truncated_file_is_named
# test_weights_load.py: test_an_inconsistent_header_is_refused, test_a_nested_header_is_refused
# test_weights_load.py: test_a_header_has_a_largest_size, test_the_same_tensor_twice
# test_weights_load.py: test_numbers_that_are_not_finite_are_named


# ---- 23  a download that is cut, wrong, absent or refused
# test_weights_fetch.py: test_cut_connection_resumes_in_the_same_run, test_reset_connection_is_one_sentence
# test_weights_fetch.py: test_wrong_bytes_of_the_right_size_are_removed_and_both_hashes_named
# test_weights_fetch.py: test_missing_file_on_the_hub_is_one_sentence, test_refused_port_is_one_sentence
# test_weights_fetch.py: test_leftovers_of_a_killed_run_are_removed_by_the_next


# ---- 24  hostile files of tags
# test_loading_tags.py: test_a_wrong_line_is_refused_with_its_number, test_tags_and_captions_are_read
# test_loading_tags.py: test_a_line_of_a_megabyte, test_unknown_images_are_counted_and_named
# test_clip.py: test_truncation_warns, test_ids_of_hard_texts


# ---- 25  names
# test_loading_stream.py: test_a_process_in_any_locale_ends_with_its_workers
# test_data.py: test_folders_may_have_folders_and_any_name
# test_images_read.py: test_names_of_any_bytes_and_length_are_found_and_read


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


COMMANDS = """
import sys
sys.path.insert(0, {root!r})
import eval, predict, train
assert train.main({flags!r} + ["--run-dir", {run!r}]) == 0
assert eval.main([{run!r}, "--workers", "0", "--out", {run!r} + "/eval"]) == 0
assert predict.main([{run!r}, {data!r} + "/images/val", "--out", {run!r} + "/predicted"]) == 0
"""


@SWEEP
def test_commands_work_in_any_folder_and_locale(data, tmp_path):
    """Letters, blanks, 200 of them, by a link, in the locale C."""
    home = tmp_path / "größe und 名前" / ("x" * 200)
    home.mkdir(parents=True)
    (tmp_path / "a link").symlink_to(home)
    shutil.copytree(data, home / "data set")
    place = tmp_path / "a link"
    names = {"root": str(ROOT), "run": str(place / "a run"), "data": str(place / "data set")}
    flags = "--dataset folder --model tiny --weights random --crop 64 --short 64 --batch 2 --iterations 1 "
    flags += "--workers 1 --threads 1 --tags clip --device cpu --data"
    line = [sys.executable, "-c", COMMANDS.format(**names, flags=[*flags.split(), names["data"]])]
    env = {**os.environ, "LC_ALL": "C", "LANG": "C"}
    ended = subprocess.run(line, check=False, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (home / "a run" / "eval" / "result.json").is_file()
    assert sorted(path.name for path in (home / "a run" / "predicted").glob("?.png")) == ["0.png", "1.png"]


# ---- 26  other processes, micro-batches or workers at a resumption
# test_loading_stream.py: test_ranks_micro_batches_workers_and_resumption_change_no_sample
# test_loading_jitter.py: test_ranks_micro_batches_workers_and_resumption_change_no_sample
# test_train.py: test_two_processes_and_two_micro_batches_make_the_step_of_one
# test_train.py: test_what_a_resumed_run_does_not_keep_is_printed


@SWEEP
def test_a_run_goes_on_with_other_processes(pair, tmp_path, monkeypatch):
    """From two to one with two micro-batches and workers, and from one to two: the same losses."""
    (tmp_path / "folder").symlink_to(pair / "folder")
    flags = ["--dropout", "0", "--accumulate", "2", "--workers", "2"]
    shutil.copytree(pair / "stopped", tmp_path / "one", symlinks=True)
    assert train.main(command(tmp_path / "folder", tmp_path / "one", *flags)) == 0
    with monkeypatch.context() as patch:
        stops_after(3, patch)
        assert train.main(command(tmp_path / "folder", tmp_path / "two", *flags)) == 130
    line = torchrun(tmp_path / "two")
    ended = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert "resuming from step 3 in" in ended.stdout
    assert ended.stdout.count("it has no random states of more ranks or of a GPU: these are new") == 1
    losses = [[x["loss"] for x in log_of(run) if "loss" in x] for run in (tmp_path / "one", tmp_path / "two")]
    expected = [x["loss"] for x in log_of(pair / "whole") if "loss" in x]
    assert len(expected) == 6 and losses == [pytest.approx(expected, rel=1e-4)] * 2


# ---- 27  two commands on one folder
# test_run_folder.py: test_a_worker_that_outlives_its_run_does_not_lock_it
# test_eval.py: test_a_folder_in_use_is_refused
# test_predict.py: test_a_folder_in_use_is_refused


def test_two_processes_do_not_share_a_run(folder, tmp_path, capsys):
    first = Run(tmp_path / "run", HERE)
    first.claim()
    assert train.main(command(folder, tmp_path / "run")) == 2
    assert "another process" in capsys.readouterr().err


# ---- 28  outputs that are closed, full, narrow or deleted
# test_eval.py: test_a_closed_or_full_stdout_loses_nothing
# test_train.py: test_validation_shows_a_bar_on_a_terminal


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


def test_a_log_that_is_deleted_is_begun_anew(folder, tmp_path, monkeypatch):
    """By another process, between two steps."""
    run, step, done = tmp_path / "run", train.train_step, []

    def deletes(*args, **kwargs):
        done.append(1)
        if len(done) == 3:
            (run / "log.jsonl").unlink()
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", deletes)
    assert (
        train.main(command(folder, run, "--iterations", "4", "--eval-every", "4", "--save-every", "4")) == 0
    )
    assert [line["step"] for line in log_of(run)] == [3, 4, 4]


# ---- 29  a clock that jumps, a slow disk


def test_neither_changes_what_a_step_took(folder, tmp_path, monkeypatch):
    """Only a clock that never jumps is asked; each reading takes a second here, each save a thousand."""
    now, write_step = [0], train.checkpoint.write_step

    def perf_counter():
        now[0] += 1
        return now[0]

    def slow(*args, **kwargs):
        now[0] += 1000
        return write_step(*args, **kwargs)

    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(train.checkpoint, "write_step", slow)
    flags = ["--iterations", "3", "--save-every", "1", "--eval-every", "3"]
    assert train.main(command(folder, tmp_path / "run", *flags)) == 0
    log = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    steps = [line for line in log if "loss" in line]
    assert [line["eta_seconds"] for line in steps] == [4, 2, 0]  # two seconds a step
    assert {line["images_per_second"] for line in steps} == {2} and {
        line["data_share"] for line in steps
    } == {0.5}
    assert TIMEOUT.total_seconds() > 1800  # no collective gives up while another process saves


# ---- 30  predictions of one name
# test_predict.py: test_folders_and_globs_are_mirrored, test_no_two_images_share_a_name
# test_predict.py: test_what_another_run_or_program_wrote_stays


# ---- beyond the table: links and folders of others


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


# ---- beyond the table: what changed between two commands


@pytest.mark.parametrize("damage", [b'{"step": 0, "caf\xe9": 1}', b'{"step": ' + b"[" * 100_000])
def test_a_damaged_line_of_the_log_is_named(data, run, damage, capsys):
    log = run / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(damage + b"\n" + whole)
    assert training(data, run) == 0
    assert f"{log}, line 1, is left out" in capsys.readouterr().out and log.read_bytes() == whole


def test_a_line_of_predictions_with_another_type_is_refused(tmp_path):
    """Other changes: tests/test_fuzz.py."""
    (tmp_path / "predictions.jsonl").write_text('{"path": "a.png", "labels": 5}\n')
    with pytest.raises(TadaError, match="line 1, is not of predict.py"):
        read_list(tmp_path)


# ---- the table


def test_every_row_has_a_test():
    """In this file or, as a comment says, in another one."""
    _, *sections = re.split(r"^# ---- (?=\d)", Path(__file__).read_text(), flags=re.MULTILINE)
    assert [int(section.split()[0]) for section in sections] == [*range(1, 31)]
    for section in sections:
        named = re.findall(r"^# (test_\w+\.py): (.+)$", section, re.MULTILINE)
        assert named or re.search(r"^def test_", section, re.MULTILINE), (
            f"no test of {section.splitlines()[0]}"
        )
        for file, names in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            tests = {
                x.name for x in tree.body if isinstance(x, ast.FunctionDef) and x.name.startswith("test_")
            }
            assert {*names.split(", ")} <= tests, f"{file} lacks a test of {section.splitlines()[0]}"
