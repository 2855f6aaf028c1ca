"""Serve the pages of one run folder, on the loopback address unless asked otherwise; read only, and answer only GET.

No part of a request becomes a path: steps, groups and responses are numbers, pictures are names from a list.
"""

import base64
import hashlib
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ..runtime.rollouts import FOLDER, KeptGroup
from . import pages
from .text import COLOURS, Pieces
from .watched import Columns, Watched, parse_filter

PORT = 8421
RESTS = 4
Pictures = Callable[[], dict[str, tuple[str, bytes]]]
"""Draws the run: returns name -> (alternative text, PNG); raises ValueError if there is nothing to draw."""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri "
    f"'none'; frame-ancestors 'none'; style-src {_hash(pages.STYLE)}; script-src {_hash(pages.SCRIPT)}",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class NotThere(Exception):
    """What a request asks for does not exist; answered with 404."""


def check_address(host: str, remote: bool) -> None:
    """Refuse to serve other machines unless `remote` is given.

    Raises:
        ValueError: `host` is not an address, or is not a loopback address while `remote` is False.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as e:
        raise ValueError(f"--host is {host!r}: give an IP address, such as 127.0.0.1.") from e
    if not address.is_loopback and not remote:
        raise ValueError(
            f"--host is {host}, where other machines could read the run without a password: omit it and use "
            "`ssh -L`, or add --remote."
        )


def allowed_host(header: str | None, remote: bool) -> bool:
    """Whether a Host header can belong to this server; a page that rebinds its own name (DNS rebinding) is refused.

    An IP address cannot be rebound; allowed names are `localhost`, and with `remote` this machine's.
    """
    if not header or len(header) > 255:
        return False
    try:
        name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:  # a name
        return remote and name == socket.gethostname().lower()
    return remote or address.is_loopback


class Site:
    """Answer paths with pages of one run.

    Args:
        folder: the run directory.
        pictures: draws the run.
    """

    def __init__(self, folder: Path, pictures: Pictures):
        self.watched, self.name, self.pictures = Watched(folder), folder.resolve().name, pictures
        self._lock = threading.Lock()
        self._drawing: threading.Thread | None = None
        self._drawn: tuple[str, dict[str, tuple[str, bytes]]] = ("", {})
        self._rests_until = 0.0
        self._pieces: tuple[int, Pieces | None] = (0, None)

    def answer(self, target: str) -> tuple[str, bytes]:
        """Return content type and body for a GET.

        Raises:
            NotThere: there is no such page.
            ValueError: a filter or a file of the run cannot be read.
        """
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=20))
        if url.path == "/state":
            state = self._state()
            return "application/json", json.dumps({"mark": state["mark"], "text": pages.state_text(state)}).encode()
        if match := re.fullmatch(r"/picture/([a-z_]{1,40})\.png", url.path):
            drawn = self._drawn[1]
            if match[1] not in drawn:
                raise NotThere
            return "image/png", drawn[match[1]][1]
        state = self._state()
        if follows := url.path == "/":
            here = "/"
            body = pages.overview(state, self.watched.records(), self._drawn[1])
        else:
            here, columns = "/rollouts", self.watched.columns()
            body = self._rollouts(url.path, query, columns)
        text = pages.page(self.name, state, here, body, follows=follows, broad=url.path.startswith("/group/"))
        return "text/html; charset=utf-8", text.encode("utf-8", "replace")

    def _rollouts(self, path: str, query: dict[str, str], columns: Columns) -> str:
        if path == "/rollouts":
            chosen, matching = columns.select(parse_filter(query))
            return pages.rollouts(columns, query, chosen, matching, self.watched.unreadable)
        match = re.fullmatch(r"/(?:group|response)/(\d{1,8})/(\d{1,8})(?:/(\d{1,8}))?", path, re.ASCII)
        if not match or path.startswith("/response") != (match[3] is not None):
            raise NotThere
        step, place = int(match[1]), int(match[2])
        kept = self._group(columns, step, place)
        colour = query.get("colour", "")
        if colour not in ("", *COLOURS):
            raise ValueError(f"colour is {colour[:40]!r}: give one of {', '.join(COLOURS)}.")
        pieces = self._tokenizer() if colour else None
        if match[3] is None:
            return pages.group(columns, step, place, kept, query, pieces, _number(query, "first"))
        if int(match[3]) >= len(kept.samples):
            raise NotThere
        start = _number(query, "from")
        return pages.response(columns, step, place, int(match[3]), kept, query, pieces, start)

    def _group(self, columns: Columns, step: int, place: int) -> KeptGroup:
        index = columns.indexes.get(step)
        if index is None or place >= len(index.groups):
            raise NotThere
        return index.group(place)

    def _state(self) -> dict[str, Any]:
        """State of the run; its mark also changes with the pictures, which are drawn in the background.

        Drawing pauses at least RESTS times as long as the last drawing took, because the run needs the processor.
        """
        state = self.watched.state()
        with self._lock:
            rested = time.monotonic() >= self._rests_until
            if state["mark"] != self._drawn[0] and self._drawing is None and rested:
                self._drawing = threading.Thread(target=self._draw, args=(state["mark"],), daemon=True)
                self._drawing.start()
        return state | {"mark": f"{state['mark']}-{self._drawn[0]}"}

    def _draw(self, mark: str) -> None:
        drawn: dict[str, tuple[str, bytes]] = {}
        began = time.monotonic()
        try:
            drawn = self.pictures()
        except ValueError:  # no record yet
            pass
        finally:
            with self._lock:
                self._drawn, self._drawing = (mark, drawn), None
                self._rests_until = time.monotonic() + RESTS * (time.monotonic() - began)

    def _tokenizer(self) -> Pieces | None:
        path = self.watched.folder / FOLDER / "tokenizer.json"
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if stamp != self._pieces[0]:
            self._pieces = stamp, Pieces(str(path)) if stamp else None
        return self._pieces[1]


def _number(query: dict[str, str], name: str) -> int:
    text = query.get(name, "") or "0"
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"{name} is {text[:40]!r}: give a number from 0.")
    return int(text)


class _Handler(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if not allowed_host(self.headers.get("Host"), self.server.remote):
            return self._send(421, "text/plain; charset=utf-8", b"This server answers to its own address only.\n")
        try:
            kind, body = self.server.site.answer(self.path)
            self._send(200, kind, body)
        except NotThere:
            self._send(404, "text/plain; charset=utf-8", b"There is no such page, or it is no longer kept.\n")
        except ValueError as e:
            self._send(400, "text/plain; charset=utf-8", f"{e}\n".encode("utf-8", "replace"))

    def refuse(self) -> None:
        self.close_connection = True  # a request body is not read
        self._send(405, "text/plain; charset=utf-8", b"Only GET is answered here.\n", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def _send(self, code: int, kind: str, body: bytes, **more: str) -> None:
        self.send_response(code)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))} | more).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "lead-fast"

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the contents of a request do not belong on a terminal."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, site: Site, host: str, port: int, remote: bool):
        self.site, self.remote = site, remote
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a reader that has disconnected; print anything else as usual."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def make_server(
    folder: Path, pictures: Pictures, *, host: str = "127.0.0.1", port: int = PORT, remote: bool = False
) -> Server:
    """Make a server that is bound but not yet running.

    Args:
        folder: the run directory.
        pictures: draws the run.
        host, port: to bind; port 0 chooses a free one.
        remote: whether `host` may be other than a loopback address.
    Raises:
        ValueError: the folder is missing, or host or port cannot be used.
    """
    check_address(host, remote)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the run directory of a lead_fast.train run.")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}: give a number from 0 to 65535.")
    try:
        return Server(Site(folder, pictures), "127.0.0.1" if host == "localhost" else host, port, remote)
    except OSError as e:
        raise ValueError(f"--host {host} --port {port} cannot be served ({e.strerror}): give another --port.") from e


def serve(folder: Path, pictures: Pictures, *, host: str, port: int, remote: bool) -> None:
    """Serve until interrupted. Arguments as for `make_server`."""
    with make_server(folder, pictures, host=host, port=port, remote=remote) as server:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{server.server_address[1]}/   (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(flush=True)
