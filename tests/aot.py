"""What the compiler makes of the kernels on GPUs that are not here: registers, spills, memory, instructions.

A kernel that compiles proves little: it may spill, need more memory than there is, or leave the tensor cores
idle. `compiled(calls)` runs `calls` in a process of its own, without Triton's interpreter and with a
driver that only names the GPU to compile for; `calls` calls the public functions on tensors of the meta
device. So what is compiled is what a user's call would launch: the same table of block sizes, and arguments
specialised (a stride that 16 divides, say) by the same code of Triton. Nothing runs.

    python tests/aot.py test_kernels_aot_cross_attention:on_hopper 90      prints a table of its calls
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# CUDA C++ Programming Guide, technical specifications per compute capability: shared memory per block, in
# bytes; each block also pays 1 KiB to the system.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns per multiprocessor of capability 10.0


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one GPU; counts are of instructions in its text, not in its run."""

    call: str  # which of `calls` launched it first
    kernel: str
    capability: int
    warps: int
    registers: int
    spills: int  # to and from local memory
    shared: int  # bytes
    tensor_memory: int  # columns
    hgmma: int  # matrix instructions of four warps (Hopper)
    hmma: int  # matrix instructions of one warp (Ampere)
    wide: int  # global loads, stores and copies of 16 bytes
    traps: int  # a stub that only stops is what the compiler makes of a kernel that does not fit

    @property
    def fits(self) -> bool:
        within = self.shared <= SHARED[self.capability] and self.tensor_memory <= TENSOR_MEMORY
        return within and not self.traps


def compiled(calls: Callable[[], dict[str, Callable]], capabilities: tuple[int, ...]) -> list[Compiled]:
    """Every kernel that `calls`, a function of a test file, launches, once per GPU: 80, 90, 100 are sm_80...

    `calls()` returns a name for each call; it must not need pytest. A kernel launched twice is listed once.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    target = f"{calls.__module__}:{calls.__name__}"
    command = [sys.executable, __file__, target, "--json", *map(str, capabilities)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [Compiled(**x) for x in json.loads(result.stdout)]


def compile_here(calls: dict[str, Callable], capabilities: tuple[int, ...]) -> list[Compiled]:
    """`compiled`, in the process made for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        """The part of a GPU's driver that the compiler calls."""

        def __init__(self, capability: int):
            self.capability = capability

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:  # kernels are kept per device
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

    seen: dict[tuple[int, str], Compiled] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        key = (capability, kernel.hash)
        if key not in seen:
            seen[key] = read(name, capability, kernel)
        return kernel

    JITFunction.run = compile_only
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        for name, call in calls.items():
            call()
    return list(seen.values())


def read(call: str, capability: int, kernel) -> Compiled:
    """The facts of one compiled kernel, from the compiler's metadata and the machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (  # nvdisasm warns about every file
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    wide = r"\b(?:(?:LDG|STG)\.E\.(?:[A-Z_]+\.)*128|LDGSTS\.(?:\w+\.)*128|UTMALDG|UTMASTG)"
    return Compiled(
        call=call,
        kernel=kernel.name,
        capability=capability,
        warps=kernel.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
        hmma=len(re.findall(r"\bHMMA\b", code)),
        wide=len(re.findall(wide, code)),
        traps=len(re.findall(r"^\s*trap;", kernel.asm["ptx"], re.MULTILINE)),
    )


def main() -> None:
    target, *options = sys.argv[1:]
    sys.path.insert(0, str(ROOT))  # as pytest does
    module, name = target.split(":")
    capabilities = tuple(int(x) for x in options if x.isdigit()) or tuple(SHARED)
    calls = getattr(importlib.import_module(module), name)()
    facts = compile_here(calls, capabilities)
    if "--json" in options:
        print(json.dumps([asdict(x) for x in facts]))
        return
    rows = [list(asdict(facts[0])), *([str(x) for x in asdict(fact).values()] for fact in facts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
