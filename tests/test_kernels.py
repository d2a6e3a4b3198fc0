"""kernels/__init__.py: the choice and its description; kernels/row_attention.py and kernels/linear.py."""

import subprocess
import sys

import pytest
import torch
from proof import ROOT, error, excess

import kernels
from kernels import reference
from kernels.linear import linear
from kernels.row_attention import ROWS, row_attention


@pytest.fixture(autouse=True)
def automatic():
    yield
    kernels.use("auto")


def test_importing_the_chooser_does_not_import_triton():
    """Which has wheels for Linux alone, and reads TRITON_INTERPRET when it is imported."""
    code = "import kernels, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_cpu_runs_plain_torch():
    assert kernels.describe("cpu") == "kernels: plain torch, as on every CPU"
    assert not kernels.chosen("cross_attention", torch.empty(1), 40)


def test_kernels_asked_for_by_name_are_described():
    kernels.use("triton")
    assert "triton, as asked" in kernels.describe("cpu")
    assert kernels.chosen("cross_attention", torch.empty(1), 40, worth=False)
    with pytest.raises(AssertionError, match="unknown kernels 'cuda': choose auto, torch or triton"):
        kernels.use("cuda")


def test_without_a_gpu_triton_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kernels.ModelError, match="torch finds no GPU; choose auto or torch"):
        kernels.use("triton")


def test_a_gpu_runs_a_kernel_where_the_table_lists_it(monkeypatch):
    """Checked without a GPU: the choice depends on a tensor's device and on torch's capability of it."""
    monkeypatch.setitem(kernels.WINS, ("cross_attention", (9, 0)), frozenset({40}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = type("OnGpu", (), {"is_cuda": True, "device": torch.device("cuda")})()
    assert kernels.chosen("cross_attention", on_gpu, 40)
    assert not kernels.chosen("cross_attention", on_gpu, 80)
    assert not kernels.chosen("cross_attention", on_gpu, 40, worth=False)
    assert kernels.describe("cuda") == "kernels: cross_attention at [40] on sm_90"
    kernels.use("torch")
    assert not kernels.chosen("cross_attention", on_gpu, 40)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    kernels.use("auto")
    assert "no kernel has won" in kernels.describe("cuda")


@pytest.mark.parametrize("N", [1, ROWS - 1, ROWS + 1, 2 * ROWS])
@pytest.mark.parametrize("M", [1, 77, kernels.MANY])
def test_attention_by_rows_is_nearly_as_exact_as_torchs(N, M):
    """In bfloat16, against float64: torch's fused attention rounds the weights, this one the scores too."""
    q, k, v = (torch.randn(2, length, 3, 80).bfloat16()[..., :40] for length in (N, M, M))
    exact = reference.attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        ours, theirs = row_attention(q, k, v), reference.attention(q, k, v)
        chosen = ours if M == kernels.MANY else theirs
        assert torch.equal(kernels.attention(q, k, v), chosen)
    assert error(ours.double(), exact) <= 2.25 * error(theirs.double(), exact)


def test_gradients_go_by_torchs_attention():
    q, k, v = (torch.randn(2, length, 3, 8, requires_grad=True) for length in (5, 7, 7))
    half = [x.bfloat16() for x in (q, k, v)]
    kernels.attention(*half).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_linear_layer_as_a_convolution(bias, threads, monkeypatch):
    """Values and gradients, against float64, as close as twice torch's own product; one thread takes that."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = [torch.randn(2, 9, 24), torch.randn(40, 24), *([torch.randn(40)] if bias else [])]
    assert max(excess(linear, torch.nn.functional.linear, inputs, torch.randn(2, 9, 40))) <= 2
    y = linear(*(x.requires_grad_() for x in inputs))
    assert y.grad_fn.name().startswith("Transpose") == (threads == 2)  # after a convolution
