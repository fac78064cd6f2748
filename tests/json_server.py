"""A server on this machine that answers posted JSON as it is told, or fails to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTML = object()  # a reply that is no JSON
BROKEN = object()  # one that ends before its announced length


class JsonServer:
    """Replies in order, the last one again and again: anything JSON, a function of the body that gives it, an int for a
    status, a float for seconds before it says null, HTML or BROKEN. `requests` are (path, headers, body)."""

    def __init__(self, *replies: Any):
        self.replies, self.requests = list(replies), []
        self.waiting, lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if isinstance(reply, Callable):  # type: ignore[arg-type]
                    reply = reply(body)
                if isinstance(reply, float):
                    outer.waiting.wait(reply)
                    reply = None
                self.send_response(reply if type(reply) is int else 200)
                if reply is BROKEN:
                    self.send_header("Content-Length", "500")
                self.end_headers()
                if reply is BROKEN:
                    self.wfile.write(b'{"choices": ')
                    return
                said = "not now" if type(reply) is int else reply
                self.wfile.write(b"<html>" if reply is HTML else json.dumps(said).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def close(self) -> None:
        self.waiting.set()
        self.server.shutdown()
        self.server.server_close()
