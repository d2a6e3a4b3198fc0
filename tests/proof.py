"""What the tests share that needs no reference model: bars and errors, memory that begins as NaN, mistakes.

A kernel's bar: against float64, its error is at most twice that of plain torch in the kernel's own precision.
"""

import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
BAR = 1e-5  # relative RMS error in float32: two orders of the same sums stay below, a wrong detail does not


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative RMS error, in float64; NaN is infinite."""
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} is not {tuple(exact.shape)}"
    ours, exact = ours.detach().double(), exact.detach().double()
    size = ((ours - exact).norm() / exact.norm()).item()
    return float("inf") if math.isnan(size) else size


def gradients(loss: Tensor, model: nn.Module, **leaves: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Of a loss, by every parameter and leaf that it depends on: by name, and all in one vector."""
    names = dict(model.named_parameters()) | leaves
    found = torch.autograd.grad(loss, names.values(), allow_unused=True)
    found = {name: x for name, x in sorted(zip(names, found, strict=True)) if x is not None}
    return found, torch.cat([x.flatten() for x in found.values()])


def results(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The function's value, and its gradients by every input for dy; all in `dtype`, if one is given."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def excess(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dy: Tensor,
    dtype: torch.dtype | None = None,
) -> list[float]:
    """How many times the error of plain torch the kernel's is, for the value and each gradient.

    Plain torch computes in `dtype`, by default that of the first input; the kernel takes inputs as they are.
    To torch's error comes float32's last half bit: sums of a few numbers are that exact, and then which of
    two orders is the luckier is chance.
    """
    exact = results(plain, inputs, dy, torch.float64)
    same = results(plain, inputs, dy, dtype or inputs[0].dtype)
    ours = results(kernel, inputs, dy)
    return [error(x, z) / (error(y, z) + 2**-24) for x, y, z in zip(ours, same, exact, strict=True)]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN until it is written, where its type has one, else the smallest number."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args, **kwargs) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.dtype == torch.bool:  # the compiler's own
                return x
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


def planted(folder: Path, file: str, right: str, wrong: str) -> types.ModuleType:
    """The kernel's module with `right` replaced by `wrong` wherever it stands; its operators are its own."""
    source = (ROOT / "kernels" / file).read_text()
    assert right in source, f"{file} no longer says {right!r}: plant the mistake where it now belongs"
    copy = folder / f"mistaken_{file}"
    copy.write_text(source.replace(right, wrong).replace('"tada::', f'"{folder.name}::'))
    spec = importlib.util.spec_from_file_location(f"kernels.{folder.name}_{copy.stem}", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
