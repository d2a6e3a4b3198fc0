"""The processes of one run, started by torchrun or alone: rank and device, collectives, data parallelism."""

import argparse
import inspect
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=60)  # of a collective: longer than the slowest check, tagging or save of rank 0


class Ranks(NamedTuple):
    """Rank 0 prints and writes; `device` is that of this process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The elementwise sum over all ranks, on this one's device; alone, x itself."""
        if self.world > 1:
            x = x.to(self.device, copy=True)
            dist.all_reduce(x)
        return x

    def all_gather_object(self, part: list) -> list:
        """The lists of all ranks, concatenated; pickles, keep them small."""
        parts = [part] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, part)
        return [x for part in parts for x in part]

    def gather_object(self, part: list) -> list:
        """The lists of all ranks, concatenated, on rank 0; [] on the others, whose memory does not grow."""
        parts = [part] * self.world if self.is_main else None
        if self.world > 1:
            dist.gather_object(part, parts)
        return [x for part in parts or [] for x in part]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self.world > 1:
            dist.barrier()

    def data_parallel(self, model: nn.Module, accumulate: int = 1, half: bool = False) -> nn.Module:
        """Wrap a model so that gradients are averaged over all ranks; alone, return the model itself.

        Gradients lie in DDP's buckets, which saves their copy. The graph is the same in every step, unless
        micro-batches `accumulate`: all but the last skip the average. With `half` all gradients travel as
        bfloat16. Buffers are not synchronised: they are constants. torch 2.13 renamed that argument of DDP.
        """
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        argument = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        how = {argument: False, "gradient_as_bucket_view": True, "static_graph": accumulate == 1}
        parallel = DistributedDataParallel(model, device_ids=devices, **how)
        if half:
            parallel.register_comm_hook(None, in_bfloat16)
        return parallel


def in_bfloat16(group: None, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's hook under another name: by its own DDP refuses it without NCCL, where it works too."""
    return bf16_compress_hook(group, bucket)


def usable_device(text: str) -> str:
    """The type of --device: refuse what torch does not have here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    known += ["mps"] * torch.backends.mps.is_available()
    if text not in known:
        fault = f"torch {torch.__version__} has {', '.join(known)} here; choose one"
    elif ":" in text and "RANK" in os.environ:
        fault = "each process of torchrun takes a GPU of its own; give cuda, or set CUDA_VISIBLE_DEVICES"
    else:
        return text
    raise argparse.ArgumentTypeError(f"{text}: {fault}")


DEVICE = {
    "type": usable_device,
    "metavar": "DEVICE",
    "help": "cpu, cuda, cuda:1, or mps, which is untested (default: cuda where there is a GPU, else cpu)",
}
# Of flags that other programs have.
DEVICE_HINTS = dict.fromkeys(
    ("--gpu", "--gpus", "--num-gpus", "--devices"),
    "choose a GPU with --device cuda:1, use N of them by torchrun --nproc-per-node N",
)


def init_distributed(device: str | None = None) -> Ranks:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or run as a single one.

    `device` is a `usable_device`; by default this process's own GPU, or the CPU where there is none.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            fault = f"process {local} of this machine has no GPU"
            print(f"{fault}: give --nproc-per-node {gpus}", file=sys.stderr)
            sys.exit(2)
        device = torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(rank, world, device)


def cleanup() -> None:
    """Destroy the process group (collective); not after an error, or NCCL would wait for the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
