"""run/ranks.py: a model alone is not wrapped; DDP is called with the argument that this torch has;
objects are gathered on rank 0."""

import pytest
import torch
from torch import nn

import run.ranks
from run.ranks import Ranks


@pytest.mark.parametrize("argument", ["broadcast_buffers", "forward_sync_buffers"])
def test_buffers_are_not_synchronised_by_old_and_new_torch(argument, monkeypatch):
    """torch 2.13 renamed the argument, and warns of the old name."""
    calls = []

    class Old:
        def __init__(self, module, device_ids=None, broadcast_buffers=True):
            calls.append(("broadcast_buffers", broadcast_buffers, device_ids))

    class New:
        def __init__(self, module, device_ids=None, broadcast_buffers=None, forward_sync_buffers=None):
            assert broadcast_buffers is None
            calls.append(("forward_sync_buffers", forward_sync_buffers, device_ids))

    kind = Old if argument == "broadcast_buffers" else New
    monkeypatch.setattr(run.ranks, "DistributedDataParallel", kind)
    model = nn.Linear(1, 1)
    assert isinstance(Ranks(0, 2, torch.device("cpu")).data_parallel(model), kind)
    assert Ranks(0, 1, torch.device("cpu")).data_parallel(model) is model
    Ranks(1, 2, torch.device("cuda", 1)).data_parallel(model)
    assert calls == [(argument, False, None), (argument, False, [1])]


def test_only_rank_0_has_what_is_gathered(monkeypatch):
    def gather(part, parts):
        if parts is not None:
            parts[:] = [part, ["theirs"]]

    monkeypatch.setattr(run.ranks.dist, "gather_object", gather)
    alone, first, second = (Ranks(*x, torch.device("cpu")) for x in ((0, 1), (0, 2), (1, 2)))
    assert alone.gather_object(["ours"]) == ["ours"]
    assert first.gather_object(["ours"]) == ["ours", "theirs"]
    assert second.gather_object(["theirs"]) == []
