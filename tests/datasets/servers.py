"""Real servers on loopback, for tests of remote shards."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

_NGINX_CONFIG = """
{user}
daemon off;
master_process off;
pid {folder}/pid;
events {{ worker_connections 256; }}
http {{
    log_format ranges '$request_method $uri $status $http_range $body_bytes_sent';
    access_log {folder}/access.log ranges;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /secret/ {{ return 403; }}
    }}
}}
"""


class Request(NamedTuple):
    """A line of the access log: `bytes` were sent of the range `range`, None where the whole file was asked for."""

    method: str
    uri: str
    status: int
    range: str | None
    bytes: int


class Nginx:
    """nginx in the foreground, serving `root`; below ``/whole/`` the same files without ranges."""

    def __init__(self, binary: str, root: Path, folder: Path) -> None:
        self._binary, self._folder, self.port = binary, folder, free_port()
        user = "user root;" if os.geteuid() == 0 else ""  # else it may not read what pytest keeps private
        config = _NGINX_CONFIG.format(user=user, folder=folder, root=root, port=self.port)
        (folder / "nginx.conf").write_text(config)
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [self._binary, "-p", str(self._folder), "-c", "nginx.conf", "-e", str(self._folder / "error.log")]
        self._process = subprocess.Popen(command)
        wait_for_port(self.port)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process = None

    def requests(self, method: str = "GET") -> list[Request]:
        """Those of this method so far, in order."""
        found = []
        for line in (self._folder / "access.log").read_text().splitlines():
            verb, uri, status, span, size = line.split(" ")
            if verb == method:
                found.append(Request(verb, uri, int(status), None if span == "-" else span, int(size)))
        return found

    def forget(self) -> None:
        """Empties the access log."""
        os.truncate(self._folder / "access.log", 0)


class FlakyServer:
    """Serves one file with ranges. The first answers to GET follow `script`: a status, or ``cut`` in the middle."""

    def __init__(self, data: bytes, script: list[int | str], versions: bool = True) -> None:
        self.answers: list[int | str] = []
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._begin(200, len(data))

            def do_GET(self) -> None:
                act = script.pop(0) if script else "ok"
                flaky.answers.append(act)
                if isinstance(act, int):
                    self._begin(act, 0)
                    return
                bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
                assert bounds is not None
                first, last = int(bounds[1]), int(bounds[2])
                part = data[first : last + 1]
                self._begin(206, len(part), f"bytes {first}-{last}/{len(data)}")
                self.wfile.write(part[: len(part) // 2] if act == "cut" else part)
                if act == "cut":
                    self.close_connection = True

            def _begin(self, status: int, size: int, span: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(size))
                if versions:
                    self.send_header("ETag", '"flaky"')
                if span:
                    self.send_header("Content-Range", span)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/x.tar"

    def __enter__(self) -> FlakyServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def find_nginx() -> str | None:
    """The binary; Debian keeps it where users do not look."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, seconds: float = 30.0) -> None:
    """Until someone listens."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
