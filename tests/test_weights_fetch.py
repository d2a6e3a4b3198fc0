"""`weights/fetch.py` against a local Hub: downloads, refusals, leftovers.

The Hub here is Python's http.server with the parts of the protocol that huggingface_hub uses: HEAD with ETag,
X-Repo-Commit and Content-Length, GET with Range. Its files are random bytes; its connections fail on demand.
"""

import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import XetDownloadError
from oracle import SMALL_RAM

import weights.ram
from ram import RAM
from weights import fetch as module
from weights.fetch import SCRATCH, File, amount, fetch, main, mismatch, official, official_ram

ROOT = Path(module.__file__).parents[1]
BLOCK = 10 * 1024 * 1024  # huggingface_hub writes, and therefore resumes, in blocks of this many bytes
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves `contents` (URL path -> bytes)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.contents: dict[str, bytes] = {}
        # The next GETs of a path fail: ("cut" | "reset" | "stall", after that many bytes).
        self.troubles: dict[str, list[tuple[str, int]]] = {}
        self.refusal = 0  # the status of every answer, if any
        self.elsewhere = False  # whether content lies on another host, as the real Hub's large files do
        self.requests: list[tuple[str, str, str | None]] = []  # method, file name, Range
        self.stalled = threading.Event()
        self.closing = threading.Event()

    def publish(self, repo: str, remote: str, local: str, content: bytes) -> File:
        """Put `content` on this Hub and return the table's row for it."""
        digest = hashlib.sha256(content).hexdigest()
        if not remote.endswith(".safetensors"):  # small text files have git's hash on the real Hub
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        file = File(repo, "c" * 40, remote, local, len(content), digest)
        self.contents[self.path(file)] = content
        return file

    def path(self, file: File) -> str:
        return f"/{file.repo}/resolve/{file.revision}/{file.remote}"

    def gets(self, file: File) -> list[str | None]:
        """Return the Range of every GET of `file`, in order; None for the whole file."""
        return [span for method, path, span in self.requests if (method, path) == ("GET", self.path(file))]


class Answer(BaseHTTPRequestHandler):
    """One connection to the Hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Quiet: pytest's output is for failures."""

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, None))
        content = self.server.contents.get(self.path)
        if self.server.refusal:
            self.answer(self.server.refusal, 0)
        elif content is None:
            self.answer(404, 0)
        elif self.server.elsewhere:
            self.redirect(len(content))
        else:
            self.answer(200, len(content))

    def do_GET(self) -> None:
        span = self.headers["Range"]
        self.server.requests.append(("GET", self.path, span))
        content = self.server.contents[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0
        self.answer(
            206 if span else 200, len(content) - start, f"bytes {start}-{len(content) - 1}/{len(content)}"
        )
        trouble, after = (self.server.troubles.get(self.path) or [("", len(content))]).pop(0)
        self.wfile.write(content[start:after])
        if trouble == "stall":
            self.server.stalled.set()
            self.server.closing.wait()
        if trouble == "reset":  # linger 0: close() sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if trouble:
            self.close_connection = True
            self.connection.close()

    def redirect(self, size: int) -> None:
        """Redirect to "localhost", another host than 127.0.0.1; the X-Linked headers describe the content."""
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}{self.path}")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("X-Linked-ETag", '"' + hashlib.sha256(self.path.encode()).hexdigest() + '"')
        self.send_header("X-Linked-Size", str(size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, status: int, length: int, span: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"' + hashlib.sha256(self.path.encode()).hexdigest() + '"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", span)
        self.end_headers()


@pytest.fixture(autouse=True)
def plain_network(monkeypatch):
    """No proxy, no offline mode: whatever the machine is set to, these tests talk to 127.0.0.1."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def table(hub) -> list[File]:
    """A miniature of the official table: a UNet, a file that gets another name, a file with git's hash."""
    noise = random.Random(0).randbytes
    return [
        hub.publish("sd/sd", UNET, UNET, noise(300_000)),
        hub.publish("open/clip", "model.safetensors", "clip/model.safetensors", noise(200_000)),
        hub.publish("open/clip", "vocab.json", "tokenizer/vocab.json", noise(100_000)),
    ]


@pytest.fixture
def big(hub) -> File:
    """A file of 26 MB: more than two of the library's blocks."""
    return hub.publish("sd/sd", VAE, VAE, random.Random(1).randbytes(26_000_000))


@pytest.fixture
def command(hub, monkeypatch):
    """Run the command line in this process on `files` and this Hub; return the exit code."""

    def run(files: list[File], *argv: object, endpoint: str = hub.url) -> int:
        monkeypatch.setattr(module, "official", lambda variant: files)
        monkeypatch.setattr(module, "fetch", functools.partial(fetch, endpoint=endpoint))
        return main([str(word) for word in argv])

    return run


@pytest.fixture
def no_waits(monkeypatch):
    """Retry without waiting."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def start(hub, tmp_path):
    """Start the same command as a subprocess, for signals."""
    script = """if True:
        import functools, json, signal, sys
        from weights import fetch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C
        files = [fetch.File(**row) for row in json.loads(sys.argv[1])]
        fetch.official = lambda variant: files
        fetch.fetch = functools.partial(fetch.fetch, endpoint=sys.argv[2])
        sys.exit(fetch.main(["--to", sys.argv[3]]))
    """
    started = []

    def run(files: list[File], root: Path, **streams) -> subprocess.Popen:
        rows = json.dumps([asdict(file) for file in files])
        command = [sys.executable, "-c", script, rows, hub.url, str(root)]
        started.append(subprocess.Popen(command, cwd=ROOT, **streams))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def below(root: Path) -> dict[str, bytes]:
    """Every file under `root`, hidden ones too: relative path -> content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def folders(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()}


def published(hub: Hub, files: list[File]) -> dict[str, bytes]:
    """What `below` must return after a fetch of `files`."""
    return {file.local: hub.contents[hub.path(file)] for file in files}


def the_error(capsys) -> str:
    """The last line on stderr; any before it are huggingface_hub's own warnings of retries."""
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("weights.fetch: ")
    return last.removeprefix("weights.fetch: ")


# The table


@pytest.mark.parametrize(
    ("variant", "total", "text"), [("fp32", 5_484_935_977, "5.5 GB"), ("fp16", 3_598_585_807, "3.6 GB")]
)
def test_official_sizes_sum_to_the_totals_that_the_command_states(variant, total, text, capsys):
    """Five files, 5.5 GB, or 3.6 GB with half precision; --help states the same."""
    files = official(variant)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert len(files) == 5
    assert sum(file.size for file in files) == total
    assert amount(total) == text
    assert text in capsys.readouterr().out and text in module.__doc__


def test_variant_fp16_changes_unet_and_vae_and_nothing_else():
    """The names contain .fp16; CLIP and its vocabulary have one variant only."""
    full, half = official("fp32"), official("fp16")
    assert [file.local for file in full] == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "clip/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ]
    assert [file.local for file in half[:2]] == [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert half[2:] == full[2:]
    for one, other in zip(full[:2], half[:2], strict=True):
        assert one.size > other.size and one.digest != other.digest


def test_every_official_file_is_pinned_to_a_commit_and_a_hash():
    """40 hex digits of revision; 64 of sha256 for weights, 40 of git's sha1 for the two text files."""
    for file in {*official("fp32"), *official("fp16")}:
        assert re.fullmatch(r"[0-9a-f]{40}", file.revision)
        assert re.fullmatch(r"[0-9a-f]+", file.digest)
        assert len(file.digest) == (64 if file.remote.endswith(".safetensors") else 40)


def test_git_hash_is_the_one_that_git_computes(tmp_path):
    """`printf 'hello\\n' | git hash-object --stdin` prints this value."""
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    file = File("a/b", "c" * 40, "hello", "hello", 6, "ce013625030ba8dba906f756967f9e9ca394464a")
    assert mismatch(path, file) is None


def test_variant_flag_chooses_the_table(monkeypatch, tmp_path):
    """--variant fp16 fetches the fp16 files; without it the fp32 files."""
    fetched = []
    monkeypatch.setattr(module, "fetch", lambda *arguments: fetched.append(arguments) or 0)
    assert main(["--variant", "fp16", "--to", str(tmp_path), "--from", "here"]) == 0
    assert main([]) == 0
    assert fetched == [
        (official("fp16"), tmp_path, Path("here")),
        (official("fp32"), Path("weights/sd15"), None),
    ]


# RAM


@pytest.fixture
def ram_files(hub, monkeypatch) -> tuple[File, ...]:
    """RAM's three files at a small size, published on this Hub; `--ram` fetches and converts these."""
    content = io.BytesIO()
    model = RAM(SMALL_RAM)
    torch.save({"model": model.state_dict() | {"tag_encoder.pooler.weight": torch.zeros(9)}}, content)
    checkpoint, names, thresholds = (file.local for file in official_ram())
    files = (
        hub.publish("xinyu/ram", checkpoint, checkpoint, content.getvalue()),
        hub.publish("lists/ram", names, names, b"tag\n" * SMALL_RAM.tags),
        hub.publish("lists/ram", thresholds, thresholds, b"0.65\n" * SMALL_RAM.tags),
    )
    monkeypatch.setattr(module, "official_ram", lambda: files)
    monkeypatch.setattr(weights.ram, "convert", functools.partial(weights.ram.convert, config=SMALL_RAM))
    return files


def test_the_table_of_ram_is_that_of_its_published_files(ram, capsys):
    """The lists that we hold for tests match size and sha256; --help and the docstring state the total."""
    files = official_ram()
    assert all(len(file.digest) == 64 and re.fullmatch("[0-9a-f]{40}", file.revision) for file in files)
    assert [mismatch(ram / "tag_lists" / file.local, file) for file in files[1:]] == [None, None]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert amount(sum(file.size for file in files)) == "5.6 GB"
    assert "5.6 GB" in capsys.readouterr().out and "5.6 GB" in module.__doc__


def test_ram_is_fetched_and_kept_as_one_safetensors_file(hub, ram_files, command, tmp_path):
    """No checkpoint stays; what stays can be loaded; a second run makes no request."""
    assert command([], "--ram", "--to", tmp_path / "ram") == 0
    lists = published(hub, ram_files[1:])
    held = below(tmp_path / "ram")
    assert held.keys() == {"model.safetensors", *lists}
    assert lists.items() <= held.items()
    assert weights.ram.load_ram(tmp_path / "ram", config=SMALL_RAM).thresholds[0] == torch.tensor(0.65)
    hub.requests.clear()
    assert command([], "--ram", "--to", tmp_path / "ram") == 0
    assert hub.requests == []
    assert below(tmp_path / "ram") == held


def test_ram_takes_the_users_copies_and_leaves_them(hub, ram_files, command, tmp_path):
    """--from DIR: no request, and the checkpoint in DIR stays although ours is deleted."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, content in published(hub, ram_files).items():
        (mine / name).write_bytes(content)
    assert command([], "--ram", "--to", tmp_path / "ram", "--from", mine) == 0
    assert hub.requests == []
    assert below(mine) == published(hub, ram_files)
    assert (tmp_path / "ram" / "model.safetensors").is_file()
    assert not (tmp_path / "ram" / ram_files[0].local).exists()


def test_a_checkpoint_that_does_not_fit_is_one_sentence(
    hub, ram_files, command, tmp_path, capsys, monkeypatch
):
    """Exit 2; the download is kept, so a mended version of ours needs no second one."""
    monkeypatch.setattr(weights.ram, "convert", weights.ram.convert.func)  # the official size
    assert command([], "--ram", "--to", tmp_path / "ram") == 2
    assert "of the wrong shape: " in the_error(capsys)
    assert below(tmp_path / "ram") == published(hub, ram_files)


# A fetch that goes well


def test_fetch_brings_every_file_to_its_place_and_leaves_nothing_else(hub, table, command, tmp_path, capsys):
    """Our layout, byte for byte; no cache folder, no partial file; the total is stated first."""
    assert command(table, "--to", tmp_path / "sd15") == 0
    assert below(tmp_path / "sd15") == published(hub, table)
    assert folders(tmp_path / "sd15") == {"unet", "clip", "tokenizer"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 files, 0.6 MB, into {tmp_path / 'sd15'}"
    assert lines[-1] == f"all 3 files are verified in {tmp_path / 'sd15'}"


def test_second_run_verifies_and_makes_no_request(hub, table, command, tmp_path, capsys):
    """Complete files are hashed, which is logged, and not requested again."""
    command(table, "--to", tmp_path)
    hub.requests.clear()
    capsys.readouterr()
    assert command(table, "--to", tmp_path) == 0
    assert hub.requests == []
    assert f"{tmp_path / UNET}: verifying 0.3 MB" in capsys.readouterr().out


def test_content_on_another_host_is_followed(hub, table, command, tmp_path):
    """The Hub redirects to its storage, with size and hash in headers of the redirection."""
    hub.elsewhere = True
    assert command(table, "--to", tmp_path) == 0
    assert below(tmp_path) == published(hub, table)


def test_only_the_missing_file_is_fetched(hub, table, command, tmp_path):
    """After one file was deleted, only that one is requested."""
    command(table, "--to", tmp_path)
    (tmp_path / UNET).unlink()
    hub.requests.clear()
    assert command(table, "--to", tmp_path) == 0
    assert {path for _, path, _ in hub.requests} == {hub.path(table[0])}
    assert below(tmp_path) == published(hub, table)


def test_corrupt_file_is_named_and_replaced(hub, table, command, tmp_path, capsys):
    """A file of the right name and size whose bytes changed is fetched again."""
    command(table, "--to", tmp_path)
    (tmp_path / UNET).write_bytes(bytes(table[0].size))
    assert command(table, "--to", tmp_path) == 0
    assert below(tmp_path) == published(hub, table)
    assert f"{tmp_path / UNET} is not the pinned file: sha256" in capsys.readouterr().out


def test_import_loads_no_model_and_no_download_library():
    """`import weights.fetch` is fast: huggingface_hub is imported by the first download, a model never."""
    heavy = {"huggingface_hub", "torch", "unet", "clip", "weights.load"}
    check = f"import sys, weights.fetch; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


# Failing connections


def test_cut_connection_resumes_in_the_same_run(hub, big, command, tmp_path, no_waits):
    """Cut after 25 of 26 MB: the second GET asks only for what follows the last whole block."""
    hub.troubles[hub.path(big)] = [("cut", 25_000_000)]
    assert command([big], "--to", tmp_path) == 0
    assert hub.gets(big) == [None, f"bytes={2 * BLOCK}-"]
    assert below(tmp_path) == published(hub, [big])


def test_reset_connection_is_one_sentence(hub, table, command, tmp_path, no_waits, capsys):
    """Exit 2 with the file and the cure, nothing under the final name; the next run downloads it."""
    hub.troubles[hub.path(table[0])] = [("reset", 1000)]
    assert command(table, "--to", tmp_path) == 2
    assert below(tmp_path) == {}
    message = the_error(capsys)
    assert f"{UNET} of sd/sd" in message and "--from DIR" in message
    assert command(table, "--to", tmp_path) == 0
    assert below(tmp_path) == published(hub, table)


# What is refused


@pytest.mark.parametrize(("index", "kind"), [(0, "sha256"), (2, "git sha1")])
def test_wrong_bytes_of_the_right_size_are_removed_and_both_hashes_named(
    hub, table, command, tmp_path, capsys, index, kind
):
    """Exit 2; the file before it is kept, the wrong one is deleted."""
    file, zeros = table[index], bytes(table[index].size)
    hub.contents[hub.path(file)] = zeros
    blob = zeros if kind == "sha256" else b"blob %d\0" % file.size + zeros
    found = (hashlib.sha256 if kind == "sha256" else hashlib.sha1)(blob).hexdigest()
    assert command(table, "--to", tmp_path) == 2
    assert below(tmp_path) == published(hub, table[:index])
    assert f"the downloaded {file.local} has {kind} {found}, expected {file.digest}" in the_error(capsys)


def test_wrong_size_is_deleted_and_both_sizes_are_named(hub, table, command, tmp_path, capsys):
    hub.contents[hub.path(table[0])] = bytes(7)
    assert command(table, "--to", tmp_path) == 2
    assert below(tmp_path) == {}
    assert f"the downloaded {UNET} has size 7, expected 300000" in the_error(capsys)


def test_missing_file_on_the_hub_is_one_sentence(hub, table, command, tmp_path, capsys):
    """404 is not retried: exit 2, address and cure."""
    del hub.contents[hub.path(table[0])]
    assert command(table, "--to", tmp_path) == 2
    assert len(hub.requests) == 1
    message = the_error(capsys)
    assert message.startswith(f"cannot download {UNET} of sd/sd (") and "--from DIR" in message
    assert "404" in message and hub.url + hub.path(table[0]) in message


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("token", "cure"),
    [
        ("hf_expired", "token is expired or too narrow: unset HF_TOKEN"),
        ("", "Hub refuses it to everyone"),
    ],
)
def test_a_refusal_names_the_token(hub, table, command, tmp_path, capsys, monkeypatch, status, token, cure):
    """The Hub answers 401 to an expired token also for files that need none."""
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))
    hub.refusal = status
    assert command(table, "--to", tmp_path / "sd15") == 2
    message = the_error(capsys)
    assert cure in message and "--from DIR" in message and "connection" not in message.split("): ")[1]


def test_refused_port_is_one_sentence(table, command, tmp_path, no_waits, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert command(table, "--to", tmp_path, endpoint=f"http://127.0.0.1:{port}") == 2
    message = the_error(capsys)
    assert f"{UNET} of sd/sd" in message and "Connection refused" in message and "--from DIR" in message


def test_unknown_host_is_one_sentence(table, command, tmp_path, no_waits, capsys, monkeypatch):
    """A machine without a network cannot resolve the Hub's name."""

    def unresolved(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert command(table, "--to", tmp_path, endpoint="https://hub.invalid") == 2
    message = the_error(capsys)
    assert "Name or service not known" in message and "--from DIR" in message


def test_offline_mode_is_one_sentence(hub, table, command, tmp_path, no_waits, capsys, monkeypatch):
    """huggingface_hub's own offline switch: exit 2, no request, and the cure."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert command(table, "--to", tmp_path) == 2
    assert hub.requests == []
    message = the_error(capsys)
    assert "offline mode is enabled" in message and "--from DIR" in message


@pytest.mark.parametrize("kind", [RuntimeError, XetDownloadError])
def test_failure_of_the_xet_storage_is_one_sentence(table, command, tmp_path, capsys, monkeypatch, kind):
    """hf-xet, which downloads the real Hub's large files, has errors of its own."""

    def lost(*args, **kwargs):
        raise kind("Task error:\n error sending request")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lost)
    assert command(table, "--to", tmp_path) == 2
    message = the_error(capsys)
    assert "Task error: error sending request" in message and "--from DIR" in message


def test_full_disk_during_a_download_is_one_sentence(table, command, tmp_path, capsys, monkeypatch):
    """The message names the disk, not the network."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert command(table, "--to", tmp_path) == 2
    assert the_error(capsys) == "[Errno 28] No space left on device: '/disk/file'"


def test_too_little_space_is_an_error_before_any_request(hub, table, command, tmp_path, capsys, monkeypatch):
    """Exit 2 with what is needed, what is free, and where."""
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert command(table, "--to", tmp_path) == 2
    assert hub.requests == []
    assert f"{tmp_path} needs 0.6 MB of free space and has 0.5 MB: free some" in the_error(capsys)


def test_space_is_needed_only_for_what_is_missing(hub, table, command, tmp_path, monkeypatch):
    """A full disk that holds two of three files has room for the third."""
    command(table[:2], "--to", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=table[2].size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert command(table, "--to", tmp_path) == 0


def test_root_that_cannot_be_a_folder_is_one_sentence(table, command, tmp_path, capsys):
    """A file is where the folder should be: exit 2, the file is named and unchanged."""
    (tmp_path / "sd15").write_text("mine")
    assert command(table, "--to", tmp_path / "sd15") == 2
    assert str(tmp_path / "sd15") in the_error(capsys)
    assert (tmp_path / "sd15").read_text() == "mine"


# Interrupted runs


def test_leftovers_of_a_killed_run_are_removed_by_the_next(hub, big, table, start, command, tmp_path):
    """SIGKILL during a download leaves only the scratch folder; the next run deletes it and completes."""
    files = [table[1], big]
    hub.troubles[hub.path(big)] = [("stall", 25_000_000)]
    process = start(files, tmp_path, stdout=subprocess.DEVNULL)
    assert hub.stalled.wait(20)
    while not any(path.stat().st_size == 2 * BLOCK for path in tmp_path.rglob("*.incomplete")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = below(tmp_path)
    assert left.pop("clip/model.safetensors") == hub.contents[hub.path(table[1])]
    assert left and all(name.startswith(f"{SCRATCH}/") for name in left)

    assert command(files, "--to", tmp_path) == 0
    assert below(tmp_path) == published(hub, files)
    assert hub.gets(table[1]) == [None]
    assert hub.gets(big) == [None, None]


def test_ctrl_c_is_one_line_and_keeps_what_is_complete(hub, big, table, start, tmp_path):
    """Exit 130; the complete file is kept, the partial one and the scratch folder are deleted."""
    hub.troubles[hub.path(big)] = [("stall", 25_000_000)]
    process = start([table[1], big], tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(20)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert message == "interrupted: complete files are kept; run the command again for the rest\n"
    assert below(tmp_path) == published(hub, [table[1]])
    assert not (tmp_path / SCRATCH).exists()


# --from DIR


@pytest.mark.parametrize("name", ["local", "remote"])
def test_files_that_the_user_has_are_taken_without_a_request(hub, table, command, tmp_path, name):
    """Under our names (clip/model.safetensors) or the repository's (model.safetensors); DIR is unchanged."""
    mine, root = tmp_path / "mine", tmp_path / "sd15"
    for file in table:
        path = mine / getattr(file, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.contents[hub.path(file)])
    before = below(mine)
    assert command(table, "--to", root, "--from", mine) == 0
    assert hub.requests == []
    assert below(root) == published(hub, table)
    assert below(mine) == before
    assert (root / UNET).samefile(mine / UNET)  # a hard link: no second 3.4 GB on one disk


def test_files_of_another_disk_are_copied(hub, table, command, tmp_path, monkeypatch):
    """Where a hard link is impossible, the file is copied."""

    def impossible(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", impossible)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/vocab.json").write_bytes(hub.contents[hub.path(table[2])])
    assert command(table[2:], "--to", tmp_path / "sd15", "--from", tmp_path / "mine") == 0
    assert hub.requests == []
    assert below(tmp_path / "sd15") == published(hub, table[2:])


def test_symbolic_links_are_followed(hub, table, command, tmp_path):
    """The Hub's cache is a folder of relative links to blobs: take the blob, not a dangling link."""
    blob, link = tmp_path / "cache/blobs/b10b", tmp_path / "cache/snapshots/c/vocab.json"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    blob.write_bytes(hub.contents[hub.path(table[2])])
    link.symlink_to("../../blobs/b10b")
    assert command(table[2:], "--to", tmp_path / "sd15", "--from", link.parent) == 0
    assert hub.requests == []
    assert not (tmp_path / "sd15/tokenizer/vocab.json").is_symlink()
    assert below(tmp_path / "sd15") == published(hub, table[2:])


def test_files_that_the_user_lacks_are_downloaded(hub, table, command, tmp_path):
    """One file from DIR, two from the Hub."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").write_bytes(hub.contents[hub.path(table[1])])
    assert command(table, "--to", tmp_path / "sd15", "--from", tmp_path / "mine") == 0
    assert [len(hub.gets(file)) for file in table] == [1, 0, 1]
    assert below(tmp_path / "sd15") == published(hub, table)


def test_a_file_that_differs_is_named_and_downloaded_instead(hub, table, command, tmp_path, capsys):
    """Such as a tokenizer of the same vocabulary in another format; the user's file is unchanged."""
    theirs = tmp_path / "mine/tokenizer/vocab.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(bytes(table[2].size))
    assert command(table[2:], "--to", tmp_path / "sd15", "--from", tmp_path / "mine") == 0
    assert below(tmp_path / "sd15") == published(hub, table[2:])
    assert theirs.read_bytes() == bytes(table[2].size)
    assert f"{theirs} is not the pinned file: git sha1" in capsys.readouterr().out


def test_a_name_that_two_files_share_is_not_taken_flat(hub, table, command, tmp_path):
    """DIR/diffusion_pytorch_model.safetensors may be a UNet or a VAE: only its folder distinguishes them."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / Path(UNET).name).write_bytes(hub.contents[hub.path(table[0])])
    (tmp_path / "mine" / "vocab.json").write_bytes(hub.contents[hub.path(table[2])])
    assert command([table[0], table[2]], "--to", tmp_path / "sd15", "--from", tmp_path / "mine") == 0
    assert hub.gets(table[0]) == [None] and hub.gets(table[2]) == []


def test_a_from_folder_with_none_of_the_files_is_refused(hub, table, command, tmp_path, capsys):
    """Before anything is created or requested: gigabytes are no answer to a wrong folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / Path(UNET).name).write_bytes(hub.contents[hub.path(table[0])])
    assert command(table, "--to", tmp_path / "sd15", "--from", tmp_path / "mine") == 2
    assert hub.requests == [] and not (tmp_path / "sd15").exists()
    names = f"{UNET}, clip/model.safetensors, model.safetensors, tokenizer/vocab.json, vocab.json"
    assert the_error(capsys).startswith(f"--from {tmp_path / 'mine'} holds none of {names}: give the folder")


def test_a_from_folder_that_does_not_exist_is_one_sentence(hub, table, command, tmp_path, capsys):
    """Exit 2 before anything is created or requested."""
    assert command(table, "--to", tmp_path / "sd15", "--from", tmp_path / "typo") == 2
    assert hub.requests == []
    assert not (tmp_path / "sd15").exists()
    assert the_error(capsys).startswith(f"--from {tmp_path / 'typo'} is not a folder: ")
