"""run/memory.py: a step finds the memory that the last one freed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """if True:
    import resource, sys
    import torch
    from run.memory import keep_freed_memory
    if sys.argv[1] == "keep":
        keep_freed_memory()
    faults = []
    for _ in range(6):  # 128 MiB: 32,768 pages
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        gradients = [torch.ones(2**20) for _ in range(16)], torch.ones(2**24)
        del gradients
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(faults[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_not_mapped_again():
    """The pages touched for the first time in the sixth step, in a process of its own."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 500
    assert faults("return") > 10_000
