"""bench.py times nothing that is wrong, nothing on a busy machine, and counts memory in MiB."""

import pytest
import torch
from oracle import SMALL_UNET, reference_unet

import bench
from unet import UNet


@pytest.fixture
def small(monkeypatch):
    """The UNet's row at a small width, with memory measured in this process."""
    context = SMALL_UNET.context_width
    case = bench.Case(
        "UNet",
        lambda size: [torch.randn(1, 4, size // 8, size // 8), torch.tensor([1]), torch.randn(1, 7, context)],
        bench.Side(lambda: UNet(SMALL_UNET), lambda model, x: model(*x)),
        bench.Side(lambda: reference_unet(SMALL_UNET), lambda model, x: model(*x).sample),
    )
    monkeypatch.setitem(bench.CASES, "unet", case)
    monkeypatch.setattr(bench, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "cpu_of_others", lambda: lambda: 0.0)
    return case


def test_a_row_compares_equal_work(small):
    row = bench.compare("unet", "float32", size=128, rounds=3)
    assert row["error"] < 1e-5
    assert row["ours s"] > 0 and row["peer s"] > 0
    assert 0.1 < row["ratio"] < 10
    assert "| UNet | 128 | float32 |" in bench.table([row])


def test_a_wrong_result_is_not_timed(small, monkeypatch):
    wrong = bench.Side(small.ours.build, lambda model, x: 1.001 * model(*x))
    monkeypatch.setitem(bench.CASES, "unet", bench.Case(small.title, small.inputs, wrong, small.peer))
    row = bench.compare("unet", "float32", size=64, rounds=3)
    assert row["verdict"] == "FAIL"
    assert "ours s" not in row
    assert bench.table([row]).count("FAIL") == 6  # in place of every number but the error


def test_a_busy_machine_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(bench, "cpu_of_others", lambda: lambda: 0.2)
    row = bench.compare("unet", "float32", size=64, rounds=3)
    assert row["verdict"] == "BUSY"
    assert "ratio" not in row


def test_runs_take_turns(monkeypatch):
    """A B, B A, A B: a machine that slows down is fair to both."""
    monkeypatch.setattr(bench, "cpu_of_others", lambda: lambda: 0.0)
    order = []
    times = bench.in_turns([lambda: order.append("A"), lambda: order.append("B")], 3)
    assert order == list("ABBAAB")
    assert [len(x) for x in times] == [3, 3]


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
    """256 MiB taken and given back show in the peak, and not in what is resident."""
    before = bench.resident()
    bench.start_peak()
    torch.ones(64 * 2**20)
    assert 250 < bench.peak() - before < 300
    assert bench.resident() - before < 50


def test_the_command_refuses_what_makes_no_sense(capsys):
    for options, named in ((["--rounds", "2"], "--rounds 2"), (["--size", "100"], "--size 100")):
        with pytest.raises(SystemExit) as stop:
            bench.main(options)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err
