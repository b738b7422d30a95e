"""Real servers on loopback for tests of sharing: S3 (moto), HTTP, SFTP (sshd), and a proxy that counts bytes and cuts.

No test needs credentials of its own or reaches beyond 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATIENCE = 90.0  # seconds for a server to start on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's S3 in a process of its own; its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MOTO_S3_CUSTOM_ENDPOINTS": "", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"},
    )
    try:
        wait_for(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


class _Ranged(SimpleHTTPRequestHandler):
    """Files of a folder, in ranges too; errors and requests are not logged."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        stop = min(int(asked[2]) + 1 if asked[2] else len(data), len(data))
        part = data[int(asked[1]) : stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Whole(_Ranged):
    """The same without ranges, as `python -m http.server` is."""

    do_GET = SimpleHTTPRequestHandler.do_GET


@contextmanager
def http_server(folder: Path, *, ranges: bool = True) -> Iterator[int]:
    """A web server of `folder`; its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranged if ranges else _Whole, directory=str(folder)))
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]  # a cut connection is wanted
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def sshd() -> str | None:
    """The SSH server of this machine, where it has one."""
    return shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


@contextmanager
def sftp_server(home: Path) -> Iterator[int]:
    """sshd for this user alone, with keys of its own; the client's key lies in `home`/.ssh. Its port."""
    program, port = sshd(), free_port()
    assert program is not None
    keys = home / ".ssh"
    keys.mkdir(parents=True)
    for name in ("id_ed25519", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "authorized_keys").write_text((keys / "id_ed25519.pub").read_text())
    (keys / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized_keys\n"
        f"PidFile {keys}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nMaxStartups 100\n"
        "Subsystem sftp internal-sftp\nLogLevel QUIET\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([program, "-D", "-f", str(keys / "config")], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait()


class Proxy:
    """Passes connections on to a port, counts the bytes of either way, and cuts some in the middle.

    `after(n)` says how many bytes of both ways together any connection lives for once n were cut; None: for ever.
    """

    def __init__(self, port: int, after: Callable[[int], int | None] = lambda number: None) -> None:
        self.target, self.after = port, after
        self.up = self.down = self.connections = self.cuts = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self.up = self.down = self.connections = self.cuts = 0

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            passed = [0]
            for source, sink, way in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._pass, args=(source, sink, way, passed), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str, passed: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    lives = self.after(self.cuts)
                    passed[0] += len(data)
                    if lives is not None and passed[0] > lives:
                        self.cuts += 1
                        passed[0] = -(1 << 60)  # the other way is cut by this one
                        break
                    setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def proxy(port: int, after: Callable[[int], int | None] = lambda number: None) -> Iterator[Proxy]:
    one = Proxy(port, after)
    try:
        yield one
    finally:
        one.close()
