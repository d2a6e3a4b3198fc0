"""run/ranks.py: a model alone is not wrapped; DDP is called with the argument that this torch has;
objects are gathered on rank 0;
--device is checked and obeyed."""

import argparse

import pytest
import torch
from torch import nn

import run.ranks
from run.ranks import Ranks, init_distributed, usable_device


@pytest.mark.parametrize("argument", ["broadcast_buffers", "forward_sync_buffers"])
def test_buffers_are_not_synchronised_by_old_and_new_torch(argument, monkeypatch):
    """torch 2.13 renamed the argument, and warns of the old name."""
    calls = []

    class Old:
        def __init__(self, module, device_ids=None, broadcast_buffers=True, **more):
            calls.append(("broadcast_buffers", broadcast_buffers, device_ids, more["static_graph"]))

    class New:
        def __init__(
            self, module, device_ids=None, broadcast_buffers=None, forward_sync_buffers=None, **more
        ):
            assert broadcast_buffers is None
            calls.append(("forward_sync_buffers", forward_sync_buffers, device_ids, more["static_graph"]))

    kind = Old if argument == "broadcast_buffers" else New
    monkeypatch.setattr(run.ranks, "DistributedDataParallel", kind)
    model = nn.Linear(1, 1)
    assert isinstance(Ranks(0, 2, torch.device("cpu")).data_parallel(model), kind)
    assert Ranks(0, 1, torch.device("cpu")).data_parallel(model) is model
    Ranks(1, 2, torch.device("cuda", 1)).data_parallel(model, accumulate=2)
    assert calls == [(argument, False, None, True), (argument, False, [1], False)]


def test_only_rank_0_has_what_is_gathered(monkeypatch):
    def gather(part, parts):
        if parts is not None:
            parts[:] = [part, ["theirs"]]

    monkeypatch.setattr(run.ranks.dist, "gather_object", gather)
    alone, first, second = (Ranks(*x, torch.device("cpu")) for x in ((0, 1), (0, 2), (1, 2)))
    assert alone.gather_object(["ours"]) == ["ours"]
    assert first.gather_object(["ours"]) == ["ours", "theirs"]
    assert second.gather_object(["theirs"]) == []


@pytest.mark.parametrize("text", ["gpu", "cuda:-1", "cuda:2", "mps"])
def test_a_device_that_is_not_here_is_refused(text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [usable_device(x) for x in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(
        argparse.ArgumentTypeError, match=f"^{text}: torch .+ has cpu, cuda, cuda:0, cuda:1 here"
    ):
        usable_device(text)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(argparse.ArgumentTypeError, match="each process of torchrun takes a GPU of its own"):
        usable_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match="has cpu here; choose one$"):
        usable_device("cuda")


@pytest.mark.parametrize(
    ("asked", "local", "gpus", "device"),
    [
        (None, "0", 0, "cpu"),
        (None, "1", 2, "cuda:1"),
        ("cpu", "1", 2, "cpu"),
        ("cuda", "1", 2, "cuda:1"),
        ("cuda:1", "0", 2, "cuda:1"),
        ("mps", "0", 0, "mps"),
    ],
)
def test_the_device_is_the_one_asked_for_else_a_gpu(asked, local, gpus, device, monkeypatch):
    """Of several GPUs a process takes that of its number; its own becomes torch's current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert init_distributed(asked).device == torch.device(device)
    assert chosen == [torch.device(device)] * device.startswith("cuda")
