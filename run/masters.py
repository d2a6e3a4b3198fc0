"""Train the UNet in bfloat16 on a GPU: a copy computes, the float32 weights are updated.

    masters = Masters(tada)  # tada's UNet keeps the float32 weights, which checkpoints hold
    masters(image, tags)  # by the copy, whose gradients are bfloat16
    masters.take_gradients()
    optimizer.step()  # of tada's parameters
    masters.copy_weights()

Autocast would cast every weight in every step and compute norms in float32. The masters are needed: a step of
AdamW is about the learning rate, 6e-5, which most weights in bfloat16 (8 bits of precision) would round away.
"""

import copy

import torch
from torch import nn

from model import Output, Tada

SOME = 64  # of the 682 tensors that are trained


class Masters(nn.Module):
    """A model whose UNet computes in a bfloat16 copy, channels-last as GPUs run convolutions fastest."""

    def __init__(self, tada: Tada):
        super().__init__()
        self.tada = tada
        self.unet = copy.deepcopy(tada.unet).to(torch.bfloat16, memory_format=torch.channels_last)
        pairs = zip(tada.unet.parameters(), self.unet.parameters(), strict=True)
        self.pairs = [(master, half) for master, half in pairs if half.requires_grad]
        tada.unet.requires_grad_(False)  # DDP would wait for gradients that only the copy has
        maps = tada.config.attention_maps
        tada.run_unet = self.unet.features_and_attention if maps else self.unet.features

    def forward(self, *inputs: object) -> Output:
        return self.tada(*inputs)

    def take_gradients(self) -> None:
        """Move the gradients of the copy to the masters, some at a time: both sets together take 5 GB."""
        for i in range(0, len(self.pairs), SOME):
            masters, halves = zip(*self.pairs[i : i + SOME], strict=True)
            grads = [torch.empty_like(x) for x in masters]  # in their order in memory
            torch._foreach_copy_(grads, [half.grad for half in halves])
            for master, half, grad in zip(masters, halves, grads, strict=True):
                master.grad, half.grad = grad, None

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Round the updated masters into the copy."""
        masters, halves = zip(*self.pairs, strict=True)
        torch._foreach_copy_(halves, masters)
