"""The text vectors of words, cached on disk in the weights folder, and the hashes of weight files.

Top to bottom: the vectors of a list of words, the files of a prior, their hashes.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip import CLIP, PROMPT, TEMPLATES, Tokenizer, name_vectors
from run.files import no_pipe, replacing
from unet import UNet
from vae import VAE
from weights.load import OFFICIAL, find, locate


def word_vectors(
    weights: str, clip: CLIP, tokenizer: Tokenizer, words: Sequence[str], templates: int, shared: bool = False
) -> Tensor:
    """`name_vectors` with 1 or 80 prompts, cached in `weights/.vectors` by a hash of all inputs.

    `weights` "random" does not cache.
    """
    prompts = (PROMPT,) if templates == 1 else TEMPLATES
    if weights == "random":
        return name_vectors(clip, tokenizer, words, prompts, shared)
    folder = locate(weights)
    files = [folder / file for file in prior_files(weights, ("clip", "tokenizer"))]
    hashes = [digest_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([hashes, words, prompts, shared]).encode()).hexdigest()
    file = folder / ".vectors" / f"{key[:32]}.safetensors"
    if (vectors := read_vectors(file)) is not None:
        return vectors.to(clip.logit_scale.device)
    vectors = name_vectors(clip, tokenizer, words, prompts, shared)
    with suppress(OSError, SafetensorError):  # the folder may be read-only or full: do not cache
        file.parent.mkdir(exist_ok=True)
        content = vectors.cpu().contiguous()
        with replacing(file, file.with_suffix(f".{os.getpid()}")) as new:  # others may write it, too
            save_file({"vectors": content}, new, metadata={"sha256": tensor_digest(content)})
    return vectors


def read_vectors(file: Path) -> Tensor | None:
    """The cached vectors; None if there are none with the hash of their content (older files have none)."""
    if not file.is_file():
        return None
    with suppress(OSError, SafetensorError, RuntimeError, TypeError), safe_open(file, "pt") as f:
        vectors, expected = f.get_tensor("vectors"), (f.metadata() or {}).get("sha256")
        if expected in (None, tensor_digest(vectors)):
            return vectors if expected else None
    warnings.warn(f"{file} changed after it was written: its vectors are computed again", stacklevel=3)
    return None


def tensor_digest(x: Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and bytes."""
    return hashlib.sha256(f"{x.dtype}{[*x.shape]}".encode() + x.numpy().tobytes()).hexdigest()


def prior_files(weights: str, parts: Sequence[str]) -> list[str]:
    """The files of the `parts` vae, unet, clip or tokenizer, relative to the folder `weights`."""
    files, folder = [], locate(weights)
    for part in parts:
        if part == "tokenizer":
            files += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
        else:
            kind = {"vae": VAE, "unet": UNet, "clip": CLIP}[part]
            file = find(folder / part, OFFICIAL[kind])
            files.append(file.relative_to(folder).as_posix())
    return files


def digest(file: Path) -> str:
    """The file's sha256."""
    with open(file, "rb", opener=no_pipe) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def digest_once(file: Path, size: int, changed: int) -> str:
    """`digest`, cached: CLIP's file has 1.7 GB, and every list of words needs its hash."""
    return digest(file)
