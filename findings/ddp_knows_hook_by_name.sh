#!/bin/sh
# torch 2.13.0+cpu: DistributedDataParallel refuses the communication hook `bf16_compress_hook`, for want of
# NCCL, by the name of the function alone. The same hook called from a function of another name is taken, and averages
# gradients over gloo rightly: 0.5 + 1 over 2 processes is 0.75, rounded to bfloat16 on the way as it should.
# `fp16_compress_hook`, which has the same body but for the type, is taken under its own name.
# Who tests a training loop with bfloat16 gradients on CPUs should wrap the hook, as our run/ranks.py does.
#
# Output seen:
#   bf16_compress_hook: TypeError: BF16 all reduce communication hook required CUDA 11+ and NCCL 2.10+ or XPU and XCCL
#   the same, renamed: [0.75, 1.0078125]
#   fp16_compress_hook: [0.75, 1.0048828125]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0+cpu numpy==2.4.6 \
    --extra-index-url https://download.pytorch.org/whl/cpu
cat >"$folder/hooks.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def renamed(group, bucket):
    return bf16_compress_hook(group, bucket)


def gradients(hook) -> list[float]:
    """Of two weights, whose own gradients on ranks 0 and 1 are 0.5 and 1, 1.005 and 1.005."""
    model = torch.nn.Linear(2, 1, bias=False)
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, hook)
    parallel(torch.tensor([[0.5 + 0.5 * dist.get_rank(), 1.005]])).sum().backward()
    return model.weight.grad[0].tolist()


dist.init_process_group("gloo")
lines = []
for name, hook in {"bf16_compress_hook": bf16_compress_hook, "the same, renamed": renamed}.items():
    try:
        lines.append(f"{name}: {gradients(hook)}")
    except TypeError as error:
        lines.append(f"{name}: TypeError: {error}")
lines.append(f"fp16_compress_hook: {gradients(fp16_compress_hook)}")
if dist.get_rank() == 0:
    print(*lines, sep="\n")
    refused, taken, other = lines
    assert "TypeError: BF16 all reduce communication hook required" in refused, "it is taken now"
    assert taken.endswith("[0.75, 1.0078125]") and other.endswith("[0.75, 1.0048828125]")
dist.destroy_process_group()
PYTHON
"$folder/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node=2 "$folder/hooks.py" 2>/dev/null
