"""Object stores on the loopback address: moto for S3; for Google's an emulator behind a proxy that adds what it lacks.

The emulator ignores preconditions. ``Proxy`` adds ``ifGenerationMatch=0``, and makes the weather of a real store: answers
of 403, 429 and 503, requests that are cut off before or after they took effect, slow ones, and listings that are late.
"""

import contextlib
import dataclasses
import http.client
import http.server
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import fsspec
import pytest

from oapl_jax.io import storage
from oapl_jax.rollouts.diagnostics import TOKEN_LOGPROBS_FILE

HOST = "127.0.0.1"
FAULTS = ("403", "429", "503", "cut before", "cut after", "cut answer")
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclasses.dataclass
class Weather:
    """What a proxy does to requests; changed while it runs."""

    preconditions: bool = True
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each of ``FAULTS``: the share of requests."""
    seconds: float = 0.0
    """By which every request is late."""
    listing_lag: float = 0.0
    """For how long a listing is answered as it was."""
    num_faults: int = 0


class Proxy(http.server.ThreadingHTTPServer):
    """Stands before a store's server; ``with``: it serves."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, weather: Weather, seed: int = 0):
        super().__init__((HOST, 0), _Handler)
        self.store_port, self.weather, self.random = port, weather, random.Random(seed)
        self.creating, self.listings = threading.Lock(), {}
        self.url = f"http://{HOST}:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def forward(self, method, path, headers, body):
        """Status, headers and body of the store's answer."""
        connection = http.client.HTTPConnection(HOST, self.store_port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self):
        proxy, weather = self.server, self.server.weather
        fault = next((name for name in FAULTS if proxy.random.random() < weather.rates.get(name, 0)), None)
        weather.num_faults += fault is not None
        length, encoding = int(self.headers.get("Content-Length", 0)), self.headers.get("Transfer-Encoding", "")
        if fault == "cut before":
            self.rfile.read(length // 2)
            return self.cut()
        body = self.read_chunks() if encoding == "chunked" else self.rfile.read(length)
        time.sleep(weather.seconds)
        if fault is not None and fault.isdigit():
            return self.answer(int(fault), [], b'{"error": {"message": "slow down"}}')
        status, headers, content = self.ask(body)
        if fault == "cut after":
            return self.cut()
        return self.answer(status, headers, content, is_cut=fault == "cut answer" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815 - names of http.server

    def ask(self, body):
        """The store's answer, or an old one, or that of a precondition."""
        proxy, weather = self.server, self.server.weather
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        if self.command == "GET" and address.path.endswith("/o") and weather.listing_lag:
            at, answer = proxy.listings.get(self.path, (0.0, None))
            if answer is None or time.monotonic() - at > weather.listing_lag:
                answer = proxy.forward("GET", self.path, headers, body)
                proxy.listings[self.path] = time.monotonic(), answer
            return answer
        if weather.preconditions and query.get("ifGenerationMatch") == "0":
            name = query.get("name") or _name_in(body)
            bucket = address.path.split("/b/")[1].split("/")[0]
            with proxy.creating:
                path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
                if proxy.forward("GET", path, {}, b"")[0] == 200:
                    return 412, [], b'{"error": {"message": "a condition did not hold"}}'
                return proxy.forward(self.command, self.path, headers, body)
        return proxy.forward(self.command, self.path, headers, body)

    def read_chunks(self):
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status, headers, content, *, is_cut=False):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self.cut()

    def cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        """Nothing."""


def _name_in(body):
    """Of the object in the JSON part of a multipart upload."""
    return body.split(b'"name": "')[1].split(b'"')[0].decode()


def free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def environment(values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def s3():
    """The address of a bucket in a server of this test's own."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with contextlib.ExitStack() as stack:
        stack.callback(server.wait)
        stack.callback(server.terminate)
        stack.enter_context(environment(settings))
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                break
            assert server.poll() is None
            assert time.monotonic() < end, "the S3 server does not start"
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # those of another server
        s3fs.S3FileSystem().mkdir("runs")
        yield "s3://runs"


@contextlib.contextmanager
def gcs(weather):
    """The address of a bucket in an emulator of this test's own, behind a proxy with this weather."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # that asks over gRPC, which no emulator speaks
    core = pytest.importorskip("gcsfs.core")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server(HOST, port, in_memory=True, default_bucket="runs")
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        proxy = stack.enter_context(Proxy(port, weather))
        settings = {"STORAGE_EMULATOR_HOST": proxy.url, "GOOGLE_CLOUD_PROJECT": "test", "NO_GCE_CHECK": "true"}
        with environment(settings):
            core.GCSFileSystem.clear_instance_cache()
            fsspec.register_implementation("gs", core.GCSFileSystem, clobber=True)
            yield "gs://runs"


def copied(address, folder):
    """A local copy of a run in a store, of which each file of lines is one file."""
    path = storage.shared_path(address)
    store = fsspec.filesystem(address.partition("://")[0], use_listings_cache=False)
    names = [name.partition(f"{path.name}/")[2] for name in store.find(address)]
    storage.get_folder(path, names, folder)
    for name in ("metrics.jsonl", "batches.jsonl", "evaluations.jsonl", "starts.jsonl", TOKEN_LOGPROBS_FILE):
        parts = folder / name
        text = "".join(part.read_text() for part in sorted(parts.iterdir()))
        parts.rename(folder / f"{name}.parts")
        (folder / name).write_text(text)
    return folder
