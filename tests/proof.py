"""Helpers of the tests that need no reference model: bars and errors, memory filled with NaN, mistakes.

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
    """The gradients of a loss by all parameters and leaves that it depends on: by name, and as one vector."""
    names = dict(model.named_parameters()) | leaves
    values = torch.autograd.grad(loss, names.values(), allow_unused=True)
    named = {name: x for name, x in sorted(zip(names, values, strict=True)) if x is not None}
    return named, torch.cat([x.flatten() for x in named.values()])


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
    *,
    kernel_inputs: Sequence[Tensor] | None = None,
    floor: float = 0.0,
) -> list[float]:
    """The ratio of the kernel's error to that of plain torch, for the value and each gradient.

    Plain torch computes in the type of the first input; the kernel takes `kernel_inputs`, by default the
    inputs as they are. To torch's error are added `floor` and float32's last half bit: sums of a few numbers
    are that exact, and then it is chance which of two orders has the smaller error.
    """
    exact = results(plain, inputs, dy, torch.float64)
    same = results(plain, inputs, dy, inputs[0].dtype)
    ours = results(kernel, inputs if kernel_inputs is None else kernel_inputs, dy)
    ratios = []
    for x, y, z in zip(ours, same, exact, strict=True):
        assert x.shape == z.shape, f"{tuple(x.shape)} is not {tuple(z.shape)}"
        allowed = (y.double() - z).norm() + 2**-24 * z.norm() + floor
        ratios.append(((x.double() - z).norm() / allowed).nan_to_num(torch.inf).item())
    return ratios


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
    """The module of `file` with `right` replaced by `wrong` everywhere; its operators have their own names.

    The copy is a file, since Triton reads the source of a kernel; it belongs to the package of the original.
    """
    source = (ROOT / file).read_text()
    assert right in source, f"{file} no longer has {right!r}: plant the mistake where it now belongs"
    copy = folder / f"mistaken_{Path(file).name}"
    copy.write_text(source.replace(right, wrong).replace('"tada::', f'"{folder.name}::'))
    name = ".".join([*Path(file).parent.parts, f"{folder.name}_{copy.stem}"])
    spec = importlib.util.spec_from_file_location(name, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
