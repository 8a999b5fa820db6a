"""The page's server: on this machine only, for whoever knows its address.

    http://127.0.0.1:PORT/TOKEN/                the page and its files
                               api/videos       the list (GET)
                               api/video/N      predictions and actions of video N (GET)
                               api/types        types of the predictions of a video against given actions (POST)
                               api/state        the revision on the disk (GET)
                               api/save         edits -> the annotations (POST)
                               api/download     edits -> the annotations as a file for the browser (POST)
                               media/N          the file of video N (GET, ranges)

Other sites are kept out three times: they don't know the token, their Origin differs, and a name of theirs that leads
to 127.0.0.1 is not a Host that is answered. Files are named by number, so no path comes from outside.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from re2tal.structures import Action
from re2tal.viewer.annotation_file import Conflict
from re2tal.viewer.catalog import Catalog
from re2tal.viewer.media import send_media

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 25
HOSTS = ("127.0.0.1", "localhost")
PAGE = {
    "": "text/html",
    "style.css": "text/css",
    **{
        f"{name}.js": "text/javascript"
        for name in (
            "app",
            "api",
            "buttons",
            "details",
            "edits",
            "filters",
            "keys",
            "list",
            "player",
            "saving",
            "timeline",
        )
    },
}
"""The page's own files, and what they are."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ViewerServer(ThreadingHTTPServer):
    """Serves one catalog until `shutdown`; port 0 takes a free one.

    Raises OSError naming the port if it is taken.
    """

    # A browser holds connections open; they must not keep the program from ending.
    daemon_threads = True

    def __init__(self, catalog: Catalog, *, port: int) -> None:
        self.catalog = catalog
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((HOSTS[0], port), _Handler)
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} cannot be used ({error}); --port 0 picks a free one") from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOSTS[0]}:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while a video is sent is no fault."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.exception("a request failed")


class _Refused(Exception):
    """A request that gets an error: status and what to say."""

    def __init__(self, status: int, **content: Any) -> None:
        super().__init__(status)
        self.status, self.content = status, content


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    # Ranges, and connections that stay open, need 1.1.
    protocol_version = "HTTP/1.1"
    server_version = "re2tal"
    # Nobody has to know the version of Python.
    sys_version = ""
    # An idle connection would hold its thread for ever.
    timeout = 60
    server: ViewerServer

    def do_GET(self) -> None:
        """The page, the list, one video."""
        self._answer(lambda: self._get(self._place()))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Edits."""
        self._answer(lambda: self._send_json(self._post(self._place(), self._content())))

    def _answer(self, work: Callable[[], None]) -> None:
        """Do it, or tell the page in one sentence why not."""
        try:
            work()
        except _Refused as refused:
            self.close_connection = True  # its body may be unread
            self._send_json(refused.content, status=refused.status)
        except Conflict as conflict:
            content = {"error": str(conflict), "revision": conflict.revision, "both": list(conflict.both)}
            self._send_json(content, status=409)
        # Conflict is a ValueError too, so it comes before.
        except ValueError as error:
            self._send_json({"error": str(error)}, status=422)
        # Nobody is there to be told; they are OSErrors too, so this comes first.
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            self._send_json({"error": str(error)}, status=507)

    def end_headers(self) -> None:
        """The same protection for every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing on the terminal: the address would be between the lines."""
        logger.debug(format, *values)

    def _place(self) -> str:
        """What is asked for, behind the token; refuses requests that other sites may have caused."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.rpartition(":")[0] not in HOSTS or origin not in (None, f"http://{host}"):
            raise _Refused(403, error="this page answers to its own address only")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _Refused(403, error="this page answers to its own address only")
        token, _, place = self.path.partition("?")[0].removeprefix("/").partition("/")
        # In constant time: how long a comparison takes says nothing of the token.
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(404, error="nothing is here; use the address that `re2tal view` printed")
        return place

    def _get(self, place: str) -> None:
        catalog = self.server.catalog
        if place in PAGE:
            self._send((files("re2tal.viewer") / "page" / (place or "index.html")).read_bytes(), kind=PAGE[place])
        elif place == "api/videos":
            self._send_json(catalog.summary())
        elif place == "api/state":
            self._send_json({"revision": catalog.annotations.state().revision})
        elif place.startswith("api/video/"):
            self._send_json(catalog.detail(self._index(place.removeprefix("api/video/"))))
        elif place.startswith("media/"):
            media = catalog.videos[self._index(place.removeprefix("media/"))].media
            if media is None or not media.path.is_file():
                raise _Refused(404, error="this video has no file, or no longer")
            send_media(self, media)
        else:
            raise _Refused(404, error="nothing is here")

    def _post(self, place: str, content: dict[str, Any]) -> dict[str, Any]:
        catalog = self.server.catalog
        if place == "api/types":
            return catalog.typed(self._index(str(content.get("video"))), _actions(content.get("actions")))
        if place not in ("api/save", "api/download"):
            raise _Refused(404, error="nothing is here")
        edits = [
            catalog.edit(self._index(str(one["video"])), _actions(one["base"]), _actions(one["actions"]))
            for one in content["edits"]
        ]
        if place == "api/save":
            merge = content.get("merge") is True
            state = catalog.annotations.save(edits, revision=str(content["revision"]), merge=merge)
            return {"revision": state.revision, "path": str(catalog.annotations.save_to)}
        state = catalog.annotations.state()
        document = catalog.annotations.apply(state, edits, revision=state.revision, merge=True)
        return {"name": catalog.annotations.save_to.name, "document": document}

    def _index(self, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= len(self.server.catalog.videos):
            raise _Refused(404, error=f"there is no video {text[:20]!r}")
        return int(text)

    def _content(self) -> dict[str, Any]:
        """The JSON object in the request's body."""
        # A form of another site can send anything but this type.
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, error="send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length) or int(length) > MAX_BODY_BYTES:
            raise _Refused(413, error=f"send at most {MAX_BODY_BYTES} bytes, and say how many")
        try:
            content = json.loads(self.rfile.read(int(length)))
            fits = isinstance(content, dict) and all(
                isinstance(one, dict) and {"video", "base", "actions"} <= one.keys() for one in content.get("edits", [])
            )
        except (ValueError, RecursionError, TypeError):
            fits = False
        if not fits or ("edits" in content and not isinstance(content.get("revision", ""), str)):
            raise _Refused(400, error="this is not what the page sends; reload it")
        return content

    def _send_json(self, content: Any, *, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), kind="application/json", status=status)

    def _send(self, body: bytes, *, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _actions(rows: Any) -> tuple[Action, ...]:
    """From [[start, end, label], ...]; finite numbers only."""
    try:
        actions = [Action(float(start), float(end), str(label)) for start, end, label in rows]
    except (TypeError, ValueError, OverflowError):
        raise _Refused(400, error="actions must be lists of [start, end, label]") from None
    # NaN is not below anything.
    if any(not abs(second) < 1e12 for one in actions for second in (one.start_seconds, one.end_seconds)):
        raise _Refused(400, error="actions must start and end at finite seconds")
    return tuple(actions)
