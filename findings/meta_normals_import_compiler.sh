#!/bin/sh
# torch 2.13.0: to draw normal numbers on the meta device, where nothing is drawn, torch imports its compiler.
# torch.empty() and uniform_() on meta are C++ and import nothing. torch.randn() is written in Python there and
# imports sympy on its way; nn.Embedding(), whose initialisation is normal_(), imports torch._dynamo: some 900
# modules and a second or more. So building a model on meta, which is meant to be quick because it skips
# initialisation, is slow for the first embedding alone; models of linear layers and convolutions, whose weights
# are uniform, are not. Who builds on meta to load a file should skip normal initialisation as well.
#
# Output seen (the numbers of modules vary a little with what is installed):
#   linear, convolution, norms: 1 new modules, torch._dynamo not imported
#   randn: 487 new modules, sympy imported
#   embedding: 335 new modules, torch._dynamo imported
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn


def new_modules(make) -> int:
    before = set(sys.modules)
    with torch.device("meta"):
        make()
    return len(set(sys.modules) - before)


def status(module: str) -> str:
    return f"{module} {'imported' if module in sys.modules else 'not imported'}"


few = new_modules(lambda: (nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3)))
print(f"linear, convolution, norms: {few} new modules, {status('torch._dynamo')}")
assert few < 20 and "torch._dynamo" not in sys.modules and "sympy" not in sys.modules, "this has changed"
many = new_modules(lambda: torch.randn(3))
print(f"randn: {many} new modules, {status('sympy')}")
assert many > 100 and "sympy" in sys.modules, "this has changed"
more = new_modules(lambda: nn.Embedding(3, 4))
print(f"embedding: {more} new modules, {status('torch._dynamo')}")
assert more > 100 and "torch._dynamo" in sys.modules, "this has changed"
PYTHON
