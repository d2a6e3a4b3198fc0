#!/bin/sh
# torch 2.13.0: on a CPU the fused optimisers pair parameters, gradients and moments by their order in memory,
# not by their place in the tensor, and do not check that the orders agree, as they do on a GPU ("must have same
# dtype, device, and layout", github.com/pytorch/pytorch/issues/110758). Where they differ, each element is
# updated with another one's gradient or moments, without an error or a warning. The loop and foreach=True
# compute the same input rightly.
# It happens on a channels-last model to which (a) a state is given whose moments are contiguous, as files that
# keep no strides return them (safetensors, numpy), or (b) a gradient that was set by hand. Optimizer's
# load_state_dict keeps the strides of the file. A checkpoint of torch.save keeps them, and hides it.
# Who resumes fused optimisers should copy moments into empty_like(parameter), as our run/checkpoint.py does.
#
# Output seen, the largest difference of a weight from the plain loop's after two steps with lr=0.1:
#   AdamW  channels-last 3e-08  contiguous moments 0.16  contiguous gradient 0.16
#   Adam   channels-last 3e-08  contiguous moments 0.16  contiguous gradient 0.16
#   SGD    channels-last 0  contiguous moments 0.45  contiguous gradient 0.53
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch import Tensor, nn, optim


def weight(kind, how: dict, case: str) -> Tensor:
    """The weight of a channels-last convolution after two steps."""
    torch.manual_seed(0)
    w = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last).weight
    more = {"momentum": 0.9} if kind is optim.SGD else {}
    optimizer, gradients = kind([w], lr=0.1, **how, **more), torch.randn(2, 8, 4, 3, 3)
    w.grad = torch.empty_like(w).copy_(gradients[0])
    optimizer.step()
    if case == "contiguous moments":
        state = optimizer.state_dict()
        for moments in state["state"].values():
            moments |= {name: x.contiguous() for name, x in moments.items()}
        optimizer.load_state_dict(state)
    by_hand = case == "contiguous gradient"
    w.grad = gradients[1].clone() if by_hand else torch.empty_like(w).copy_(gradients[1])
    optimizer.step()
    return w.detach().contiguous()


for kind in (optim.AdamW, optim.Adam, optim.SGD):
    found = []
    for case in ("channels-last", "contiguous moments", "contiguous gradient"):
        expected = weight(kind, {"foreach": False}, "channels-last")
        assert torch.allclose(weight(kind, {"foreach": False}, case), expected), "the loop is wrong too"
        assert torch.allclose(weight(kind, {"foreach": True}, case), expected), "foreach is wrong too"
        difference = float((weight(kind, {"fused": True}, case) - expected).abs().max())
        found.append(f"{case} {difference:.1g}" if difference < 1e-6 else f"{case} {difference:.2f}")
        assert (difference > 0.05) == (case != "channels-last"), f"it changed: {kind.__name__} {found}"
    print(f"{kind.__name__:6}", "  ".join(found))
PYTHON
