"""run/masters.py: the UNet in bfloat16 with float32 masters, here on the CPU, beside float32 and autocast of
float32 weights, the other way to train in bfloat16.
"""

import copy

import pytest
import torch
from proof import error
from test_train import HERE

import train
from assemble import build, parameter_groups
from data import open_dataset
from errors import RunError
from loading.augment import Augment, normalise
from loading.stream import TrainStream
from loading.tags import TagSource
from model import Tada, TadaConfig
from run.checkpoint import read_step, restore_training, training_state, write_step
from run.masters import Masters

pytestmark = pytest.mark.usefixtures("one_thread")
LR = 6e-5  # the paper's: below half a step of bfloat16 at weights above 0.03
SCENES = open_dataset("scenes", "", "train")
WORDS = TagSource("oracle", SCENES.prompts)


@pytest.fixture(scope="module")
def start() -> Tada:
    """weights/tiny with a new adapter and decoder."""
    torch.manual_seed(0)
    options = {"model": "tiny", "weights": "weights/tiny", "tags": "oracle", "dropout": 0.0}
    return build(TadaConfig(tuple(SCENES.classes), prompts=tuple(SCENES.prompts), **options))


@pytest.fixture
def tada(start) -> Tada:
    return copied(start)


def copied(tada: Tada) -> Tada:
    """A copy whose `run_unet` is its own."""
    new = copy.deepcopy(tada)
    new.run_unet = new.unet.features
    return new


def adamw(tada: Tada, lr: float = LR) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(tada, lr, weight_decay=0.01), fused=True)


def steps(
    tada: Tada, optimizer: torch.optim.Optimizer, numbers: range, masters: Masters | None
) -> list[float]:
    """The losses of some steps of two images of 64 x 128."""
    stream = TrainStream(SCENES, Augment((64, 128), 128, 512), batch=2, seed=0)
    batches = stream.batches(2 * numbers.start)
    how = {"words": WORDS, "ranks": HERE, "masters": masters}
    losses = [
        train.train_step(masters or tada, tada, optimizer, [next(batches)], **how)["loss"] for _ in numbers
    ]
    batches.close()
    return losses


def test_twenty_steps_have_the_losses_of_float32(start):
    """Within the rounding of bfloat16, from the first step to the last, while the loss falls."""
    plain, half = copied(start), copied(start)
    expected = steps(plain, adamw(plain, 1e-3), range(20), masters=None)
    optimizer, masters = adamw(half, 1e-3), Masters(half)
    losses = steps(half, optimizer, range(20), masters)
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_gradients_are_no_worse_than_autocasts(start):
    """Against float32: at most twice the error of autocast, for all weights of the UNet as one vector."""
    found = {}
    for way in ("float32", "autocast", "masters"):
        tada = copied(start)
        masters = Masters(tada) if way == "masters" else None
        batch = next(TrainStream(SCENES, Augment((64, 128), 128, 512), batch=2, seed=0).batches())
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "float32"):
            output = (masters or tada)(normalise(batch.image), train.words_of(batch, WORDS))
        sum(total for total, _ in tada.loss(output, batch.labels.long()).values()).backward()
        if masters:
            masters.take_gradients()
        grads = [p.grad for p in tada.unet.parameters() if p.grad is not None]
        found[way] = torch.cat([x.flatten() for x in grads])
    assert found["masters"].dtype == torch.float32
    errors = {way: error(found[way], found["float32"]) for way in found}
    assert 0 < errors["masters"] <= 2 * errors["autocast"]


def test_steps_below_the_resolution_of_bfloat16_add_up(tada):
    """Most weights do not move in bfloat16 in one step; the masters move, and the copy follows them."""
    optimizer, masters = adamw(tada), Masters(tada)
    name = "mid_block.resnets.0.conv1.weight"
    master, half = tada.unet.get_parameter(name), masters.unet.get_parameter(name)
    before = master.detach().clone(), half.detach().clone()
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=torch.channels_last)
    steps(tada, optimizer, range(1), masters)
    assert (master != before[0]).float().mean() > 0.99
    assert (half != before[1]).float().mean() < 0.5
    assert torch.equal(half, master.bfloat16())


def test_attention_maps_are_those_of_the_copy():
    """With VPD's maps a step updates all of the UNet that is trained, and the copy has it."""
    torch.manual_seed(0)
    options = {"model": "tiny", "weights": "weights/tiny", "condition": "none", "attention_maps": True}
    tada = build(TadaConfig(tuple(SCENES.classes), **options))
    trained = [name for name, p in tada.unet.named_parameters() if p.requires_grad]
    before = {name: tada.unet.get_parameter(name).detach().clone() for name in trained}
    optimizer, masters = adamw(tada), Masters(tada)
    steps(tada, optimizer, range(1), masters)
    assert not any(p.requires_grad for p in tada.unet.parameters())  # DDP would make buckets for them
    for name in trained:
        master = tada.unet.get_parameter(name)
        assert not torch.equal(master, before[name]), name
        assert torch.equal(masters.unet.get_parameter(name), master.bfloat16()), name


def test_channels_last_masters_take_the_same_steps(start):
    """As on a GPU: the order in memory of masters, gradients and moments changes no value."""
    plain, last = copied(start), copied(start)
    last.unet.to(memory_format=torch.channels_last)
    losses = [steps(x, adamw(x, 1e-3), range(4), Masters(x)) for x in (plain, last)]
    assert losses[0] == losses[1]
    for name, x in plain.state_dict().items():
        assert torch.equal(x, last.state_dict()[name]), name
    kinds = {
        x.is_contiguous(memory_format=torch.channels_last) for x in last.unet.parameters() if x.ndim == 4
    }
    assert kinds == {True}


def test_a_loss_that_is_not_finite_changes_nothing(tada):
    optimizer, masters = adamw(tada), Masters(tada)
    with torch.no_grad():
        tada.decoder.classifier[-1].bias[0] = float("inf")
    before = [p.detach().clone() for p in masters.parameters()]
    with pytest.raises(RunError, match="not finite"):
        steps(tada, optimizer, range(1), masters)
    assert all(torch.equal(p, q) for p, q in zip(masters.parameters(), before, strict=True))


def test_a_checkpoint_holds_the_masters(start, tmp_path):
    """Four steps, or two, a checkpoint and two more: the same float32 weights, to the bit."""
    whole = copied(start)
    steps(whole, adamw(whole), range(4), Masters(whole))
    first = copied(start)
    optimizer = adamw(first)
    steps(first, optimizer, range(2), Masters(first))
    state = training_state(optimizer, HERE)
    folder = write_step(tmp_path, 2, first, {}, {}, tensors=state, facts={})
    second = copied(start)
    second.unet.to(memory_format=torch.channels_last)  # as on a GPU; the file has no order in memory
    optimizer = adamw(second)
    tensors, _ = read_step(folder, second)
    restore_training(tensors, optimizer, HERE)
    steps(second, optimizer, range(2, 4), Masters(second))
    for name, x in whole.state_dict().items():
        assert x.dtype in (torch.float32, torch.int64) and torch.equal(x, second.state_dict()[name]), name
