"""run/compiled.py: the compiled blocks have the values and gradients of plain torch."""

import pytest
from oracle import shake
from proof import BAR, error
from test_unet import inputs
from torch import nn

from run.compiled import compile_blocks
from unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(32, 64), layers=1, heads=4, context_width=48, groups=8)


@pytest.mark.sweep
def test_compiled_blocks_have_the_same_gradients():
    """All weights, the latent and the context, by Inductor; the maps are those of two images, not square."""
    unet, decoder = shake(UNet(SMALL)), nn.Conv2d(32, 3, 1)
    latent, t, context = inputs(SMALL)
    results = []
    for compile in (False, True):
        if compile:
            compile_blocks(unet, decoder)
        unet.zero_grad()
        leaves = [latent.clone().requires_grad_(), context.clone().requires_grad_()]
        maps = unet.features(leaves[0], t, leaves[1])
        (sum(x.square().mean() for x in maps) + decoder(maps[0]).mean()).backward()
        gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
        results.append((maps, gradients | dict(enumerate(x.grad for x in leaves))))
    (maps, gradients), (other_maps, others) = results
    for x, other in zip(maps, other_maps, strict=True):
        assert error(other, x) <= BAR
    assert len(gradients) > 100 and all(x.abs().max() > 0 for x in others.values())
    for name, x in gradients.items():
        assert error(others[name], x) <= 10 * BAR, name
