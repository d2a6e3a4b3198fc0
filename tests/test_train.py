"""Training: the learning rate, one step however it is divided, runs that resume exactly wherever they
stop.
"""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from safetensors.torch import load_file
from small_runs import command, log_of, same, stops_after

import train
from assemble import build, parameter_groups
from data import open_dataset
from errors import DataError, RunError
from images import scenes
from loading.augment import Augment
from loading.jitter import Jitter
from loading.stream import TrainStream
from loading.tags import TagSource
from model import TadaConfig
from run.checkpoint import read_model
from run.folder import Run
from run.masters import Masters
from run.options import parse
from run.ranks import Ranks

ROOT = Path(train.__file__).parent
HERE = Ranks(0, 1, torch.device("cpu"))


# Compare like with like: all runs here have --threads 1, and so have the processes that torchrun starts.
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the recipe


def test_learning_rate_is_mmsegmentations():
    """mmcv's poly policy with its linear warm-up, written out (lr_updater.py)."""
    base, top, warm, ratio = 6e-5, 80_000, 1500, 1e-6
    for step in (0, 1, 700, 1499, 1500, 1501, 40_000, 79_999):
        regular = base * (1 - step / top) ** 1.0
        k = (1 - step / warm) * (1 - ratio) if step < warm else 0.0
        assert base * train.learning_rate(step, top, warm) == pytest.approx(regular * (1 - k), rel=1e-9)
    assert train.learning_rate(0, 10, 0) == 1


def test_the_rate_of_a_panoptic_run_drops_in_steps():
    """ODISE: to a tenth at 8/9 and again at 26/27 of the run, after the warm-up."""
    share = [train.learning_rate(i, 2700, 100, train.DROPS) for i in range(2700)]
    assert share[0] == 1e-6 and share[100:2400] == [1] * 2300
    assert share[2400:] == pytest.approx([0.1] * 200 + [0.01] * 100)


def test_no_norm_and_no_embedding_decays(segments):
    o = parse(["--dataset", "panoptic", "--data", str(segments), "--model", "tiny", "--weights", "random"])
    tada = build(train.config_of(o, open_dataset("panoptic", segments, "train")))
    groups = parameter_groups(tada, 1.0, weight_decay=0.5, unet_scale=0.1)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    still = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {"decoder.query_features", "decoder.query_places", "decoder.level_embed"} <= still
    assert {"decoder.pixel_decoder.level_embed", "decoder.norm.weight", "decoder.class_head.bias"} <= still
    assert {"decoder.class_head.weight", "decoder.layers.0.self_attention.q.weight"} <= decayed
    trained = {name for name, p in tada.named_parameters() if p.requires_grad}
    assert decayed | still == trained and not decayed & still
    assert tada.config.things == tuple(name in scenes.THINGS for name in scenes.CLASSES)


# ---- one step, however it is divided


def one_step(folder, ranks=HERE, accumulate=1, steps=1, lr=None, decoder="fpn", half=False):
    """The parameters' gradient of the first step, or with `lr` the losses of some AdamW steps."""
    torch.manual_seed(0)
    panoptic = decoder == "mask2former"
    dataset = open_dataset("panoptic" if panoptic else "folder", folder, "train")
    things = tuple(dataset.categories.things.tolist()) if panoptic else ()
    options = {"model": "tiny", "tags": "oracle", "dropout": 0.0, "decoder": decoder, "things": things}
    tada = build(TadaConfig(tuple(dataset.classes), **options))
    words = TagSource("oracle", dataset.prompts)
    trained = [p for p in tada.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    masters = Masters(tada) if half else None
    model = ranks.data_parallel(masters or tada, accumulate, half)
    # A step of plain descent by 2^14 shows the gradient: the parameter it starts from is lost in rounding.
    kind = torch.optim.AdamW if lr else torch.optim.SGD
    optimizer = kind(trained, lr or 2.0**14, fused=True)
    shares = {"rank": ranks.rank, "world": ranks.world, "accumulate": accumulate}
    augmentation = Jitter((64, 64), (0.5, 2.0)) if panoptic else Augment((64, 64), 96, 384)
    batches = TrainStream(dataset, augmentation, batch=4, seed=0, **shares).batches()
    losses = []
    for _ in range(steps):
        step = [next(batches) for _ in range(accumulate)]
        losses.append(train.train_step(model, tada, optimizer, step, words, ranks, masters=masters)["loss"])
    gradient = torch.cat([(b - p.detach()).flatten() / 2**14 for b, p in zip(before, trained, strict=True)])
    return losses, gradient


WORKER = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from run.ranks import cleanup, init_distributed
from test_train import one_step
torch.set_num_threads(1)
ranks = init_distributed()
how = {{"decoder": {decoder!r}, "half": {half!r}}}
curve = one_step({folder!r}, ranks, steps=3, lr=1e-3, **how)[0]
result = one_step({folder!r}, ranks, **how), curve
if ranks.is_main:
    torch.save(result, {out!r})
cleanup()
"""


@pytest.mark.parametrize(("decoder", "half"), [("fpn", False), ("mask2former", False), ("fpn", True)])
def test_two_processes_and_two_micro_batches_make_the_step_of_one(folder, segments, tmp_path, decoder, half):
    """The same loss and gradient at step 1, the same losses for three, each process on one thread; numbers
    of ignored pixels, or segments, are unequal. The random points of Mask2Former's loss are the same too.
    `half`: as on a GPU; sums of gradients are rounded to bfloat16, in another order.
    """
    assert torch.get_num_threads() == 1, "another number rounds differently, and matching amplifies rounding"
    folder = segments if decoder == "mask2former" else folder
    step = partial(one_step, folder, decoder=decoder, half=half)
    losses, gradient = step()
    curve, _ = step(steps=3, lr=1e-3)
    accumulated = step(accumulate=2), step(accumulate=2, steps=3, lr=1e-3)[0]

    script, out = tmp_path / "worker.py", str(tmp_path / "two.pt")
    here = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(folder), "out": out}
    script.write_text(WORKER.format(**here, decoder=decoder, half=half))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(run, check=True, capture_output=True, timeout=300)
    for (other_losses, other), other_curve in (accumulated, torch.load(out)):
        assert other_losses == pytest.approx(losses, rel=1e-3 if half else 1e-6)
        assert (other - gradient).norm() <= (0.02 if half else 1e-5) * gradient.norm()
        assert other_curve == pytest.approx(curve, rel=0.02 if half else 1e-4)
    assert curve[2] < curve[0]


def test_clipping_scales_the_gradient_to_the_largest_norm(folder):
    """The norm that is reported is the one before; a gradient below the largest norm stays as it is."""
    dataset = open_dataset("folder", folder, "train")
    batch = next(TrainStream(dataset, Augment((64, 64), 96, 384), batch=2, seed=0).batches())
    steps, norms = [], []
    for clip in (None, 1e-3, 1e9):
        torch.manual_seed(0)
        tada = build(TadaConfig(classes=tuple(dataset.classes), model="tiny", tags="oracle", dropout=0.0))
        trained = [p for p in tada.parameters() if p.requires_grad]
        before = torch.cat([p.detach().flatten() for p in trained])
        words, optimizer = TagSource("oracle", dataset.prompts), torch.optim.SGD(trained, 2.0**14, fused=True)
        norms.append(train.train_step(tada, tada, optimizer, [batch], words, HERE, clip)["grad_norm"])
        steps.append((torch.cat([p.detach().flatten() for p in trained]) - before).norm() / 2**14)
    assert norms[0] == norms[1] == norms[2] == pytest.approx(steps[0].item(), rel=1e-3)
    assert steps[1] == pytest.approx(1e-3, rel=1e-2)
    assert steps[2] == steps[0]


@pytest.mark.parametrize("where", ["images/train/", "the gradient alone"])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(folder, where):
    """Neither parameters nor AdamW's state, of which the first step made some."""
    dataset = open_dataset("folder", folder, "train")
    tada = build(TadaConfig(classes=tuple(dataset.classes), model="tiny", tags="oracle", dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in tada.parameters() if p.requires_grad], fused=True)
    batch = next(TrainStream(dataset, Augment((64, 64), 96, 384), batch=2, seed=0).batches())
    step = partial(
        train.train_step, tada, tada, optimizer, [batch], TagSource("oracle", dataset.prompts), HERE
    )
    step()
    bias = tada.decoder.classifier[-1].bias
    if where == "the gradient alone":
        bias.register_hook(lambda gradient: gradient * math.inf)
    else:
        bias.data[0] = math.inf
    tensors = [*tada.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(RunError, match=f"not finite.*{where}"):
        step()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


BROKEN = """
import math, sys
sys.path[:0] = [{root!r}, {tests!r}]
import train
from test_train import command
step = train.train_step
def broken(model, tada, *rest, **named):
    if named["ranks"].rank == 1:
        tada.decoder.mask_head[-1].bias.data[0] = math.nan  # the masks, and nothing else
    return step(model, tada, *rest, **named)
train.train_step = broken
sys.exit(train.main(command({folder!r}, {run!r})))
"""


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(segments, tmp_path):
    """One sentence with the images of that rank, no traceback, no hang in a collective."""
    script, here = tmp_path / "worker.py", {"root": str(ROOT), "tests": str(ROOT / "tests")}
    script.write_text(BROKEN.format(**here, folder=str(segments), run=str(tmp_path / "run")))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run += ["--redirects=3", f"--log-dir={tmp_path / 'logs'}", str(script)]
    ended = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120)
    assert "exitcode  : 2" in ended.stderr
    log = "".join(next((tmp_path / "logs").rglob(f"{rank}/stderr.log")).read_text() for rank in (0, 1))
    (sentence,) = [line for line in log.splitlines() if line.startswith("train.py: ")]
    assert re.search(r"not finite: .*nan.*, in \S+\.png, \S+\.png: give a lower --lr", sentence)
    assert "Traceback" not in log and "FutureWarning" not in log


FULL = """
import sys, torch
sys.path[:0] = [{root!r}]
from loading.tags import TagSource
from assemble import build, parameter_groups
from model import TadaConfig
from run.ranks import Ranks
from loading.stream import Batch
from train import train_step
torch.manual_seed(0)
tada = build(TadaConfig(tuple(f"class {{i}}" for i in range(150))))
tada.unet.checkpoint_activations = True
optimizer = torch.optim.AdamW(parameter_groups(tada, 6e-5, weight_decay=0.01), fused=True)
image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
labels = torch.randint(0, 150, (1, 512, 512), dtype=torch.uint8)
batch = Batch(image, labels, [[0]], [0], ["x.jpg"], [])
before = tada.unet.up_blocks[3].resnets[2].conv2.weight.detach().clone()
here = Ranks(0, 1, torch.device("cpu"))
result = train_step(tada, tada, optimizer, [batch], TagSource("classes", tada.config.prompts), here)
changed = not torch.equal(before, tada.unet.up_blocks[3].resnets[2].conv2.weight)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(result["loss"], result["seg"], changed, peak / 2**20)
"""


@pytest.mark.sweep
def test_a_step_at_full_size():
    """sd15, random weights, one image of 512x512: AdamW in float32, activations recomputed."""
    run = [sys.executable, "-c", FULL.format(root=str(ROOT))]
    ended = subprocess.run(run, check=False, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stderr[-2000:]
    loss, seg, changed, gib = ended.stdout.split()
    assert abs(float(seg) - math.log(150)) < 1.5, "an untrained classifier is nearly uniform"
    assert math.isfinite(float(loss)) and changed == "True"
    assert float(gib) < 20


# ---- a run, and how it resumes


def test_a_run_folder_holds_what_the_readme_lists(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {
        "config.json",
        "log.jsonl",
        "inputs.jpg",
        "val",
        "last",
        "best",
        "step-000006",
        "curve.png",
    }
    assert len([name for name in names if name.startswith("step-")]) <= 3
    assert os.readlink(uninterrupted / "last") == "step-000006"
    log = log_of(uninterrupted)
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "val" in line] == [3, 6]
    best = max((line for line in log if "val" in line), key=lambda line: line["val"]["mIoU"])
    assert os.readlink(uninterrupted / "best") == f"step-{best['step']:06d}"
    assert read_model(uninterrupted).config.classes == tuple(scenes.CLASSES)


def test_val_shows_the_ground_truth_and_no_drawing_stops_training(folder, tmp_path, monkeypatch, capsys):
    """Here both drawings of a validation fail."""
    drawn = []

    def fails(file, *arguments):
        drawn.append((file, arguments))
        raise RuntimeError("no ink")

    monkeypatch.setattr(train, "curves", fails)
    monkeypatch.setattr(train, "draw_inputs", lambda *arguments: None)
    monkeypatch.setattr(train, "draw", fails)
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--iterations", "1")) == 0
    assert [file for file, _ in drawn] == [run / "val/step-000001.jpg", run / "curve.png"]
    printed = capsys.readouterr().out
    assert all(f"{file} is not drawn (no ink)\n" in printed for file, _ in drawn)
    val, shown = drawn[0][1]
    for i, (image, targets, tags) in enumerate(shown):
        assert [*targets] == ["ground truth", "prediction"] and tags
        assert np.array_equal(targets["ground truth"], val.load(i).labels)
        assert targets["prediction"].shape == image.shape[:2]
    assert len(shown) == 3
    (line,) = [x for x in log_of(run) if "val" in x]
    assert f"step 1 val mIoU {100 * line['val']['mIoU']:.1f}% pixel accuracy" in printed


@pytest.mark.parametrize("crash", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_the_same_command_resumes_exactly(folder, uninterrupted, tmp_path, monkeypatch, crash):
    """Interrupted before or after a checkpoint, with dropout: it ends as the uninterrupted run. A restart by
    torchrun is the same command, too, whose environment counts the attempts.
    """
    stops_after(crash, monkeypatch)
    assert train.main(command(folder, tmp_path / "run")) == 130
    monkeypatch.undo()
    torch.manual_seed(123)  # another state than before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(command(folder, tmp_path / "run")) == 0
    assert same(tmp_path / "run", uninterrupted)


def test_a_run_with_lora_resumes_exactly(folder, tmp_path, monkeypatch):
    """And every update is trained."""
    flags = ["--iterations", "2", "--save-every", "1", "--weights", "weights/tiny", "--lora", "4"]
    assert train.main(command(folder, tmp_path / "whole", *flags)) == 0
    stops_after(1, monkeypatch)
    assert train.main(command(folder, tmp_path / "killed", *flags)) == 130
    monkeypatch.undo()
    assert train.main(command(folder, tmp_path / "killed", *flags)) == 0
    assert same(tmp_path / "killed", tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    moved = [x for name, x in state.items() if name.endswith(".lora_B")]
    assert len(moved) == 4 * 32 and all(x.abs().max() > 0 for x in moved)


def test_a_run_that_started_so_resumes_without_it(folder, tmp_path, monkeypatch, capsys):
    """Killed after a checkpoint, the other run gone: the same bytes as in one go. Its sha256 is kept."""
    source, more = tmp_path / "source", ["--iterations", "2", "--save-every", "1"]
    assert train.main(command(folder, source, "--iterations", "1")) == 0
    for name in ("whole", "killed"):
        copy = shutil.copytree(source, tmp_path / f"from-{name}", symlinks=True)
        flags = command(folder, tmp_path / name, *more, "--from", str(tmp_path / "from"))
        copy.rename(tmp_path / "from")
        stops_after(1 if name == "killed" else None, monkeypatch)
        capsys.readouterr()
        assert train.main(flags) == (130 if name == "killed" else 0)
        out = capsys.readouterr().out
        assert f"starting from {tmp_path}/from/step-000001/model.safetensors:\n  unet     taken\n" in out
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "from")
    about = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert train.main(flags) == 0
    assert "starting from" not in capsys.readouterr().out
    assert same(tmp_path / "killed", tmp_path / "whole")
    again = json.loads((tmp_path / "killed" / "config.json").read_text())
    name = "the model of --from"
    assert len(about["read"][name]) == 64 and again["read"][name] == about["read"][name]
    assert again["options"]["from_run"] == str(tmp_path / "from")

    assert train.main([*flags, "--fresh"]) == 2
    assert "from holds no model.safetensors" in capsys.readouterr().err
    assert train.main(command(folder, tmp_path / "from", "--iterations", "1", "--lr", "1e-2")) == 0
    assert train.main(flags) == 0
    assert "the model of --from has changed: the run resumes from its own" in capsys.readouterr().out


def test_a_panoptic_run_resumes_exactly(segments, tmp_path, monkeypatch):
    """Mask2Former on one's own segments, interrupted after a checkpoint: the same points are drawn again."""
    assert train.main(command(segments, tmp_path / "uninterrupted", "--accumulate", "2")) == 0
    stops_after(3, monkeypatch)
    run = command(segments, tmp_path / "run", "--accumulate", "2")
    assert train.main(run) == 130
    monkeypatch.undo()
    torch.manual_seed(123)
    assert train.main(run) == 0
    assert same(tmp_path / "run", tmp_path / "uninterrupted")
    validated = [line for line in log_of(tmp_path / "run") if "val" in line]
    best = max(validated, key=lambda line: line["val"]["PQ"])
    assert os.readlink(tmp_path / "run" / "best") == f"step-{best['step']:06d}"
    config = read_model(tmp_path / "run").config
    assert (config.decoder, config.things) == (
        "mask2former",
        tuple(open_dataset("scenes", "", "val").categories.things),
    )


def test_evaluation_never_touches_training(folder, uninterrupted, tmp_path):
    """With another schedule of evaluations and checkpoints, the model is the same: neither draws a random
    number.
    """
    more = ["--eval-every", "6", "--save-every", "6"]
    assert train.main(command(folder, tmp_path / "run", *more)) == 0
    a, b = (read_model(run / "last").state_dict() for run in (uninterrupted, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_left_alone(folder, uninterrupted, capsys):
    before = log_of(uninterrupted)
    assert train.main(command(folder, uninterrupted)) == 0
    assert "is complete" in capsys.readouterr().out
    assert log_of(uninterrupted) == before


@pytest.mark.parametrize("terminal", [True, False])
def test_validation_shows_a_bar_on_a_terminal(folder, tmp_path, monkeypatch, capsys, terminal):
    """The first line appears before data are checked."""
    errors = io.StringIO()
    errors.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", errors)
    assert train.main(command(folder, tmp_path / "run", "--iterations", "1")) == 0
    assert bool(re.search(r"folder val: 100%.* 3/3 ", errors.getvalue())) == terminal
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"folder in {folder}: checking images and labels"


def test_tagging_before_training_resumes(folder, tmp_path, monkeypatch, capsys):
    """Ctrl-C after three of eight images: the others are tagged, and the file is that of one go."""
    whole, run, tagged = tmp_path / "whole", tmp_path / "run", []
    flags = ["--iterations", "1", "--tags", "clip", "--check"]
    assert train.main(command(folder, whole, *flags)) == 0

    def interrupted(tada, *arguments):
        tagged.append(1)
        if len(tagged) == 4:
            raise KeyboardInterrupt
        return zero_shot_tags(tada, *arguments)

    zero_shot_tags = train.Tada.zero_shot_tags
    monkeypatch.setattr(train.Tada, "zero_shot_tags", interrupted)
    assert train.main(command(folder, run, *flags)) == 130
    assert "what is written is kept, the same command resumes" in capsys.readouterr().err
    lines = (whole / "tags-train.jsonl").read_bytes().splitlines()
    assert (run / "tags-train.jsonl").read_bytes().splitlines() == lines[:3]
    monkeypatch.setattr(train, "smoke_test", lambda training: None)  # it tags images of the other split
    assert train.main(command(folder, run, *flags)) == 0
    assert len(tagged) == 4 + 5 and (run / "tags-train.jsonl").read_bytes().splitlines() == lines


def test_tags_of_a_start_without_a_checkpoint_are_not_reused(folder, tmp_path):
    """They may be those of another model or data set."""
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--check", "--iterations", "1", "--tags", "clip")) == 0
    (run / "tags-train.jsonl").write_text('{"image": "elsewhere.png", "tags": []}\n')
    assert train.main(command(folder, run, "--iterations", "1", "--tags", "clip")) == 0
    tagged = [json.loads(line)["image"] for line in (run / "tags-train.jsonl").read_text().splitlines()]
    assert tagged == [f"images/train/{i}.png" for i in range(8)]


def test_fresh_keeps_the_earlier_run_under_another_name(folder, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--iterations", "1")) == 0
    assert train.main(command(folder, run, "--iterations", "2", "--fresh")) == 0
    assert (tmp_path / "run.1" / "step-000001").is_dir()
    assert (run / "step-000002").is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "0.5"], "--lr was 0.001, is 0.5"),
        (["--crop", "32"], "--crop was [64, 64], is [32, 32]"),
        (["--seed", "9"], "--seed was 0, is 9"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(folder, uninterrupted, capsys, more, message):
    assert train.main(command(folder, uninterrupted, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "--fresh" in error


def test_another_machine_may_have_other_threads(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--iterations", "1")) == 0
    assert train.main(command(folder, run, "--iterations", "1", "--threads", "2")) == 0
    assert "--threads was 1, is 2: results may differ in rounding" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["image", "label", "class", "tags"])
def test_a_run_does_not_resume_with_other_data(folder, uninterrupted, tmp_path, capsys, change):
    """One image more changes the whole order; another order of the classes changes every label."""
    run, moved, tags = tmp_path / "run", tmp_path / "moved", tmp_path / "tags.jsonl"
    paths = [
        f"images/{split}/{i}.png" for split, n in (("train", range(8)), ("val", range(8, 11))) for i in n
    ]
    tags.write_text("".join(json.dumps({"image": x, "tags": [["sky", 1.0]]}) + "\n" for x in paths))
    shutil.copytree(folder, moved)
    more = ["--iterations", "1", "--tags", str(tags)]
    assert train.main(command(folder, run, *more)) == 0
    assert train.main(command(moved, run, *more)) == 0, "a data set may move"
    if change == "image":
        (moved / "images" / "train" / "7.png").unlink(), (moved / "labels" / "train" / "7.png").unlink()
        message = "the list of training pictures has changed"
    elif change == "label":  # of a run that is complete
        shutil.copy(moved / "labels" / "val" / "9.png", moved / "labels" / "val" / "10.png")
        message = "a size among the validation labels has changed"
    elif change == "class":
        (moved / "classes.txt").write_text("\n".join(reversed(scenes.CLASSES)))
        message = "the list of classes has changed"
    else:
        tags.write_text(tags.read_text().replace("sky", "sea"))
        message = "the file of tags has changed"
    capsys.readouterr()
    assert train.main(command(moved, run, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "--fresh" in error


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_fresh_moves_nothing_if_the_weights_are_bad(folder, tmp_path, capsys, part):
    """Of the UNet, which is trained, no hash is made: it is read."""
    run, weights = tmp_path / "run", shutil.copytree("weights/tiny", tmp_path / "tiny")
    flags = command(folder, run, "--iterations", "1")
    assert train.main(flags) == 0
    before = sorted(run.rglob("*"))
    file = next((weights / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert train.main([*flags, "--fresh", "--weights", str(weights)]) == 2
    assert f"{file} is truncated" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("text", [None, "", '{"options": '])
def test_a_run_without_its_config_is_named(folder, tmp_path, capsys, text):
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--iterations", "1")) == 0
    (run / "config.json").unlink() if text is None else (run / "config.json").write_text(text)
    assert train.main(command(folder, run, "--iterations", "1")) == 2
    assert f"{run / 'config.json'} lacks the settings of its run" in capsys.readouterr().err
    assert train.main(command(folder, run, "--iterations", "1", "--fresh")) == 0
    assert (tmp_path / "run.1" / "step-000001").is_dir()


def test_a_run_without_an_intact_checkpoint_is_not_overwritten(folder, tmp_path, capsys):
    """The log and the damaged checkpoint are kept."""
    run = tmp_path / "run"
    assert train.main(command(folder, run, "--iterations", "1")) == 0
    before = log_of(run)
    (run / "step-000001" / "train.json").write_text("{}")
    assert train.main(command(folder, run, "--iterations", "1")) == 2
    assert f"no intact checkpoint in {run}" in capsys.readouterr().err
    assert log_of(run) == before and (run / "step-000001" / "model.safetensors").is_file()


def test_a_step_is_saved_before_its_validation(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    """An unreadable image stops the run; repaired, the run resumes with the validation of that step."""
    run, validated, evaluate = tmp_path / "run", [], train.evaluate_val

    def unreadable(training, limit=None):
        if limit is None:
            validated.append(1)
            raise DataError("images/val/8.png cannot be read")
        return evaluate(training, limit=limit)

    monkeypatch.setattr(train, "evaluate_val", unreadable)
    for _ in range(2):
        assert train.main(command(folder, run)) == 2
        assert os.readlink(run / "last") == "step-000003" and not (run / "best").exists()
        assert [line["step"] for line in log_of(run)] == [1, 2, 3]
    assert len(validated) == 2
    monkeypatch.setattr(train, "evaluate_val", evaluate)
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted) and os.readlink(run / "best") == os.readlink(uninterrupted / "best")


def test_the_last_step_is_validated_on_resuming(folder, uninterrupted, tmp_path, monkeypatch):
    """Killed between the line of the log and the checkpoint: the line is there once."""
    run, write = tmp_path / "run", train.checkpoint.write_step

    def dies(folder, step, **named):
        if step == 6 and named["metrics"]:
            raise KeyboardInterrupt
        return write(folder, step, **named)

    monkeypatch.setattr(train.checkpoint, "write_step", dies)
    assert train.main(command(folder, run)) == 130
    monkeypatch.setattr(train.checkpoint, "write_step", write)
    assert train.main(command(folder, run)) == 0
    assert same(run, uninterrupted)


def test_the_best_step_is_one_that_was_saved(folder, tmp_path, monkeypatch, capsys):
    """The disk is full at the first validation."""
    run, write = tmp_path / "run", train.checkpoint.write_step

    def full(folder, step, **named):
        if step == 3:
            raise train.CheckpointError("no room")
        return write(folder, step, **named)

    monkeypatch.setattr(train.checkpoint, "write_step", full)
    assert train.main(command(folder, run)) == 0
    output = capsys.readouterr().out
    assert "no checkpoint at step 3: no room" in output and "at step 6; next" in output
    assert os.readlink(run / "best") == "step-000006"


@pytest.mark.parametrize(("world", "device"), [(1, "cpu"), (1, "meta"), (2, "cpu")])
def test_what_a_resumed_run_does_not_keep_is_printed(folder, uninterrupted, capsys, world, device):
    """More ranks have new random states; a GPU (here: any other device) other roundings."""
    with Run(uninterrupted, HERE) as run:
        training = train.prepare(run, parse(command(folder, uninterrupted)))
        assert "resuming from step 6" in capsys.readouterr().out
        run.ranks = Ranks(0, world, torch.device(device))
        train.resume(training, uninterrupted / "last")
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("resuming from step 6 in")]
        assert ("it has no random states of more ranks or of a GPU: these are new" in line) == (world > 1)
        assert ("same samples as in one go, but a GPU rounds otherwise" in line) == (device != "cpu")


def test_a_copied_run_gets_its_link_to_the_best_step_back(folder, tmp_path, capsys):
    """The copy lacks the links, or has folders in their place."""
    run, more = tmp_path / "run", ["--iterations", "3"]
    assert train.main(command(folder, run, *more)) == 0
    (run / "best").unlink(), (run / "last").unlink()
    assert train.main(command(folder, run, *more)) == 0
    assert os.readlink(run / "best") == "step-000003"
    (run / "best").unlink()
    shutil.copytree(run / "step-000003", run / "best")
    assert train.main(command(folder, run, *more)) == 2
    assert f"{run / 'best'} is a copy where a link to a step belongs" in capsys.readouterr().err


def test_a_model_that_changed_on_the_disk_is_refused(uninterrupted, tmp_path):
    step = shutil.copytree(uninterrupted / "best", tmp_path / "step-000003")
    file = step / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 0x11
    file.write_bytes(content)
    hashes = step / "sha256.json"
    for sums, fault in (
        (hashes.read_text(), "changed after it was written"),
        ("{", "sha256.json is corrupt"),
    ):
        hashes.write_text(sums)
        with pytest.raises(train.CheckpointError, match=fault):
            read_model(step)


# ---- bad input: one sentence, exit code 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere"], r"/nowhere does not exist: --data must be the folder"),
        (["--weights", "/nowhere"], r"/nowhere.*weights\.fetch"),
        (["--batch", "5", "--accumulate", "2"], r"batch of 5 cannot be divided"),
    ],
)
def test_bad_input_is_named(folder, tmp_path, capsys, flags, message):
    assert train.main(command(folder, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (
            "",
            "turn on --accumulate 4 (16.4), --checkpoint-activations (16.4), --lora 16 (4.8) or --freeze",
        ),
        (
            "--accumulate 4",
            "on --checkpoint-activations (16.4), --lora 16 (4.8) or --freeze-unet (4.7);",
        ),
        ("--accumulate 4 --lora 16", "activations (4.8), --freeze-unet instead of --lora (4.7);"),
        ("--freeze-unet", "turn on --accumulate 4 (4.7), --checkpoint-activations (4.7); in"),
        ("--accumulate 4 --freeze-unet --checkpoint-activations", "a GPU with more memory"),
    ],
)
def test_out_of_memory_is_one_sentence(folder, tmp_path, capsys, monkeypatch, flags, cure):
    """With what is not yet on, from whichever rank it happens on."""

    def exhausted(*arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train, "train", exhausted)
    monkeypatch.setenv("RANK", "0")
    assert train.main(command(folder, tmp_path / "run", *flags.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: CUDA out of memory") and cure in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.sweep
def test_two_machines_make_the_run_of_one(folder, tmp_path):
    """Two agents that meet by torchrun's own rendezvous, one process each, or one agent with two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{s.getsockname()[1]}"
    two = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}"]
    agents = {"two": [[*two, f"--node-rank={i}"] for i in (0, 1)]}
    agents["one"] = [["--standalone", "--nproc-per-node=2"]]
    models = []
    for name, hows in agents.items():
        more = [str(ROOT / "train.py"), *command(folder, tmp_path / name, "--iterations", "2")]
        run = [sys.executable, "-m", "torch.distributed.run"]
        started = [subprocess.Popen([*run, *how, *more], stderr=subprocess.PIPE, text=True) for how in hows]
        errors = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0] * len(hows), errors
        step = tmp_path / name / "last"
        models.append([(step / file).read_bytes() for file in ("model.safetensors", "train.safetensors")])
    assert models[0] == models[1]


def test_a_label_out_of_range_is_named_before_training(folder, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    file = bad / "labels" / "train" / "3.png"
    labels = np.array(Image.open(file))
    labels[0, 0] = 24
    Image.fromarray(labels).save(file)
    assert train.main(command(bad, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert str(file) in error and "24" in error and "0..23" in error
    assert not (tmp_path / "run").exists()
