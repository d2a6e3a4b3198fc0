"""bench_kernels.py without a GPU, timed by the CPU's clock; its cases run in test_lab_bench_gpu.py."""

import time
from dataclasses import replace

import pytest
import torch
from oracle import SMALL_UNET

from lab.bench_kernels import Case, Sizes, check, measure, nan_memory, projection_cases

RATES = {"copy": 1e12, "products": 1e15}
SMALL = Sizes(
    device="cpu",
    dtype=torch.float32,  # the interpreter computes bfloat16 wrongly
    batches=(2,),
    levels=((40, 8),),
    contexts=(5,),
    heads=2,
    backends=("FLASH_ATTENTION",),
    context=5,
    unet=SMALL_UNET,
    projected=(2, 1),
    unet_maps=((2, 16, 4),),
    block_maps=((2, 16, 4),),
    vae_maps=((1, 16, 8),),
    groups=8,
    logits=(1, 5, 3, 4),
    wide=(1, 20, 24),
    compiled=False,
)


def cpu_clock(work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def refuse(a, b):
    raise RuntimeError("no kernel for this shape\nmore")


def exhaust(a, b):
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


def product(ours) -> Case:
    """A product of matrices, by ours and by torch."""
    return Case(
        "product",
        lambda: [torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)],
        ours,
        torch.matmul,
        {"torch": torch.matmul, "unsupported": refuse, "large": exhaust},
        ("product", 7),
        (2e6, 4e6),
        (1e9, 5e9),
    )


def test_a_row_has_floor_peers_and_both_directions():
    row = measure(product(lambda a, b: a @ b), RATES, cpu_clock)
    assert row["floor"] == pytest.approx([2.0, 5.0])  # bytes; products
    assert row["right"] and all(us > 0 for us in row["ours"]["triton"]) and len(row["ours"]["triton"]) == 2


def test_a_peer_that_fails_is_shown_with_its_error():
    row = measure(product(lambda a, b: a @ b), RATES, cpu_clock)
    assert row["peers"].keys() == {"torch"}
    assert row["failed"] == {
        "unsupported": "RuntimeError: no kernel for this shape",
        "large": "out of memory",
    }


def test_our_own_failure_stops_the_suite():
    passed = iter([True] * 2)  # both runs of the check
    with pytest.raises(torch.OutOfMemoryError):
        measure(product(lambda a, b: a @ b if next(passed, False) else exhaust(a, b)), RATES, cpu_clock)


@pytest.mark.parametrize(
    "wrong",
    [lambda a, b: a @ b * 1.001, lambda a, b: a.detach() @ b + 0 * a.sum(), lambda a, b: a @ b * torch.nan],
)
def test_a_wrong_result_or_gradient_has_no_time(wrong):
    row = measure(product(wrong), RATES, cpu_clock)
    assert not row["right"] and not row.keys() & {"ours", "peers"}


def test_a_case_sets_its_largest_error():
    inexact = replace(product(lambda a, b: a @ b * 1.001), slack=1e9)
    assert measure(inexact, RATES, cpu_clock)["right"]


def test_a_result_that_changes_is_noticed():
    noise = iter([0.0, 1e-6] * 4)
    row = check(product(lambda a, b: a @ b * (1 + next(noise))))
    assert not row["right"] and row["note"] == "a second run differs"


def test_new_memory_is_nan():
    with nan_memory():
        assert torch.empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_keys_and_values_are_in_the_order_of_execution():
    """Distinct weights, so that a wrong order is a wrong result."""
    case = next(projection_cases(SMALL))
    inputs = case.inputs()
    mine, theirs = case.ours(*inputs), case.plain(*inputs)
    assert len(mine) == len(theirs) == len(inputs) - 1 == 32
    assert all(
        x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(mine, theirs, strict=True)
    )
