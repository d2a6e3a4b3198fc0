"""What follows from a folder of weights: the hashes of its files, and the vectors of words, kept beside them.

Top to bottom: the vectors of a list of words, the files of a prior, their hashes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip import CLIP, PROMPT, TEMPLATES, Tokenizer, name_vectors
from unet import UNet
from vae import VAE
from weights.load import OFFICIAL, find


def word_vectors(
    weights: str | None,
    clip: CLIP,
    tokenizer: Tokenizer,
    words: Sequence[str],
    templates: int,
    shared: bool = False,
) -> Tensor:
    """`name_vectors` under 1 or 80 prompts, kept in `weights/.vectors` under a hash of all that made them.

    Nothing is kept where `weights` is None, or "random".
    """
    prompts = (PROMPT,) if templates == 1 else TEMPLATES
    if weights in (None, "random"):
        return name_vectors(clip, tokenizer, words, prompts, shared)
    made_by = [Path(weights, file) for file in prior_files(weights, ("clip", "tokenizer"))]
    made_by = [digest_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in made_by]
    key = hashlib.sha256(json.dumps([made_by, words, prompts, shared]).encode()).hexdigest()
    file = Path(weights, ".vectors", f"{key[:32]}.safetensors")
    with suppress(OSError, SafetensorError):  # not there, or cut off by a crash: made anew
        return load_file(file)["vectors"].to(clip.logit_scale.device)
    vectors = name_vectors(clip, tokenizer, words, prompts, shared)
    new = file.with_suffix(f".{os.getpid()}")  # several processes may write at once
    with suppress(OSError, SafetensorError):  # a shared folder may be read-only or full: nothing is kept
        file.parent.mkdir(exist_ok=True)
        save_file({"vectors": vectors.cpu().contiguous()}, new)
        os.replace(new, file)
    with suppress(OSError):  # what a full disk left
        new.unlink()
    return vectors


def prior_files(weights: str, parts: Sequence[str]) -> list[str]:
    """The files, relative to the folder `weights`, that hold vae, unet, clip or the tokenizer."""
    files = []
    for part in parts:
        if part == "tokenizer":
            files += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
        else:
            kind = {"vae": VAE, "unet": UNet, "clip": CLIP}[part]
            file = find(Path(weights, part), OFFICIAL[kind])
            files.append(file.relative_to(weights).as_posix())
    return files


def digest(file: Path) -> str:
    """The file's sha256."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def digest_once(file: Path, size: int, changed: int) -> str:
    """`digest`, remembered: CLIP's file has 1.7 GB, and every new word asks for it."""
    return digest(file)
