"""A reward server in a thread of the test, whose behaviour the test decides."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    """One request; `asked` is its JSON, `tries` how often its id has come."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    asked: dict[str, Any]
    tries: int
    server: RewardServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked = json.loads(body)
        with self.server.lock:
            self.tries = 1 + sum(seen.id == self.asked["id"] for seen in self.server.seen)
            self.server.seen.append(Seen(self.asked["id"], body, dict(self.headers)))
        self.server.behave(self)

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def scores(self, **changes: Any) -> bytes:
        """The right answer: 1 where the response has an even number of letters; or another one."""
        scores = [
            {"id": item["id"], "score": float(len(item["response"]) % 2 == 0)}
            for item in self.asked["items"]
        ]
        return json.dumps({"id": self.asked["id"], "scores": scores, **changes}).encode()

    def log_message(self, *_: Any) -> None:
        pass


Behaviour = Callable[[Handler], None]


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    id: str
    body: bytes
    headers: dict[str, str]


def healthy(handler: Handler) -> None:
    handler.reply(handler.scores())


class RewardServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1 while it is entered; `seen` are its requests."""

    daemon_threads = True

    def __init__(self, behave: Behaviour = healthy, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.lock = threading.Lock()
        self.seen: list[Seen] = []
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}/score"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what the tests are about."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
