"""A proxy before a real S3 server that spoils a share of the requests, each in a way that networks really do."""

from __future__ import annotations

import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_OF_A_SIGNATURE = ("authorization", "host", "x-amz-date", "x-amz-content-sha256")

FAULTS = ("503", "500", "reset before", "reset after", "cut body", "slow body")


def _signed(method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """The headers with a signature over these, by this process's own keys: the server refuses others."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    unsigned = {name: value for name, value in headers.items() if name.lower() not in _OF_A_SIGNATURE}
    request = AWSRequest(method=method, url=url, headers=unsigned, data=body)
    S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


class FaultProxy:
    """Forwards to `target_url`; `rate` of the requests meet one of `faults`.

    "reset after" lets the server do the work and drops its reply; "cut body" ends a reply half-way, "slow body" stops
    there for a moment. strip: request headers that are taken away, as a store would that does not know them; what is
    left is signed again. `seen` counts what was done; `rate` may be changed while it runs.
    """

    def __init__(
        self,
        target_url: str,
        *,
        rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        strip: tuple[str, ...] = (),
        methods: tuple[str, ...] = ("GET", "PUT", "HEAD", "POST", "DELETE"),
        only: str = "",
        seed: int = 0,
    ):
        target, self.seen, outer = urlsplit(target_url), Counter[str](), self
        self.rate, self._random, self._lock = rate, random.Random(seed), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = ""
                with outer._lock:
                    if self.command in methods and only in self.path and outer._random.random() < outer.rate:
                        fault = outer._random.choice(faults)
                    outer.seen[fault or "well"] += 1
                if fault in ("503", "500"):
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "reset before":
                    self.hang_up()
                    return
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
                headers = dict(self.headers.items())
                if any(name.lower() in strip for name in headers):
                    kept = {name: value for name, value in headers.items() if name.lower() not in strip}
                    headers = _signed(self.command, f"{target_url}{self.path}", kept, body)
                connection.request(self.command, self.path, body=body, headers=headers)
                reply = connection.getresponse()
                data = reply.read()
                connection.close()
                if fault == "reset after":
                    self.hang_up()
                    return
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2])
                    if fault == "slow body":
                        time.sleep(0.3)
                    if fault != "cut body":
                        self.wfile.write(data[len(data) // 2 :])
                if fault == "cut body":
                    self.hang_up()

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

            def hang_up(self) -> None:
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
