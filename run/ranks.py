"""The processes of one run, started by torchrun or alone: who we are, sums over all, waiting for all."""

import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=60)  # of a collective: longer than the slowest check, tagging or save of rank 0


class Ranks(NamedTuple):
    """rank 0 speaks and writes; device is what this process computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every process's tensor, in the order of ranks; the shapes must be equal."""
        if self.world == 1:
            return [x]
        every = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(every, x)
        return every

    def all_gather_object(self, part: list) -> list:
        """The lists of all processes, one after the other; of any objects, so few of them."""
        parts = [part] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, part)
        return [x for part in parts for x in part]

    def barrier(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def init_distributed() -> Ranks:
    """Join the processes that torchrun started (its RANK, WORLD_SIZE, LOCAL_RANK), or be the only one.

    The device is this process's own GPU, or the CPU where there is none.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            print(
                f"process {local} of this machine has no GPU: give --nproc-per-node {gpus}", file=sys.stderr
            )
            sys.exit(2)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(rank, world, device)


def cleanup() -> None:
    """Leave the others, if there are any, when all of them leave.

    After an error one must not: NCCL waits here for the others, who wait for this one. It just ends, and
    torchrun ends the others.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
