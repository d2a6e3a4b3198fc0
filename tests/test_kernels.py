"""kernels/__init__.py: the choice and its description; kernels/row_attention.py and kernels/linear.py."""

import subprocess
import sys

import pytest
import torch
from proof import ROOT, error, excess

import kernels
from kernels import reference
from kernels.linear import as_convolution, linear
from kernels.row_attention import ROWS, row_attention
from vae import VAE, VAEConfig


@pytest.fixture(autouse=True)
def automatic():
    yield
    kernels.use("auto")


def test_importing_the_chooser_does_not_import_triton():
    """Which has wheels for Linux alone, and reads TRITON_INTERPRET when it is imported."""
    code = "import kernels, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_cpu_runs_torchs_own(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_class", lambda: "amx")
    assert kernels.describe("cpu") == "kernels: torch's own, as fastest on amx"
    assert not kernels.chosen("cross_attention", torch.empty(1), 40)
    monkeypatch.setattr(kernels, "cpu_class", lambda: "arm")
    assert kernels.describe("cpu") == "kernels: torch's own, not measured on arm"


@pytest.mark.parametrize(
    ("able", "name"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx2": True}, "amx"),
        ({"avx512_bf16": True, "avx2": True, "amx_bf16": False}, "avx512_bf16"),
        ({"avx2": True}, "avx2"),
        ({}, "other"),
        ({"architecture": "aarch64"}, "arm"),
    ],
)
def test_the_class_of_a_cpu_is_that_of_its_best_matrix_instructions(able, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | able)
    assert kernels.cpu_class.__wrapped__() == name
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # where torch was built without cpuinfo
    assert kernels.cpu_class.__wrapped__() == "other"


def test_a_cpu_computes_as_the_table_says_of_its_class(monkeypatch):
    """One that nobody measured, and one told to use torch, run plain torch."""
    x = torch.empty(1)
    monkeypatch.setitem(kernels.WINS, ("row_attention", "amx"), frozenset({40}))
    monkeypatch.setattr(kernels, "cpu_class", lambda: "amx")
    assert kernels.won("row_attention", x, 40) and not kernels.won("row_attention", x, 80)
    kernels.use("torch")
    assert not kernels.won("row_attention", x, 40)
    kernels.use("auto")
    monkeypatch.setattr(kernels, "cpu_class", lambda: "other")
    assert not kernels.won("row_attention", x, 40)


def test_weights_are_laid_out_as_the_table_says(monkeypatch):
    """With equal results to rounding, of the maps too."""
    monkeypatch.setitem(kernels.WINS, ("channels_last", "amx"), frozenset({"VAE float32"}))
    monkeypatch.setattr(kernels, "cpu_class", lambda: "amx")
    torch.manual_seed(0)
    vae, image = VAE(VAEConfig.tiny()).requires_grad_(False), torch.rand(2, 3, 16, 24)
    expected = vae.encode(image)
    assert kernels.arrange(vae) is vae
    assert vae.encoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert not vae.encoder.conv_out.weight.is_contiguous()
    torch.testing.assert_close(vae.encode(image), expected)


def test_kernels_asked_for_by_name_are_described():
    kernels.use("triton")
    assert "triton, as asked" in kernels.describe("cpu")
    assert kernels.chosen("cross_attention", torch.empty(1), 40, worth=False)
    with pytest.raises(AssertionError, match="unknown kernels 'cuda': choose auto, torch or triton"):
        kernels.use("cuda")


def test_without_a_gpu_triton_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for gpu, device in ((False, "cuda"), (True, "cpu")):  # none there; --device cpu
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(kernels.ModelError, match="no GPU is used here; choose auto or torch"):
            kernels.use("triton", device)


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
        chosen = ours if M == kernels.MANY and kernels.won("row_attention", q, 40) else theirs
        assert torch.equal(kernels.attention(q, k, v), chosen)
    assert error(ours.double(), exact) <= 2.25 * error(theirs.double(), exact)


def test_gradients_go_by_torchs_attention():
    q, k, v = (torch.randn(2, length, 3, 8, requires_grad=True) for length in (5, 7, 7))
    half = [x.bfloat16() for x in (q, k, v)]
    kernels.attention(*half).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_as_a_convolution(bias):
    """Values and gradients, against float64, as close as twice torch's own product."""
    inputs = [torch.randn(2, 9, 24), torch.randn(40, 24), *([torch.randn(40)] if bias else [])]
    assert max(excess(as_convolution, torch.nn.functional.linear, inputs, torch.randn(2, 9, 40))) <= 2


@pytest.mark.parametrize(
    ("threads", "grad", "measured", "convolution"),
    [(2, False, True, True), (1, False, True, False), (2, True, True, False), (2, False, False, False)],
)
def test_a_convolution_is_chosen_without_gradients_where_it_won(
    threads, grad, measured, convolution, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "cpu_class", lambda: "avx512_bf16" if measured else "other")
    calls = []
    monkeypatch.setattr("kernels.linear.as_convolution", lambda x, *rest: calls.append(x) or x)
    with torch.set_grad_enabled(grad):
        linear(torch.randn(2, 9, 24), torch.randn(40, 24))
    assert bool(calls) == convolution
