"""lab/memory.py: what a training step's memory is made of, against counts by other means."""

import pytest
import torch
from torch import nn

import kernels
from assemble import Undrawn, part_configs
from clip import CLIP
from lab import memory
from lab.memory import GIB, AsOnGpu, Live, Memory, compute, largest, make, step
from ram import RAM
from unet import UNet
from vae import VAE

SIDE = 64


@pytest.fixture(autouse=True)
def plain_torch():
    kernels.use("torch")
    yield
    kernels.use("auto")


def test_live_counts_storages_until_they_are_freed():
    with Live() as live:
        x = torch.zeros(1000)
        view = x[10:].view(-1)
        y = x + 1
        assert live.bytes == 8000
        del x
        assert live.bytes == 8000, "the view still has the storage"
        del view, y
    assert (live.bytes, live.peak) == (0, 8000)


def on_cpu(hooks, **how) -> Memory:
    """A step with numbers, on the CPU."""
    with Live() as live, AsOnGpu():
        model = make("tiny", "fpn", **how)
        with hooks(model):
            return step(model, live, batch=2, side=SIDE)


@pytest.mark.parametrize("how", [{}, {"lora": 4, "checkpoint": True}])
def test_fake_tensors_need_what_real_ones_do(how):
    real = on_cpu(lambda model: torch.enable_grad(), **how)
    assert compute(2, model="tiny", side=SIDE, **how) == [real]


def test_what_is_kept_is_what_autograd_saves():
    """torch's own hooks name every tensor that autograd saves; besides, the image and the logits live."""
    saved: dict[int, int] = {}

    def hooks(model: nn.Module):
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

        def pack(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    kept = on_cpu(hooks).kept
    image, logits = 2 * 3 * SIDE**2 * 4, 2 * memory.CLASSES * (SIDE // 4) ** 2 * 2
    assert 0 <= kept - sum(saved.values()) <= image + logits + 4096


@pytest.fixture(scope="module")
def sd15() -> dict[str, Memory]:
    """One image at a time at full size, by option."""
    kernels.use("torch")
    options = {name: how for name, how in memory.OPTIONS.items() if "checkpoint" not in how}
    return {name: compute(1, **how)[0] for name, how in options.items()}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", "--freeze-unet"])
def test_weights_and_moments_are_parameters_times_bytes(sd15, option):
    vae, unet, clip = part_configs("sd15", "random")
    with torch.device("meta"), Undrawn():
        vae, unet, clip, ram = VAE(vae), UNet(unet), CLIP(clip), RAM()
        tada = make("sd15", "fpn", freeze_unet=True)

    def numbers(*parts: nn.Module) -> int:
        return sum(x.numel() for part in parts for x in part.parameters())

    new, seeing = numbers(tada.adapter, tada.decoder), numbers(clip.vision_model, clip.visual_projection)
    half = numbers(vae) - numbers(vae.decoder) + seeing
    whole = numbers(clip, ram) - numbers(clip.text_model) - seeing + new  # the words have vectors
    expected = 2 * half + 4 * whole + (2 if option else 4 + 2) * numbers(unet)
    expected += sum(x.numel() * x.element_size() for x in tada.buffers())
    trained = new + (0 if option else numbers(unet) - numbers(unet.conv_norm_out, unet.conv_out))
    assert sd15[option].weights == pytest.approx(expected, abs=1e4)
    assert sd15[option].moments == pytest.approx(8 * trained, abs=1e4)  # and a count of steps
    assert sd15[option].gradients == pytest.approx(4 * trained, abs=1e4)


@pytest.mark.slow
@pytest.mark.parametrize(("card", "option"), [(24, ""), (12, "--lora 16"), (8, "--freeze-unet")])
def test_a_card_holds_one_image_at_a_time(sd15, card, option):
    assert max(sd15[option].passes, sd15[option].update) < card * 10**9 - memory.SPARE


def test_the_largest_batch_lies_between_those_computed():
    """The peak is GIB x (5, 12, 28) at batches 1, 8, 16: by 1, then by 2 an image; the update takes 6."""
    sizes = [Memory(0, 0, 0, 0, 0, passes * GIB, 6 * GIB) for passes in (5, 12, 28)]
    cards = {gib: largest(int((gib + 1) * GIB / 10**9) + 1, *sizes) for gib in (4, 5, 9, 12, 20, 40)}
    assert cards == {4: 0, 5: 0, 9: 5, 12: 8, 20: 12, 40: 22}
