"""Download the official weights of Stable Diffusion v1.5 and CLIP ViT-L/14, or of RAM; verify their hashes.

    python -m weights.fetch                      # 5.5 GB into weights/sd15
    python -m weights.fetch --variant fp16       # 3.6 GB: UNet and VAE in half precision, CLIP as before
    python -m weights.fetch --from ~/Downloads   # use the files in this folder, download the rest
    python -m weights.fetch --to /data/sd15      # another destination
    python -m weights.fetch --ram                # the tagger: 5.6 GB, of which weights/ram keeps 0.8 GB

huggingface_hub downloads into `.tmp-fetch`, with its own retries; a file gets its final name only after its
size and hash match the table below. Re-run after a failure: complete files are verified and kept, and
leftovers in `.tmp-fetch` are deleted, so run one process per destination.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from errors import Parser, WeightsError, run_command


@dataclass(frozen=True)
class File:
    """One official file: its place on the Hub, its place in our folder, its size and hash."""

    repo: str  # "owner/name" on the Hub
    revision: str  # commit of that repository, 40 hex digits
    remote: str  # path inside the repository
    local: str  # path inside our folder
    size: int  # bytes
    digest: str  # 64 hex digits: sha256; 40: git's blob sha1, all that the Hub lists for a small text file


# From public listings of the two repositories: each hash stands in 3 to 10 public files (November 2026). No
# download of ours has confirmed them. A mismatch may be this table's error, so messages give both values.
SD = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
CLIP = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
# RAM's checkpoint, and its lists from a repository that has them unchanged: the authors' has no lists. The
# checkpoint's size is that of its LFS pointer in the Space xinyu1205/recognize-anything, commit 60bca41.
RAM = ("xinyu1205/recognize_anything_model", "a4f945fe0720892020c28309624df3bd1f3ad3dc")
RAM_LISTS = ("CannotFindObject/RAM_ONNX", "059bc78e8f02489540a60b22099974354ed91ab3")
AGAIN = "run the command again"
SCRATCH = ".tmp-fetch"  # inside the destination: moving a complete file is a rename on one disk


def official(variant: str) -> tuple[File, ...]:
    """The five official files of `variant`, "fp32" or "fp16": the precision of the UNet and the VAE."""
    dot = {"fp32": "", "fp16": ".fp16"}[variant]
    unet, vae = (f"{part}/diffusion_pytorch_model{dot}.safetensors" for part in ("unet", "vae"))
    pinned = {  # size in bytes, digest
        "unet": (3438167540, "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"),
        "unet.fp16": (1719125304, "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"),
        "vae": (334643276, "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"),
        "vae.fp16": (167335342, "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"),
    }
    clip = (1710540580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb")
    vocab = (1059962, "469be27c5c010538f845f518c4f5e8574c78f7c8")
    merges = (524619, "76e821f1b6f0a9709293c3b6b51ed90980b3166b")
    return (
        File(*SD, unet, unet, *pinned["unet" + dot]),
        File(*SD, vae, vae, *pinned["vae" + dot]),
        File(*CLIP, "model.safetensors", "clip/model.safetensors", *clip),
        File(*CLIP, "vocab.json", "tokenizer/vocab.json", *vocab),
        File(*CLIP, "merges.txt", "tokenizer/merges.txt", *merges),
    )


def official_ram() -> tuple[File, ...]:
    """RAM's three official files: the checkpoint, the names of its tags, their thresholds."""
    model, names, thresholds = "ram_swin_large_14m.pth", "ram_tag_list.txt", "ram_tag_list_threshold.txt"
    pinned = {  # size in bytes, sha256
        model: (5625634877, "15c729c793af28b9d107c69f85836a1356d76ea830d4714699fb62e55fcc08ed"),
        names: (41904, "5d96d2f7225527480ad773aaac76b6e5c08a18adf6eae9ca7d2ab923d5e7bd8b"),
        thresholds: (22016, "b6f81d0de1bc7f9c251af512c413eae976c77dbfbadf700d4e3d90510f4c6447"),
    }
    return tuple(File(*(RAM if x == model else RAM_LISTS), x, x, *pin) for x, pin in pinned.items())


def amount(size: int) -> str:
    """Format `size` bytes: "5.5 GB", "0.5 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def mismatch(path: Path, file: File) -> str | None:
    """Compare `path` with the table: None if it is `file`, else the difference, as "size 12, expected 34"."""
    print(f"{path}: verifying {amount(file.size)}", flush=True)
    kind, found, expected = "size", path.stat().st_size, file.size
    if found == expected:
        kind, digest = "sha256", hashlib.sha256()
        if len(file.digest) == 40:
            kind, digest = "git sha1", hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with path.open("rb") as stream:
            found, expected = hashlib.file_digest(stream, lambda: digest).hexdigest(), file.digest
    if found == expected:
        return None
    print(f"{path} is not the pinned file: {kind} {found}, expected {expected}", flush=True)
    return f"{kind} {found}, expected {expected}"


def link_or_copy(path: Path, folder: Path) -> Path:
    """Hard-link `path` into `folder`; copy it where a link is impossible (another disk)."""
    target = folder / path.name
    try:
        os.link(path.resolve(), target)  # resolved: the Hub's own cache holds symbolic links
    except OSError:
        shutil.copyfile(path, target)
    return target


def download(file: File, folder: Path, endpoint: str | None) -> Path:
    """Download `file` into `folder` and verify it. Raise WeightsError, or OSError if the disk fails."""
    from huggingface_hub import get_token, hf_hub_download  # slow to import

    print(f"{file.local}: downloading {amount(file.size)} from {file.repo}", flush=True)
    try:
        where = {"revision": file.revision, "local_dir": folder, "endpoint": endpoint}
        path = Path(hf_hub_download(file.repo, file.remote, **where))
    except Exception as error:  # the library's errors have no common class
        if isinstance(error, OSError) and error.errno:  # the disk is full, read-only, ...
            raise
        cause, cure = error.__cause__ or error, f"check the connection and {AGAIN}, or"
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            cure = "the Hub refuses it to everyone;"
            if get_token():
                cure = f"your token is expired or too narrow: unset HF_TOKEN or `hf auth logout`, {AGAIN}, or"
        cure += " give files that you already have with --from DIR"
        reason = " ".join(str(cause).split())  # one line
        raise WeightsError(f"cannot download {file.remote} of {file.repo} ({reason}): {cure}") from error
    if difference := mismatch(path, file):
        cure = f"{AGAIN}; if this repeats, compare the published file with the table in weights/fetch.py"
        raise WeightsError(f"the downloaded {file.local} has {difference}, and was deleted: {cure}")
    return path


def fetch(files: Sequence[File], root: Path, source: Path | None = None, endpoint: str | None = None) -> None:
    """Bring `files` into `root`: keep those already there, take others from `source`, download the rest.

    `source` may hold a file under our name or the repository's: `DIR/clip/model.safetensors` or
    `DIR/model.safetensors`. `endpoint` is the Hub's address (None: the library's default). Raise WeightsError
    or OSError; files completed before an error are kept.
    """
    if source and not source.is_dir():
        raise WeightsError(f"--from {source} is not a folder: give one that holds downloaded files")
    names = [*dict.fromkeys(name for file in files for name in (file.local, file.remote))]
    if source and not any((source / name).is_file() for name in names):
        cure = "give the folder that holds one of them, or leave --from out to download all"
        raise WeightsError(f"--from {source} holds none of {', '.join(names)}: {cure}")
    print(f"{len(files)} files, {amount(sum(file.size for file in files))}, into {root}", flush=True)
    scratch = root / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # leftovers of a killed run
    scratch.mkdir(parents=True)
    try:
        places = {}  # where each file may lie already
        for file in files:
            paths = [root / file.local, *((source / file.local, source / file.remote) if source else ())]
            places[file] = [path for path in dict.fromkeys(paths) if path.is_file()]
        missing, free = sum(file.size for file in files if not places[file]), shutil.disk_usage(root).free
        if free < missing:
            space = f"needs {amount(missing)} of free space and has {amount(free)}"
            raise WeightsError(f"{root} {space}: free some, or choose another disk with --to DIR")
        for file, paths in places.items():
            path, target = next((x for x in paths if mismatch(x, file) is None), None), root / file.local
            if path != target:
                new = link_or_copy(path, scratch) if path else download(file, scratch, endpoint)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new, target)
                print(f"{target}: complete", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"all {len(files)} files are verified in {root}")


def fetch_ram(root: Path, source: Path | None = None) -> None:
    """Bring RAM's files into `root`, as `fetch` does; `model.safetensors` replaces the checkpoint there.

    An earlier run's `model.safetensors` is kept: then only the lists are fetched.
    """
    from weights.ram import MODEL, convert  # slow to import

    checkpoint, *lists = official_ram()
    present = (root / MODEL).is_file()
    fetch(lists if present else [checkpoint, *lists], root, source)
    if not present:
        print(f"{root / MODEL}: converting {checkpoint.local}", flush=True)
        convert(root / checkpoint.local, root / MODEL)
        (root / checkpoint.local).unlink()  # ours: a download, a copy, or a link to the user's
    print(f"{root / MODEL}: complete", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m weights.fetch",
        description="Download the official weights (5.5 GB; fp16: 3.6 GB) and verify them.",
    )
    add = parser.add_argument
    add("--to", type=Path, metavar="DIR", help="default: weights/sd15, with --ram weights/ram")
    add("--variant", choices=("fp32", "fp16"), default="fp32", help="of UNet and VAE; default: %(default)s")
    add("--ram", action="store_true", help="instead, the image tagger RAM: 5.6 GB, of which 0.8 GB are kept")
    add("--from", type=Path, dest="source", metavar="DIR", help="use the files in this folder")
    options = parser.parse_args(argv)
    root = options.to or Path("weights/ram" if options.ram else "weights/sd15")

    work = fetch_ram if options.ram else partial(fetch, official(options.variant))
    interrupted = f"interrupted: complete files are kept; {AGAIN} for the rest"
    return run_command("weights.fetch", partial(work, root, options.source), interrupted)


if __name__ == "__main__":
    sys.exit(main())
