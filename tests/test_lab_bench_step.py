"""bench_step.py compares equal steps, times no wrong result, and splits a step into its phases."""

from functools import partial

import pytest
from oracle import SMALL_CLIP, SMALL_UNET, SMALL_VAE, reference_clip, reference_unet, reference_vae

from clip import CLIP
from decoders import SemanticFPN
from lab import bench_peers, bench_step
from unet import UNet
from vae import VAE

UNET = SMALL_UNET.__class__(**vars(SMALL_UNET) | {"context_width": SMALL_CLIP.text.width})


WORK = bench_step.Work(
    64,
    peers=(
        partial(reference_vae, SMALL_VAE),
        partial(reference_unet, UNET),
        partial(reference_clip, SMALL_CLIP),
    ),
    kinds=(partial(VAE, SMALL_VAE), partial(UNet, UNET), partial(CLIP, SMALL_CLIP)),
    decoder=partial(SemanticFPN, UNET.channels, width=32, groups=8),
)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """All in this process."""
    monkeypatch.setattr(bench_step, "keep_freed_memory", lambda: None)  # it would last for all tests
    monkeypatch.setattr(bench_peers, "apart", lambda function, *arguments: function(*arguments))


def first_step(build) -> tuple:
    """Loss, norm, the norms of all trained parameters' gradients, and how many weights are trained."""
    model, optimizer, step = build(WORK)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.norm().item() for p in trained))
    result = step(bench_step.batch_of(64))
    return *result, sorted(gradients), sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_both_sides_train_the_same_weights_with_the_same_gradients():
    loss, norm, gradients, weights = first_step(bench_step.ours)
    their_loss, their_norm, theirs, their_weights = first_step(bench_step.peer)
    assert weights == their_weights
    assert loss == pytest.approx(their_loss, rel=1e-5) and norm == pytest.approx(their_norm, rel=1e-5)
    assert gradients == pytest.approx(theirs, rel=1e-3, abs=1e-5 * norm)


def test_a_row_has_times_memory_and_phases(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "Work", lambda: WORK)
    assert bench_step.main() == 0
    text = capsys.readouterr().out
    assert "| training step, sd15 | 64 | float32 |" in text
    assert all(f"\n| {phase} |" in text for phase in bench_step.PHASES)


def test_a_wrong_result_is_not_timed(monkeypatch):
    """The peer's image is mirrored."""
    normalise = bench_step.normalise
    monkeypatch.setattr(bench_step, "normalise", lambda image: normalise(image).flip(3))
    row = bench_step.compare(WORK, steps=1, rounds=2)
    assert row["verdict"] == "FAIL" and "ratio" not in row
