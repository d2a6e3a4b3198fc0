"""train.py --compile: torch.compile of the parts that are trained, block by block."""

from torch import nn

from unet import TransformerBlock, UNet

# This pass of torch 2.13's compiler may read a sum before it is computed: all maps then have the gradient 0.
OPTIONS = {"reorder_for_peak_memory": False}


def compile_blocks(unet: UNet, decoder: nn.Module) -> None:
    """Compile in place: 16 blocks of three widths take a fraction of the time of the whole UNet's graph."""
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            block.compile(options=OPTIONS)
    decoder.compile(options=OPTIONS)
