#!/bin/sh
# transformers 5.23.0: the tensors of a SwinModel have other names in its state_dict() than in the file that its
# own save_pretrained() writes. In memory: encoder.layers.0.blocks.0.attention.q_proj.weight. On the disk, as in
# transformers 4: encoder.layers.0.blocks.0.attention.self.query.weight. So the model's own file cannot be loaded
# by load_state_dict(load_file(...)), strict or not: without "strict" it leaves every attention at its random
# initialisation and only lists the names. from_pretrained() renames while it loads, and is right.
# Who compares or converts weights by name must choose one side: we read the file.
#
# Output seen:
#   in memory alone: 52 of 77 names, such as encoder.layers.0.blocks.0.attention.k_proj.bias
#   on disk alone: 52 of 77 names, such as encoder.layers.0.blocks.0.attention.output.dense.bias
#   load_state_dict of its own file: 52 missing, 52 unexpected
#   from_pretrained: equal
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch
from safetensors.torch import load_file
from transformers import SwinConfig, SwinModel

config = SwinConfig(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
model = SwinModel(config).eval()
model.save_pretrained("saved")
memory, disk = set(model.state_dict()), set(load_file("saved/model.safetensors"))
print(f"in memory alone: {len(memory - disk)} of {len(memory)} names, such as {min(memory - disk)}")
print(f"on disk alone: {len(disk - memory)} of {len(disk)} names, such as {min(disk - memory)}")
missing, unexpected = SwinModel(config).load_state_dict(load_file("saved/model.safetensors"), strict=False)
print(f"load_state_dict of its own file: {len(missing)} missing, {len(unexpected)} unexpected")
again, image = SwinModel.from_pretrained("saved").eval(), torch.rand(2, 3, 32, 32)
with torch.no_grad():
    equal = torch.equal(model(image).last_hidden_state, again(image).last_hidden_state)
print(f"from_pretrained: {'equal' if equal else 'different'}")
assert memory - disk and disk - memory and missing and unexpected and equal, "this has changed"
assert any(".q_proj." in name for name in memory) and any(".self.query." in name for name in disk)
PYTHON
