"""A page in the browser: choose or drop an image, edit its words, see the label map answer.

    python page.py runs/NAME  # prints http://127.0.0.1:PORT/ and opens it

page.html is the whole page; it is read once, and no other file is ever served. It asks for:

    GET  /model, /example?number=3    the names of the classes and how words are used; a drawn scene
    POST /image                       the image as it was read, as a JPEG that any browser shows
    POST /predict?word=sea&word=boat  the label map of these words (own=1: of the model's tags), what changed
    POST /attention?to=sea&word=sea   where the model attends to one of the words

The body of a POST is the image's file: the server keeps nothing but the last predictions. It listens on this
computer alone unless --host names another address, and refuses requests that other sites may have sent.
"""

from errors import Parser, TadaError, Unreadable, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import os
import sys
import webbrowser
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from socket import create_server
from tempfile import NamedTemporaryFile
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from images import scenes
from images.draw import heat
from images.read import read_image
from loading.tags import PER_IMAGE
from model import Tada
from predict import Segmentation, encoded, load_model, predict_image
from run.ranks import DEVICE, DEVICE_HINTS

LIMIT = 20 * 2**20  # bytes of an image's file
CACHED = 3  # predictions: without words, and of the last two lists of words
SIDE = 1600  # longer side of an image as the page shows it
HEADERS = {  # the page's own inline code, data: images, requests to itself, and nothing else
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

Words = tuple[str, ...] | None  # None: those of the model's tagger, or the class names


# ---- what the page shows


class Viewer:
    """A model and its last predictions; one prediction at a time."""

    def __init__(self, tada: Tada, title: str):
        config, self.tada, self.lock = tada.config, tada, Lock()
        self.result = lru_cache(CACHED)(self.segmentation)
        self.uses_words, caption = config.condition in PER_IMAGE, config.condition == "caption"
        self.model = {
            "title": f"{title}: {config.model}, {config.decoder}, {config.condition}",
            "classes": config.classes,
            "words": self.uses_words and ("sentence" if caption else "list"),
            # Whether it has words of its own for a new image; else those of a file, which lacks it.
            "own": not self.uses_words or tada.tagger is not None or config.tags == "classes",
            "attention": self.uses_words and not caption and config.tag_tokens == "pooled",
            "limit": LIMIT,
        }

    def segmentation(self, content: bytes, name: str, words: Words) -> Segmentation:
        return predict_image(self.tada, decoded(content, name), words if words is None else [*words])

    def image(self, content: bytes, name: str, _: Words) -> bytes:
        """A JPEG of at most `SIDE` pixels a side: browsers show no TIFF, and need no 12 megapixels."""
        with self.lock:
            image = decoded(content, name)
        image.thumbnail((SIDE, SIDE))
        return encoded(image, ".jpg")

    def predict(self, content: bytes, name: str, words: Words) -> dict:
        """The label map, and where it differs from the one without words."""
        with self.lock:
            shown = self.result(content, name, words)
            plain = self.result(content, name, ()) if self.uses_words else shown
        colours = {k: f"#{bytes(x).hex()}" for k, x in zip(self.tada.config.classes, shown.palette)}
        moved = shown.labels != plain.labels
        mask = Image.fromarray(moved.astype(np.uint8))
        mask.putpalette([20, 22, 26, 0, 0, 0])  # nearly black over what did not move; page.html dims it
        mask.info["transparency"] = b"\xff\x00"
        return {
            "tags": shown.tags,
            "size": shown.labels.shape,
            "map": data_url(shown.label_map()),
            "shares": [{"name": k, "share": x, "colour": colours[k]} for k, x in shown.shares.items()],
            "moved": float(moved.mean()),
            "changed": None if shown is plain else data_url(mask),
        }

    def attention(self, content: bytes, name: str, words: Words, to: str) -> dict:
        """The attention to one word, all words on one scale: from 0 to the highest attention to any."""
        with self.lock:
            shown = self.result(content, name, words)
            strength, top = shown.attention(to), float(shown.maps.max())
        level = Image.fromarray((strength * (255 / top)).round().astype(np.uint8))
        level.putpalette(heat(np.linspace(0, 1, 256)).round().astype(np.uint8).tobytes())
        low, high = float(strength.min()), float(strength.max())
        return {"map": data_url(level), "low": low, "high": high, "top": top}


def decoded(content: bytes, name: str) -> Image.Image:
    """The image of a file's bytes, upright. Raises Unreadable with the name that the user gave."""
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return read_image(file.name)[0]
        except Unreadable as error:
            raise Unreadable(str(error).replace(file.name, name)) from None


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + b64encode(encoded(image, ".png")).decode()


# ---- HTTP


def application(viewer: Viewer, hosts: Collection[str]) -> Callable:
    """The page and its answers, by ASGI; `hosts` are the names by which requests may call this server."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    async def work(request: Request, job: Callable, *more: str) -> Any:
        """Do a job with the request's image, whose bytes are counted as they arrive, its name and words."""
        query, content = request.query_params, bytearray()
        name = query.get("name", "the image")[:200]
        async for chunk in request.stream():
            content += chunk
            if len(content) > LIMIT:
                raise HTTPException(413, f"{name} has more than {LIMIT >> 20} MB: give a smaller file")
        words = None if "own" in query else tuple(query.getlist("word"))
        return await run_in_threadpool(job, bytes(content), name, words, *more)

    def example(request: Request) -> Response:
        number, indices = request.query_params.get("number", ""), scenes.SPLITS["test"]
        scene = scenes.draw(indices[int(number[:9]) % len(indices) if number.isdecimal() else 0])
        return Response(encoded(Image.fromarray(scene.image), ".png"), media_type="image/png")

    async def image(request: Request) -> Response:
        return Response(await work(request, viewer.image), media_type="image/jpeg")

    async def predict(request: Request) -> Response:
        return JSONResponse(await work(request, viewer.predict))

    async def attention(request: Request) -> Response:
        return JSONResponse(await work(request, viewer.attention, request.query_params.get("to", "")))

    async def guard(request: Request, call_next) -> Response:
        if sentence := forbidden(request.method, request.headers, hosts):
            return PlainTextResponse(sentence, 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    routes = [Route("/", lambda _: HTMLResponse(html)), Route("/example", example)]
    routes += [Route("/model", lambda _: JSONResponse(viewer.model))]
    routes += [Route(f"/{f.__name__}", f, methods=["POST"]) for f in (image, predict, attention)]
    guards = [Middleware(BaseHTTPMiddleware, dispatch=guard)]
    faults = {TadaError: lambda _, error: PlainTextResponse(str(error), 400)}
    faults[ClientDisconnect] = lambda *_: Response(status_code=400)  # a reload while a file was sent
    return Starlette(routes=routes, middleware=guards, exception_handlers=faults)


def forbidden(method: str, headers: Mapping[str, str], hosts: Collection[str]) -> str | None:
    """Why a request is refused: a site may point its own name at this computer, or post to its address."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        named, sender = urlsplit(f"//{host}").hostname, origin and urlsplit(origin).netloc
    except ValueError:
        named, sender = None, None
    if named not in hosts:
        return f"page.py answers to {', '.join(hosts)}, not to {host[:100]!r}: give this name as --host"
    foreign = method != "GET" and origin is not None and sender != host
    return f"page.py answers its own page, not one of {origin[:100]!r}" if foreign else None


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("page.py", partial(run, **vars(parse(argv))), "stopped")


def run(
    checkpoint: str, *, weights: str | None, device: str | None, host: str, port: int, browser: bool
) -> None:
    """Serve until Ctrl-C."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise TadaError("the page needs starlette and uvicorn: pip install starlette uvicorn") from None
    try:
        listener = create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TadaError(f"{host}, port {port}, cannot be opened ({reason}): give another --port") from None
    with listener:
        print(f"loading {checkpoint}", flush=True)
        viewer = Viewer(load_model(checkpoint, device, weights=weights), checkpoint)
        app = application(viewer, dict.fromkeys(["localhost", "127.0.0.1", host.lower()]))
        url = f"http://{host}:{listener.getsockname()[1]}/"
        print(f"{url} (Ctrl-C stops it)", flush=True)
        if browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}):
            Thread(target=webbrowser.open, args=[url], daemon=True).start()  # elsewhere it may be a text one
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listener])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("page.py", DEVICE_HINTS, description="Edit an image's words in the browser.")
    add = parser.add_argument
    add("checkpoint", help="a run folder (its best step), a step folder, model.safetensors")
    add("--weights", metavar="DIR", help="its frozen files (default: their folder in training)")
    add("--device", **DEVICE)
    add("--host", default="127.0.0.1", help="the address to listen on (default: this computer alone)")
    add("--port", type=int, default=0, help="its port (default: a free one)")
    add("--no-browser", dest="browser", action="store_false", help="print the address, open nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
