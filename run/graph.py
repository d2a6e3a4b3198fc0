"""train.py --cuda-graph: the GPU's work of one step is recorded once, then launched as a whole.

A step at sd15 is thousands of kernels, and a small batch keeps a GPU busy for less time than a CPU needs to
launch them one by one. A graph replays on the addresses that it was recorded with, so shapes never change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from errors import RunError
from run.step import Inputs, Work


class Recorded:
    """`update(inputs, flags)` of run/step.py: three times as it is, then by a CUDA graph of the fourth time.

    Inputs are copied to where the recorded call had its own. Results are overwritten by the next call.
    Raises RunError for other shapes than recorded.
    """

    WARM_UP = 3  # steps before: kernels are compiled and chosen, AdamW makes its state (torch's cuda.rst)

    def __init__(self, update: Work, optimizer: torch.optim.Optimizer):
        self.update, self.optimizer, self.steps = update, optimizer, 0

    def __call__(self, inputs: Sequence[Inputs], flags: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps <= self.WARM_UP:
            return self.warm_up(inputs, flags)
        if self.steps == self.WARM_UP + 1:
            self.inputs = named_tensors(inputs, flags)  # of this call: the next ones are copied here
            self.record(inputs, flags)
        self.load(named_tensors(inputs, flags))
        self.replay()
        return self.numbers

    def record(self, inputs: Sequence[Inputs], flags: Tensor) -> None:
        """Record the update without running it. It reads the learning rates from tensors."""
        groups = self.optimizer.param_groups
        self.rates = [torch.tensor(group["lr"], device=flags.device) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, capturable=True)  # the loop sets the next rate as a number again
        self.numbers = self.capture(inputs, flags)

    def load(self, inputs: dict[str, Tensor]) -> None:
        """Copy new inputs and the learning rates to where the graph reads them."""
        for name in self.inputs | inputs:
            old, new = (tuple(x[name].shape) if name in x else None for x in (self.inputs, inputs))
            if old != new:
                fault = f"--cuda-graph recorded {name} of the shape {old}, and step {self.steps} has {new}"
                raise RunError(f"{fault}: give all batches one shape, or leave --cuda-graph out")
            self.inputs[name].copy_(inputs[name], non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    # ---- what only a GPU does

    def warm_up(self, inputs: Sequence[Inputs], flags: Tensor) -> dict[str, Tensor]:
        """The update on a stream of its own, as it will be recorded."""
        if self.steps == 1:
            self.side = torch.cuda.Stream()  # one: each would cache memory of its own
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            numbers = self.update(inputs, flags)
        torch.cuda.current_stream().wait_stream(self.side)
        return numbers

    def capture(self, inputs: Sequence[Inputs], flags: Tensor) -> dict[str, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's pins memory meanwhile, which would end a "global" capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            numbers = self.update(inputs, flags)
        self.replay = graph.replay
        return numbers


def named_tensors(inputs: Sequence[Inputs], flags: Tensor) -> dict[str, Tensor]:
    """The tensors of run/step.py's `Inputs`, by names for a sentence."""
    found = {"flags": flags}
    for i, x in enumerate(inputs):
        named = {"image": x.image, "labels": x.labels} | (x.text._asdict() if x.text else {})
        found |= {f"{name} {i}": tensor for name, tensor in named.items() if tensor is not None}
    return found
