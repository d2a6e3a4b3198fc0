"""Keep the memory of one training step for the next; what to turn on where a GPU's is too small."""

import ctypes
import sys

from run.options import Options

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning every large block to the system.

    Otherwise each step maps its gradients anew, and the system clears them page by page: a third of sd15's
    backward pass on a CPU, 1.1 million page faults (`python -m lab.bench_step`). Without glibc, nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def relief(options: Options, world: int) -> str:
    """What to turn on after an error of memory, with the peak that `python -m lab.memory` then computes."""
    images, peak = options.batch // world, 4.7 if options.freeze_unet else 4.8 if options.lora else 16.4
    ways = {f"--accumulate {images} ({peak})": options.accumulate < images}
    ways[f"--checkpoint-activations ({peak})"] = not options.checkpoint_activations
    frozen = "--freeze-unet instead of --lora" if options.lora else "--lora 16 (4.8) or --freeze-unet"
    ways[f"{frozen} (4.7)"] = not options.freeze_unet
    off = ", ".join(way for way, useful in ways.items() if useful)
    note = "GiB of sd15 at 512x512, one image at a time"
    return f"turn on {off}; in brackets {note}" if off else "take a smaller --crop or a GPU with more memory"
