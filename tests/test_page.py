"""page.py: its answers are those of predict_image; it serves one page, to this computer alone; and in a real
browser (`pytest -m browser`) a word moves the map and a broken file is one sentence.
"""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tada
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

import page as module
from images import scenes
from model import Tada
from page import CACHED, LIMIT, SIDE, Viewer, application, main
from predict import load_model, predict_image
from run.checkpoint import FACTS, HASHES, MODEL, TENSORS, save_model
from weights.words import digest

ROOT = Path(__file__).parents[1]
HOSTS = ("localhost", "127.0.0.1")
pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, also in the processes started


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(tiny_tada.make(tags="clip"), file, {}, {})
    hashes = {MODEL: digest(file), TENSORS: "", FACTS: ""}
    file.with_name(HASHES).write_text(json.dumps(hashes))
    return str(file)


@pytest.fixture(scope="module")
def tada(run) -> Tada:
    return load_model(run, "cpu")


def client(tada: Tada) -> TestClient:
    return TestClient(application(Viewer(tada, "runs/demo"), HOSTS), base_url="http://127.0.0.1:8000")


def file_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(url: str) -> Image.Image:
    assert url.startswith("data:image/png;base64,")
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


SCENE = Image.fromarray(scenes.draw(200_000).image)
PNG = file_of(SCENE)


# ---- the answers


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("own=1", None),
        ("word=boat&word=tall%20tree", ["boat", "tall tree"]),
        ("word=Zebra", ["Zebra"]),
        ("", []),
    ],
)
def test_the_map_is_that_of_predict_image(tada, query, words):
    """To the pixel, as indices under the model's palette, beside what differs from the map without words."""
    answer = client(tada).post(f"/predict?name=x.png&{query}", content=PNG).json()
    expected, plain = predict_image(tada, SCENE, words), predict_image(tada, SCENE, [])
    moved = expected.labels != plain.labels
    image = opened(answer["map"])
    assert image.mode == "P" and np.array_equal(np.asarray(image), expected.labels)
    assert image.convert("RGB").tobytes() == expected.label_map().convert("RGB").tobytes()
    assert answer["tags"] == expected.tags and answer["size"] == [128, 128]
    assert {x["name"]: x["share"] for x in answer["shares"]} == expected.shares
    colours = [expected.palette[tiny_tada.NAMES.index(x["name"])] for x in answer["shares"]]
    assert [x["colour"] for x in answer["shares"]] == ["#{:02x}{:02x}{:02x}".format(*x) for x in colours]
    assert answer["moved"] == moved.mean()
    if words == []:
        assert answer["changed"] is None
    else:
        assert 0 < moved.mean() < 1
        alpha = np.asarray(opened(answer["changed"]).convert("RGBA"))[..., 3]
        assert np.array_equal(alpha, np.where(moved, 0, 255)), "what did not change is covered"


def test_attention_is_on_one_scale_for_all_words(tada):
    words, query = ["boat", "sea", "cloud"], "word=boat&word=sea&word=cloud"
    expected = predict_image(tada, SCENE, words)
    top, levels = expected.maps.max(), {}
    for word in words:
        answer = client(tada).post(f"/attention?to={word}&{query}", content=PNG).json()
        strength, image = expected.attention(word), opened(answer["map"])
        levels[word] = np.asarray(image)
        assert np.array_equal(levels[word], (strength * (255 / top)).round())
        assert (answer["low"], answer["high"], answer["top"]) == (strength.min(), strength.max(), top)
        lightness = np.asarray(image.convert("L"), int).ravel()[levels[word].ravel().argsort(kind="stable")]
        assert (np.diff(lightness) >= 0).all(), "more attention is lighter"
    assert max(level.max() for level in levels.values()) == 255
    assert len({level.max() for level in levels.values()}) > 1
    answer = client(tada).post(f"/attention?to=zebra&{query}", content=PNG)
    assert answer.status_code == 400 and "'zebra'" in answer.text


def test_the_image_is_shown_as_it_was_read(tada, tmp_path):
    """Upright, as a JPEG, and no larger than a screen; the map has the file's size."""
    exif, file = Image.Exif(), tmp_path / "x.tif"
    exif[0x0112] = 6
    file.write_bytes(file_of(SCENE.resize((2 * SIDE, SIDE)), "TIFF", exif=exif, compression="tiff_lzw"))
    labels = predict_image(tada, file, ["sea"]).labels
    answer = client(tada).post("/predict?name=x.tif&word=sea", content=file.read_bytes())
    assert labels.shape == (2 * SIDE, SIDE)
    assert np.array_equal(np.asarray(opened(answer.json()["map"])), labels)
    answer = client(tada).post("/image?name=x.tif", content=file.read_bytes())
    assert answer.headers["content-type"] == "image/jpeg"
    image = Image.open(BytesIO(answer.content))
    assert image.format == "JPEG" and image.size == (SIDE // 2, SIDE)


@pytest.mark.parametrize("path", ["/image", "/predict", "/attention"])
def test_a_broken_file_is_one_sentence_with_its_name(tada, path):
    answer = client(tada).post(path, params={"name": "<b>holiday.jpg", "to": "sea"}, content=b"GIF89a, not")
    assert answer.status_code == 400 and answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("<b>holiday.jpg ") and "tmp" not in answer.text and "\n" not in answer.text


def test_a_word_that_cannot_be_is_one_sentence(tada):
    answer = client(tada).post("/predict", params={"word": "x" * 500}, content=PNG)
    assert answer.status_code == 400 and "1 to 200 printable characters" in answer.text


def test_examples_are_drawn_and_differ(tada):
    first, second, odd = (client(tada).get(f"/example?number={n}").content for n in ("0", "1", "no number"))
    assert np.array_equal(Image.open(BytesIO(first)), SCENE)
    assert first == odd != second


@pytest.mark.parametrize(
    ("options", "words", "own", "attention"),
    [
        ({"tags": "clip"}, "list", True, True),
        ({"tags": "classes"}, "list", True, True),
        ({"condition": "oracle", "tags": "oracle"}, "list", False, True),
        ({"condition": "tags", "tags": "clip", "tag_tokens": "prompt"}, "list", True, False),
        ({"condition": "caption", "tags": "captions.jsonl"}, "sentence", False, False),
        ({"condition": "none"}, False, True, False),
        ({"condition": "classes"}, False, True, False),
    ],
)
def test_the_page_learns_what_words_do(options, words, own, attention):
    """And whatever it says can be asked for."""
    browser = client(tiny_tada.make(**options))
    model = browser.get("/model").json()
    assert (model["words"], model["own"], model["attention"]) == (words, own, attention)
    assert model["classes"] == [*tiny_tada.NAMES] and model["title"].startswith("runs/demo: tiny, fpn")
    assert model["limit"] == LIMIT
    queries = ["own=1"] * own + ["", "word=a+boat,+at+sea" if words == "sentence" else "word=sea"] * bool(
        words
    )
    for query in queries:
        answer = browser.post(f"/predict?{query}", content=PNG)
        assert answer.status_code == 200, answer.text
    if attention:
        assert browser.post("/attention?to=sea&word=sea", content=PNG).status_code == 200


def test_one_prediction_at_a_time_and_few_are_kept(tada, monkeypatch):
    """An edit costs one prediction: the map without words is made once an image."""
    running, most, asked = threading.Semaphore(1), [], []

    def watched(tada, image, words):
        most.append(running.acquire(blocking=False))
        asked.append(words)
        time.sleep(0.02)
        result = predict_image(tada, image, words)
        running.release()
        return result

    monkeypatch.setattr(module, "predict_image", watched)
    viewer = Viewer(tada, "runs/demo")
    with ThreadPoolExecutor(4) as pool:
        lists = [(word,) for word in (*tiny_tada.NAMES, "zebra")]
        answers = [*pool.map(lambda words: viewer.predict(PNG, "x", words), lists)]
    assert all(most) and [answer["tags"] for answer in answers] == [[*words] for words in lists]
    assert len(asked) == len(lists) + 1 and asked.count([]) == 1
    assert viewer.result.cache_info().currsize == CACHED


# ---- who is answered, and with what


def test_the_page_is_one_file_without_links(tada):
    answer = client(tada).get("/")
    assert answer.text == (ROOT / "page.html").read_text() and answer.headers["content-type"].startswith(
        "text/html"
    )
    assert not re.search(r"https?://|\bsrc=\"|@import|url\(", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/page.html",
        "/page.py",
        "/../page.py",
        "/%2e%2e/page.py",
        "/..%2fREADME.md",
        "//etc/passwd",
        "/etc/passwd",
    ],
)
def test_no_other_file_is_served(tada, path):
    assert client(tada).get(path).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "LOCALHOST:8000", "origin": "http://LOCALHOST:8000"}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),  # a site that points its name at 127.0.0.1
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example:8000@127.0.0.1.evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),  # another program of this computer
        ({"origin": "null"}, 403),
        ({"origin": "http://[::1"}, 403),
    ],
)
def test_only_its_own_page_is_answered(tada, headers, status):
    answer = client(tada).post("/predict?word=sea", content=PNG, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.text.startswith("page.py answers ") and "\n" not in answer.text
    if "origin" not in headers:
        assert client(tada).get("/", headers=headers).status_code == status


def test_too_much_is_refused_while_it_arrives(tada):
    """A body without end: it is left unread after LIMIT."""
    chunk, received, sent = bytes(2**20), [], []
    headers = [(b"host", b"127.0.0.1"), (b"transfer-encoding", b"chunked")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/image",
        "query_string": b"name=big.png",
        "headers": headers,
    }

    async def receive() -> dict:
        received.append(len(chunk))
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    app = application(Viewer(tada, "runs/demo"), HOSTS)
    asyncio.run(app(scope | {"root_path": "", "scheme": "http", "http_version": "1.1"}, receive, send))
    assert sent[0]["status"] == 413 and b"big.png has more than 20 MB" in sent[1]["body"]
    assert LIMIT < sum(received) <= LIMIT + 2 * len(chunk)


# ---- the command


@pytest.mark.parametrize("library", ["starlette", "uvicorn"])
def test_names_what_is_missing(monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["runs/none"]) == 2
    assert (
        capsys.readouterr().err
        == "page.py: the page needs starlette and uvicorn: pip install starlette uvicorn\n"
    )


def test_a_taken_port_is_one_sentence(capsys):
    with module.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 70000):
            assert main(["runs/none", "--port", str(port)]) == 2
            error = capsys.readouterr().err
            assert (
                error.startswith(f"page.py: 127.0.0.1, port {port}, cannot be opened")
                and error.count("\n") == 1
            )


@pytest.mark.parametrize(("options", "tabs"), [([], 1), (["--no-browser"], 0)])
def test_listens_on_this_computer_and_opens_the_page(run, monkeypatch, capsys, options, tabs):
    places, urls = [], []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda _, sockets: places.extend(x.getsockname() for x in sockets)
    )
    monkeypatch.setattr(module.webbrowser, "open", urls.append)
    monkeypatch.setattr(
        module, "Thread", lambda target, args, daemon: SimpleNamespace(start=lambda: target(*args))
    )
    monkeypatch.setenv("DISPLAY", ":0")
    assert main([run, *options]) == 0
    ((host, port),) = places
    assert host == "127.0.0.1" and port > 0 and f"http://127.0.0.1:{port}/ " in capsys.readouterr().out
    assert urls == [f"http://127.0.0.1:{port}/"] * tabs


def test_ctrl_c_does_not_wait_for_a_stalled_upload(run):
    command = [sys.executable, str(ROOT / "page.py"), run, "--no-browser"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        host = process.stdout.readline().split("/")[2]
        with socket.create_connection(host.split(":")) as upload:
            upload.sendall(f"POST /image HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\nabc".encode())
            time.sleep(1)  # until the server has read it
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(15) == 130
            finally:
                process.kill()


@pytest.fixture(scope="module")
def served(run):
    """The address of a running page.py; it ends by Ctrl-C."""
    command = [sys.executable, str(ROOT / "page.py"), run, "--no-browser"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job of "&" ignores it
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options) as process:
        assert process.stdout.readline() == f"loading {run}\n"
        yield process.stdout.readline().split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and process.stderr.read() == "stopped\n"


def test_serves_until_ctrl_c(served):
    with urllib.request.urlopen(served) as answer:
        assert answer.read() == (ROOT / "page.html").read_bytes()


# ---- in the browser


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    installed = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed)  # without one: playwright's own
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, served):
    """The page with its example, whose requests and errors are watched."""
    tab = chromium.new_page(viewport={"width": 390, "height": 844})
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(served)
    tab.get_by_text("answered in").wait_for()
    yield tab
    assert all(url.startswith((served, "data:", f"blob:{served}")) for url in requests)
    assert [x for x in errors if "400 (Bad Request)" not in x] == [], (
        "what the console says of a refused file"
    )
    tab.close()


def pixels(tab, place: int = 1) -> np.ndarray:
    """The panel without words (0) or with them (1) as it is on the screen."""
    tab.wait_for_timeout(400)  # images that were just set are painted, the veil is gone
    return np.asarray(Image.open(BytesIO(tab.locator(".stack").nth(place).screenshot())))


def labels(tab, place: int = 1) -> np.ndarray:
    return np.asarray(opened(tab.locator("img.map").nth(place).get_attribute("src")))


def chips(tab) -> list[str]:
    return tab.locator(".chip button:first-child").all_inner_texts()


def settled(tab) -> None:
    tab.locator("body:not(.busy)").wait_for()


@pytest.mark.browser
def test_a_word_moves_the_map(tab, tada):
    """By mouse and by keyboard; the map without words stays as it is."""
    assert chips(tab) == predict_image(tada, SCENE).tags
    tab.get_by_label("Map", exact=True).check(force=True)
    plain, before = pixels(tab, 0), pixels(tab)
    tab.get_by_role("button", name="Clear").click()
    settled(tab)
    assert chips(tab) == [] and np.array_equal(labels(tab), labels(tab, 0))
    assert (pixels(tab) != before).any()
    tab.get_by_label("Add a word").press_sequentially("boat, tall tree")
    tab.keyboard.press("Enter")
    settled(tab)
    assert chips(tab) == ["boat", "tall tree"]
    after = pixels(tab)
    assert (after != before).any() and np.array_equal(pixels(tab, 0), plain)
    expected, without = predict_image(tada, SCENE, ["boat", "tall tree"]), predict_image(tada, SCENE, [])
    assert np.array_equal(labels(tab), expected.labels) and np.array_equal(labels(tab, 0), without.labels)
    moved = (expected.labels != without.labels).mean()
    assert tab.locator("figcaption").nth(1).inner_text().endswith(f"{100 * moved:.1f} % changed")
    tab.keyboard.press("Backspace")
    settled(tab)
    assert chips(tab) == ["boat"] and (pixels(tab) != after).any()
    tab.get_by_role("button", name="remove boat").click()
    settled(tab)
    assert chips(tab) == [] and np.array_equal(labels(tab), without.labels)


@pytest.mark.browser
def test_words_are_edited_by_keyboard(tab):
    """The focus stays on a word whose attention is shown, and goes to the field when the word is gone."""
    first, second, *rest = chips(tab)
    tab.get_by_label("Add a word").focus()
    for _ in range(2 * (2 + len(rest))):  # back to the first word
        tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    tab.get_by_text(f"Attention to “{first}”").wait_for()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # remove it: the view falls back to the maps
    settled(tab)
    assert chips(tab) == [second, *rest]
    assert tab.locator("figcaption").first.inner_text() == "Without words"
    tab.keyboard.type(first)
    tab.keyboard.press("Enter")
    settled(tab)
    assert chips(tab) == [second, *rest, first]


@pytest.mark.browser
def test_attention_and_what_changed_are_shown(tab):
    both = pixels(tab)
    word = chips(tab)[0]
    tab.locator(".chip button").first.click()
    tab.get_by_text(f"Attention to “{word}”").wait_for()
    assert (pixels(tab) != both).any()
    tab.get_by_label("Map", exact=True).check(force=True)
    whole = pixels(tab)
    tab.get_by_label("Dim what did not change").check()
    dimmed = pixels(tab)
    assert (dimmed != whole).any() and dimmed.mean() < whole.mean()


@pytest.mark.browser
def test_a_broken_file_is_one_sentence(tab, tmp_path):
    """Dropped on the page; what was there stays, and a whole image takes the sentence away."""
    before = labels(tab)
    data = tab.evaluate_handle("new DataTransfer()")
    data.evaluate("data => data.items.add(new File(['no image'], 'broken.jpg'))")
    tab.dispatch_event("body", "drop", {"dataTransfer": data})
    alert = tab.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("broken.jpg ") and "\n" not in alert.inner_text()
    assert np.array_equal(labels(tab), before)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(LIMIT + 1)
    tab.locator("#file").set_input_files(file.name)
    tab.get_by_text("large.png has 20 MB: at most 20 MB are read.").wait_for()
    whole = {"name": "whole.png", "mimeType": "image/png", "buffer": file_of(SCENE.resize((200, 100)))}
    tab.locator("#file").set_input_files(whole)
    tab.get_by_text("whole.png, 200 × 100").wait_for()
    assert not alert.is_visible()


@pytest.mark.browser
def test_a_refused_word_is_one_sentence_and_leaves_no_chip(tab, tada):
    """The chips stay those of the map that is shown, also while the attention to one is."""
    words, before = chips(tab), labels(tab)
    tab.locator(".chip button").first.click()
    tab.get_by_text(f"Attention to “{words[0]}”").wait_for()
    tab.get_by_label("Add a word").fill("\u202e")
    tab.keyboard.press("Enter")
    tab.get_by_text("1 to 200 printable characters, not '\\u202e'").wait_for()
    settled(tab)
    assert chips(tab) == words and tab.locator("#status").inner_text() == ""
    tab.get_by_label("Both", exact=True).check(force=True)
    assert np.array_equal(labels(tab), before)
    tab.get_by_label("Add a word").fill("zebra")
    tab.keyboard.press("Enter")
    tab.get_by_text("answered in").wait_for()
    assert chips(tab) == [*words, "zebra"] and not tab.get_by_role("alert").is_visible()


@pytest.mark.browser
def test_the_map_is_downloaded(tab, tada):
    with tab.expect_download() as download:
        tab.get_by_text("Download the map").click()
    assert download.value.suggested_filename == "scene 0.png"
    assert np.array_equal(Image.open(download.value.path()), predict_image(tada, SCENE).labels)


@pytest.mark.browser
def test_a_phone_scrolls_in_one_direction(tab):
    tab.get_by_label("Add a word").fill("mountain" * 8)
    tab.keyboard.press("Enter")
    settled(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tops = {panel.bounding_box()["y"] for panel in tab.locator(".stack").all()}
    assert len(tops) == 1, "the maps stand side by side, whatever is written above them"
