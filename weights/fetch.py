"""Download the official weights of Stable Diffusion v1.5 and CLIP ViT-L/14, and verify every byte of them.

    python -m weights.fetch                      # 5.5 GB into weights/sd15
    python -m weights.fetch --variant fp16       # 3.6 GB: UNet and VAE in half precision, CLIP as before
    python -m weights.fetch --from ~/Downloads   # takes what is there already, downloads the rest
    python -m weights.fetch --to /data/sd15      # another place

Only what the model reads is fetched: `unet/` and `vae/`, named as in the diffusers folders, `clip/` with both
towers, and `tokenizer/`. A file gets its final name only when its size and hash are those of the table below.
Run again after any failure: complete files are read once, to be verified, and not fetched again. Within a
run the library resumes a connection that is cut (plain HTTP: after its last 10 MiB block); one that is reset
starts its file anew. A killed run leaves only `.tmp-fetch`, which the next run removes: so one run at a time
per folder.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import WeightsError


@dataclass(frozen=True)
class File:
    """One official file: where the Hub has it, where we keep it, and what it must be."""

    repo: str  # "owner/name" on the Hub
    revision: str  # commit of that repository, 40 hex digits
    remote: str  # path inside the repository
    local: str  # path below our root
    size: int  # bytes
    digest: str  # 64 hex digits: sha256; 40: git's blob sha1, all that the Hub lists for a small text file


# Revisions, sizes and hashes come from public listings of the two repositories; no download of ours has
# confirmed them. So a mismatch may be the table's fault, and is reported with both values.
SD = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
CLIP = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
PINNED = {  # size in bytes, digest
    "unet": (3438167540, "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"),
    "unet.fp16": (1719125304, "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"),
    "vae": (334643276, "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"),
    "vae.fp16": (167335342, "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"),
    "clip": (1710540580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
    "vocab": (1059962, "469be27c5c010538f845f518c4f5e8574c78f7c8"),
    "merges": (524619, "76e821f1b6f0a9709293c3b6b51ed90980b3166b"),
}
SCRATCH = ".tmp-fetch"  # inside the root, so that the last step is a rename on one disk
ATTEMPTS = 3  # per file, above the library's own


def official(variant: str) -> tuple[File, ...]:
    """The five official files of `variant`, "fp32" or "fp16": the precision of the UNet and the VAE."""
    dot = {"fp32": "", "fp16": ".fp16"}[variant]
    unet, vae = (f"{part}/diffusion_pytorch_model{dot}.safetensors" for part in ("unet", "vae"))
    return (
        File(*SD, unet, unet, *PINNED["unet" + dot]),
        File(*SD, vae, vae, *PINNED["vae" + dot]),
        File(*CLIP, "model.safetensors", "clip/model.safetensors", *PINNED["clip"]),
        File(*CLIP, "vocab.json", "tokenizer/vocab.json", *PINNED["vocab"]),
        File(*CLIP, "merges.txt", "tokenizer/merges.txt", *PINNED["merges"]),
    )


def amount(size: int) -> str:
    """`size` bytes as people say it: "5.5 GB", "0.5 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def say(line: str) -> None:
    print(line, flush=True)  # at once, also into a log


class Lines(tqdm):
    """A bar for logs and pipes: it never draws itself, but says a plain line at every tenth of a file."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs | {"disable": True})

    def update(self, n: float = 1) -> None:
        before, self.n = self.n, self.n + n
        if self.total and 10 * self.n // self.total > 10 * before // self.total:
            say(f"  {self.n / self.total:.0%} of {amount(self.total)}")

    def update_transfer(self, n: float) -> None:
        """Says nothing. hf-xet counts received and written bytes, and opens two bars if this is missing."""

    def set_transfer_postfix_str(self, s: str, refresh: bool = True) -> None:
        """The speed that belongs to `update_transfer`."""


def fault(path: Path, file: File) -> str | None:
    """None if `path` is `file` by size and hash, else the difference: "size 12, expected 34"."""
    size = path.stat().st_size
    if size != file.size:
        return f"size {size}, expected {file.size}"
    kind, start = "sha256", hashlib.sha256()
    if len(file.digest) == 40:
        kind, start = "git sha1", hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: start).hexdigest()
    return None if found == file.digest else f"{kind} {found}, expected {file.digest}"


def find(file: File, places: Iterable[Path]) -> Path | None:
    """The first of `places` that is `file`; what is there but differs is named with the difference."""
    for path in places:
        if path.is_file():
            say(f"{path}: verifying {amount(path.stat().st_size)}")
            wrong = fault(path, file)
            if wrong is None:
                return path
            say(f"{path} is not the pinned file: {wrong}")
    return None


def require_space(folder: Path, size: int) -> None:
    """Raises WeightsError unless `size` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise WeightsError(
            f"{amount(size)} are needed in {folder} and {amount(free)} are free: "
            "free some space, or choose another place with --to DIR"
        )


def copy(path: Path, folder: Path) -> Path:
    """A hard link to `path` in `folder`, or a copy where there can be no link."""
    target = folder / path.name
    try:
        os.link(path.resolve(), target)  # resolved: the Hub's own cache holds symbolic links
    except OSError:
        require_space(folder, path.stat().st_size)
        shutil.copyfile(path, target)
    return target


def download(file: File, folder: Path, endpoint: str | None) -> Path:
    """`file` from the Hub at `endpoint` into `folder`, not yet verified.

    Raises WeightsError if the Hub cannot be reached, lacks the file or has it in another size; OSError if the
    disk fails. huggingface_hub resumes by itself with a Range request after a timeout or an early end
    (`file_download.http_get`), but drops the file when the connection is reset: hence the attempts here.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # slow to import
    from huggingface_hub.errors import HTTPError  # the root of its transport's errors

    pinned = {"revision": file.revision, "endpoint": endpoint}
    url = hf_hub_url(file.repo, file.remote, **pinned)
    bar = None if sys.stderr.isatty() else Lines  # None: the library's own bar
    attempt = 0
    while True:
        attempt += 1
        try:
            # Asked first: hf_hub_download would try an unreachable Hub for 23 s before it says so.
            listed = get_hf_file_metadata(url, endpoint=endpoint).size
            if listed not in (None, file.size):
                raise WeightsError(f"{url} is not the pinned file: size {listed}, expected {file.size}")
            return Path(hf_hub_download(file.repo, file.remote, local_dir=folder, tqdm_class=bar, **pinned))
        except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: hf-xet's, for a lost network
            if getattr(error, "errno", None):  # the disk is full, read-only, ...
                raise
            cause = error.__cause__ or error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            reason = f"HTTP status {status}" if status else str(cause) or type(cause).__name__
            if attempt == ATTEMPTS or (status and status < 500):
                raise WeightsError(
                    f"cannot download {url} ({reason}): check the connection, or give the files that you "
                    "have already with --from DIR"
                ) from error
        say(f"{file.local}: {reason}; trying again")
        time.sleep(attempt)


def fetch(files: Sequence[File], root: Path, source: Path | None = None, endpoint: str | None = None) -> None:
    """Bring `files` below `root`: what is there is kept, then `source` is searched, then the Hub is asked.

    `source` may hold a file under our name for it or under its repository's: `DIR/clip/model.safetensors` or
    `DIR/model.safetensors`. `endpoint` is the Hub's address, None the library's default. Raises WeightsError or
    OSError; what was complete by then stays.
    """
    if source and not source.is_dir():
        raise WeightsError(f"--from {source}: there is no such folder")
    say(f"{len(files)} files, {amount(sum(file.size for file in files))}, into {root}")
    scratch = root / SCRATCH
    if scratch.exists():
        say(f"removing {scratch}, which a killed run left")
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    try:
        missing = [file for file in files if not find(file, [root / file.local])]
        owned: dict[File, Path] = {}
        for file in missing if source else ():
            found = find(file, dict.fromkeys((source / file.local, source / file.remote)))
            if found:
                owned[file] = found
        absent = [file for file in missing if file not in owned]
        require_space(root, sum(file.size for file in absent))
        for file in [*owned, *absent]:
            if file in owned:
                path = copy(owned[file], scratch)
            else:
                say(f"{file.local}: downloading {amount(file.size)} from {file.repo}")
                path = download(file, scratch, endpoint)
                say(f"{file.local}: verifying {amount(file.size)}")
                wrong = fault(path, file)
                if wrong:
                    path.unlink()
                    raise WeightsError(
                        f"{file.local} came with {wrong}, and was removed: run the command again, and if "
                        "this repeats, compare the published file with the table in weights/fetch.py"
                    )
            target = root / file.local
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            say(f"{target}: complete")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # and with it the library's .cache folder
    say(f"all {len(files)} files are verified in {root}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns 0, or 2 after one sentence on stderr, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m weights.fetch",
        description="Download the official weights (5.5 GB; fp16: 3.6 GB) and verify them.",
    )
    add = parser.add_argument
    add("--to", type=Path, default=Path("weights/sd15"), metavar="DIR", help="default: %(default)s")
    add("--variant", choices=("fp32", "fp16"), default="fp32", help="of UNet and VAE; default: %(default)s")
    add("--from", type=Path, dest="source", metavar="DIR", help="take the files that are there already")
    arguments = parser.parse_args(argv)
    try:
        fetch(official(arguments.variant), arguments.to, arguments.source)
    except KeyboardInterrupt:
        print("interrupted: complete files are kept, run the command again for the rest", file=sys.stderr)
        return 130
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where, what = error.filename or arguments.to, error.strerror or error
        print(f"error: {where}: {what}; --to DIR chooses another place", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
