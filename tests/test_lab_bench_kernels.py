"""bench_kernels.py, rehearsed without a GPU: small shapes in Triton's interpreter."""

import json

import pytest
import torch

from lab.bench_kernels import Case, Rates, Row, Sizes, check, measure, poisoned, suite, wins

CPU = torch.device("cpu")
RATES = Rates(copy=1e12, products=1e15)


def product(ours) -> Case:
    """A product of matrices, by ours and by torch."""
    return Case(
        "product",
        "product B 2",
        lambda: [torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)],
        ours,
        torch.matmul,
        {"torch": torch.matmul, "no backend": refuse},
        (2e6, 4e6),
        (1e9, 5e9),
        key=("product", 7),
    )


def refuse(a, b):
    raise RuntimeError("no kernel takes this shape")


def test_the_whole_suite_runs_and_is_right(tmp_path, capsys):
    """Every kernel, every kind of row; the last table and the file hold what was measured."""
    assert suite(Sizes.small(), tmp_path / "rows.json") == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said and "rehearsal" in said
    facts = json.loads((tmp_path / "rows.json").read_text())
    kinds = {row["case"].split(" B ")[0] for row in facts["rows"]}
    assert kinds == {
        "cross-attention",
        "GroupNorm + SiLU UNet",
        "GroupNorm + SiLU VAE",
        "keys and values of 3 layers,",
        "upsampling + cross-entropy",
        "upsampling + arg-max",
        "wide attention",
    }
    assert all(row["ours"] > 0 and row["peers"] for row in facts["rows"] if row["direction"] == "forward")


def test_a_row_has_floor_peers_and_both_directions():
    forward, backward = measure(product(lambda a, b: a @ b), RATES, CPU)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert forward.floor == pytest.approx(2.0) and backward.floor == pytest.approx(5.0)  # bytes; products
    assert set(forward.peers) == {"torch"}  # what refuses a shape is left out
    assert forward.right and backward.right and forward.ours > 0


@pytest.mark.parametrize("wrong", [lambda a, b: a @ b * 1.001, lambda a, b: a.detach() @ b + 0 * a.sum()])
def test_a_wrong_result_or_gradient_has_no_time(wrong):
    rows = measure(product(wrong), RATES, CPU)
    assert not all(row.right for row in rows)
    assert all(row.ours != row.ours and not row.peers for row in rows)  # NaN


def test_a_case_says_how_wrong_it_may_be():
    inexact = product(lambda a, b: a @ b * 1.001)
    inexact.slack = 1e9
    assert all(row.right for row in measure(inexact, RATES, CPU))


def test_a_result_that_changes_is_seen():
    noisy = iter([0.0, 1e-6] * 4)
    found = check(product(lambda a, b: a @ b * (1 + next(noisy))))
    assert not found[0][2]


def test_memory_is_poisoned():
    with poisoned():
        assert torch.empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_wins_are_the_sizes_that_never_lost():
    def row(size, ours, peer):
        return Row("x", "x", "forward", 0.0, 0.0, True, 1.0, ours, {"a": peer, "b": 9.0}, ("kernel", size))

    assert wins([row(40, 1, 2), row(40, 1, 3), row(80, 1, 2), row(80, 3, 2)]) == {"kernel": [40]}
