"""bench.py times no wrong result, nothing on a busy machine, and measures memory in MiB."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import SMALL_MASK2FORMER, SMALL_UNET, reference_mask2former, reference_unet

from lab import bench, bench_peers
from mask2former import Mask2Former
from unet import UNet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quiet(monkeypatch):
    """No other process, and memory measured in this one."""
    monkeypatch.setattr(bench_peers, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "cpu_of_others", lambda: lambda: 0.0)


@pytest.fixture
def small(quiet, monkeypatch):
    """The UNet's row at a small width."""
    context = SMALL_UNET.context_width
    case = bench.Case(
        "UNet",
        lambda size: [torch.randn(1, 4, size // 8, size // 8), torch.tensor([1]), torch.randn(1, 7, context)],
        bench.Side(lambda: UNet(SMALL_UNET), lambda model, x: model(*x)),
        bench.Side(lambda: reference_unet(SMALL_UNET), lambda model, x: model(*x).sample),
    )
    monkeypatch.setitem(bench.CASES, "unet", case)
    return case


@pytest.fixture(params=["mask2former", "mask2former-loss"])
def masks(request, quiet, monkeypatch):
    """The name of one of Mask2Former's rows, at a small width."""
    case, sizes = bench.CASES[request.param], SMALL_MASK2FORMER
    small = replace(
        case,
        inputs=partial(case.inputs, channels=sizes["channels"], classes=len(sizes["things"])),
        ours=replace(case.ours, build=lambda: Mask2Former(**sizes)),
        peer=replace(case.peer, build=reference_mask2former),
    )
    monkeypatch.setitem(bench.CASES, request.param, small)
    return request.param


def test_a_row_compares_equal_work(small):
    row = bench.compare("unet", "float32", size=128, rounds=3)
    assert row["error"] < 1e-5
    assert row["ours s"] > 0 and row["peer s"] > 0
    assert 0.1 < row["ratio"] < 10
    assert "| UNet | 128 | float32 |" in bench_peers.table([row], bench_peers.COLUMNS)


def test_a_wrong_result_is_not_timed(small, monkeypatch):
    wrong = bench.Side(small.ours.build, lambda model, x: 1.001 * model(*x))
    monkeypatch.setitem(bench.CASES, "unet", bench.Case(small.title, small.inputs, wrong, small.peer))
    row = bench.compare("unet", "float32", size=64, rounds=3)
    assert row["verdict"] == "FAIL"
    assert "ours s" not in row
    assert (
        bench_peers.table([row], bench_peers.COLUMNS).count("FAIL") == 6
    )  # in place of every number but the error


def test_mask2former_is_compared_under_our_names(masks):
    """Forward: class and mask logits; with the loss: it, and gradients of four maps and of the weights."""
    case = bench.CASES[masks]
    ours, peer = case.ours.build(), case.peer.build()
    ours.load_state_dict(case.names(peer.state_dict()))
    inputs = case.inputs(128)
    with case.mode():
        mine, theirs = case.ours.run(ours, inputs), case.peer.run(peer, inputs)
    shapes = {"mask2former": [(1, 7, 6), (1, 7, 32, 32)], "mask2former-loss": [()] * 6}
    assert [x.shape for x in mine] == [x.shape for x in theirs] == shapes[masks]
    assert all(bench.relative(*x) < 1e-4 and x[0].abs().max() > 1e-3 for x in zip(mine, theirs))

    row = bench.compare(masks, "float32", size=128, rounds=3)
    assert row["error"] < 1e-4
    assert row["ours s"] > 0 and row["peer s"] > 0 and 0.1 < row["ratio"] < 10


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_every_part_of_a_result_counts(masks, factor, monkeypatch):
    case = bench.CASES[masks]
    for wrong in range({"mask2former": 2, "mask2former-loss": 6}[masks]):

        def run(model, x, wrong=wrong):
            return [factor * part if i == wrong else part for i, part in enumerate(case.ours.run(model, x))]

        monkeypatch.setitem(bench.CASES, masks, replace(case, ours=replace(case.ours, run=run)))
        assert bench.compare(masks, "float32", size=128, rounds=3)["verdict"] == "FAIL", wrong


def test_mask2former_is_measured_in_float32_alone(monkeypatch, capsys):
    """transformers' pixel decoder returns NaN in bfloat16."""
    monkeypatch.setattr(bench, "compare", lambda name, dtype, size, rounds: {"case": name, "dtype": dtype})
    assert bench.main(["--only", "unet", "mask2former", "mask2former-loss"]) == 0
    rows = [line.split("|")[1:4:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [" ".join(row).split() for row in rows[1:]] == [
        ["unet", "float32"],
        ["unet", "bfloat16"],
        ["mask2former", "float32"],
        ["mask2former-loss", "float32"],
    ]


def test_a_busy_machine_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(bench, "cpu_of_others", lambda: lambda: 0.2)
    row = bench.compare("unet", "float32", size=64, rounds=3)
    assert row["verdict"] == "BUSY"
    assert "ratio" not in row


def test_runs_take_turns():
    """A B, B A, A B: a machine that slows down is fair to both."""
    order = []
    times = bench_peers.in_turns(3, *(lambda i, x=x: order.append((x, i)) or i for x in "AB"))
    assert order == [("A", 0), ("B", 0), ("B", 1), ("A", 1), ("A", 2), ("B", 2)]
    assert times == [[0, 1, 2]] * 2


def test_others_are_all_that_is_not_ours(monkeypatch):
    """Of 300 ticks 200 were busy, 150 of them ours: others took 50."""
    stat = iter(
        ["cpu 60 0 40 100 0 0 0 0\n", "cpu 200 0 90 200 0 0 0 10\n"]
    )  # user nice system idle wait irq soft steal
    own = iter([(1.0, 0.5, 0.0, 0.0, 0.0), (2.0, 1.0, 0.0, 0.0, 0.0)])  # seconds, 100 ticks each
    monkeypatch.setattr(bench.Path, "read_text", lambda self: next(stat))
    monkeypatch.setattr(bench.os, "times", lambda: next(own))
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 100)
    others = bench.cpu_of_others()
    assert others() == pytest.approx(50 / 300)


def test_peak_memory_is_counted():
    """256 MiB allocated and freed count in the peak, not in the resident size; in a process of its own, since
    one that runs other tests may free their memory meanwhile.
    """
    program = """if True:
        import torch
        from lab.bench_peers import memory, watch_peak
        before = memory("VmRSS")
        watch_peak()
        torch.ones(64 * 2**20)
        print(memory("VmHWM") - before, memory("VmRSS") - before)
    """
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, resident = map(float, result.stdout.split())
    assert 250 < peak < 300
    assert resident < 50


def test_invalid_options_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = [
        (["--rounds", "2"], "--rounds 2"),
        (["--size", "100"], "--size 100"),
        (["--only", "kernels"], "--only kernels: --suite cpu has unet, vae"),
        (["--suite", "gpu", "--only", "vae"], "--only vae: --suite gpu has tests, unknowns, kernels"),
        (["--suite", "gpu"], "torch finds no GPU; --suite cpu needs none"),
    ]
    for options, named in cases:
        with pytest.raises(SystemExit) as stop:
            bench.main(options)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err
