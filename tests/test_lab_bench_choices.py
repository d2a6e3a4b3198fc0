"""lab/bench_choices.py: ratios of two ways, and the entries of `kernels.WINS` that they make."""

import time

import pytest
import torch

from lab import bench_choices


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_ratio_is_of_ours_to_plain():
    assert bench_choices.ratio(lambda: work(0.02), lambda: work(0.01)) == pytest.approx(2, rel=0.3)


def test_each_way_is_measured(monkeypatch):
    """Small sizes; both sides of a linear layer have the same result, gradients included."""
    monkeypatch.setattr(bench_choices, "PRODUCTS", ((9, 8, 16),))
    monkeypatch.setattr(bench_choices, "HEADS", {8: (32, 2)})
    monkeypatch.setattr(bench_choices, "ROUNDS", 1)
    assert bench_choices.attention_ratio(8) > 0
    assert bench_choices.linear_ratio(gradients=False) > 0
    assert bench_choices.linear_ratio(gradients=True) > 0
    assert torch.is_grad_enabled()


def test_what_won_becomes_an_entry(monkeypatch, capsys):
    ratios = {40: 0.5, 80: 0.98, 512: 0.9}
    monkeypatch.setattr(bench_choices, "attention_ratio", ratios.get)
    monkeypatch.setattr(bench_choices, "linear_ratio", lambda gradients: 1.5 if gradients else 0.97)
    monkeypatch.setattr(bench_choices, "format_ratio", lambda kind, dtype: 1.0)
    monkeypatch.setattr(bench_choices, "cpu_class", lambda: "avx2")
    assert bench_choices.suite() == 0
    out = capsys.readouterr().out
    entries = {line.partition(":")[0].strip(): line for line in out.splitlines() if line.startswith("    (")}
    assert {40, 512} == eval(entries["('row_attention', 'avx2')"].partition(":")[2].strip(" ,"))
    assert {"forward"} == eval(entries["('linear_as_convolution', 'avx2')"].partition(":")[2].strip(" ,"))
    assert frozenset() == eval(entries["('channels_last', 'avx2')"].partition(":")[2].strip(" ,"))
