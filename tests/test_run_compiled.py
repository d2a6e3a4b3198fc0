"""run/compiled.py: the compiled blocks have the values and gradients of plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import shake
from proof import BAR, error
from test_unet import inputs
from torch import nn

from run.compiled import compile_blocks
from unet import UNet, UNetConfig

ROOT = Path(__file__).parents[1]
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


@pytest.mark.sweep
def test_validation_adds_no_graph(tmp_path):
    """Its sizes and its lack of gradients would exceed the compiler's limit of 8 graphs of a function, from
    which on training runs eagerly too. Here are 7: three widths in several orders in memory.
    """
    flags = "--compile --weights weights/tiny --crop 64 --batch 2 --iterations 3 --eval-every 1 --workers 0"
    run = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--run", str(tmp_path / "run")]
    logs = os.environ | {"TORCH_LOGS": "recompiles"}
    ended = subprocess.run(run, check=False, cwd=ROOT, capture_output=True, text=True, env=logs)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert 2 <= ended.stderr.count("Recompiling function forward") <= 6
    assert "config.recompile_limit" not in ended.stderr
