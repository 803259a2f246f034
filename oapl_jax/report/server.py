"""``oapl-jax report --serve``: the page of runs that may go on, on this machine only."""

import time
import urllib.parse
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from oapl_jax.io.storage import SharedPath
from oapl_jax.report import page
from oapl_jax.report.record import RunRecord
from oapl_jax.report.report import read_runs
from oapl_jax.report.reservoir import LIMITS
from oapl_jax.rollouts.log import RolloutLog

HOST = "127.0.0.1"
"""The loopback address: rollouts are shown to nobody else."""
_SHORTEST, _SHARE = 3.0, 10
"""Least seconds between two readings of the runs, and in units of what a reading took."""


class ReportServer(ThreadingHTTPServer):
    """Reads the runs again when the page asks for it, but for at most a tenth of the time."""

    daemon_threads = True

    def __init__(self, runs: Sequence[SharedPath], port: int = 0):
        """Binds a port, 0: a free one; ``serve_forever`` answers."""
        super().__init__((HOST, port), _Handler)
        self._runs, self._lock = runs, Lock()
        self._read_at, self._cost = -1e9, 0.0
        self._records: list[RunRecord] = []

    @property
    def address(self) -> str:
        """What a browser opens."""
        return f"http://{HOST}:{self.server_port}/"

    def records(self) -> list[RunRecord]:
        """What the runs have now, or had a moment ago."""
        with self._lock:
            start = time.monotonic()
            if start - self._read_at > max(_SHORTEST, _SHARE * self._cost):
                self._records = read_runs(self._runs)
                self._read_at = time.monotonic()
                self._cost = self._read_at - start
            return self._records

    def answer(self, path: str) -> tuple[str, str] | None:
        """Content type and content at a path: the page, its data, or a file of the rollout log; None: nothing."""
        address = urllib.parse.urlsplit(path)
        query = {key: int(values[0]) for key, values in urllib.parse.parse_qs(address.query).items()}
        if address.path == "/":
            return "text/html", page.render(self.records(), is_served=True)
        if address.path == "/data":
            return "application/json", page.to_json(self.records(), is_served=True)
        if address.path == "/rollouts":
            return "application/json", page.dump(self._page(**query))
        return None

    def _page(self, run: int = 0, number: int = 0) -> dict[str, Any]:
        """The groups of one file of the log, of all versions in order, and the number of files."""
        record = self.records()[run]
        log = RolloutLog(record.rollouts_dir)
        places = [(version, part) for version in log.versions() for part in log.parts(version)]
        number = max(0, min(number, len(places) - 1))
        groups = log.read_part(*places[number], LIMITS) if places else []
        return {"number": number, "pages": len(places), "groups": [page.group(item, record) for item in groups]}


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        # Another site that resolves its name to this address must not read the rollouts.
        if self.headers.get("Host") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            self.send_error(403)
            return
        try:
            answer = self.server.answer(self.path)
        except (ValueError, TypeError, OSError, LookupError) as error:  # damaged files, or a query that makes no sense
            self.send_error(500, str(error).partition("\n")[0].encode("ascii", "replace").decode())
            return
        if answer is None:
            self.send_error(404)
            return
        kind, content = answer[0], answer[1].encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in http.server
        """Prints nothing."""
