"""A real HTTP server for judges: a script says what it answers to each request, in their order."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Step:
    """One answer. cut: bytes that the length announces and that never come. wait: seconds before anything is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    cut: int = 0
    drop: bool = False


@dataclass
class Server:
    """url: up to the version. requests: (path, headers, decoded body, time) as they came. busiest: most at a time."""

    url: str = ""
    requests: list[tuple[str, dict[str, str], Any, float]] = field(default_factory=list)
    busiest: int = 0
    active: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def openai(text: str | None, prompt_tokens: int = 10, completion_tokens: int = 3) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).encode()


def anthropic(text: str) -> bytes:
    usage = {"input_tokens": 7, "output_tokens": 2}
    return json.dumps({"content": [{"type": "text", "text": text}], "usage": usage}).encode()


@contextmanager
def serving(answer: Callable[[int, Any], Step]) -> Iterator[Server]:
    """Serve `answer(number of the request, decoded body)` on a free port of this machine."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                number = len(server.requests)
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.path, headers, body, time.monotonic()))
                server.active += 1
                server.busiest = max(server.busiest, server.active)
            try:
                self._send(answer(number, body))
            finally:
                with server.lock:
                    server.active -= 1

        def _send(self, step: Step) -> None:
            time.sleep(step.wait)
            self.close_connection = bool(step.drop or step.cut)
            if step.drop:
                return
            try:
                self.send_response(step.status)
                for name, value in step.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(step.body) + step.cut))
                self.end_headers()
                self.wfile.write(step.body)
            except OSError:  # the client has given up waiting
                pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that has given up waiting
                super().handle_error(request, client_address)

    http = Quiet(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
