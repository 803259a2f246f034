"""Writes ``report.html`` and ``curves.png`` into a run directory, or serves the page of a run that goes on."""

import argparse

from oapl_jax.io.run_dir import check_release
from oapl_jax.io.storage import shared_path
from oapl_jax.io.terminal import say
from oapl_jax.report.report import write_report
from oapl_jax.report.server import ReportServer


def main(argv: list[str]) -> None:
    """Exit code 2 where there is no such run, or the port is taken."""
    parser = argparse.ArgumentParser(prog="oapl-jax report", description="Writes the report of a run.")
    runs = (
        "run directories, such as runs/quickstart; the page is written into the first, and compares it with the others"
    )
    serve = "write nothing; show the page to this machine's browser, follow the run, and page through all its rollouts"
    parser.add_argument("runs", type=shared_path, nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--serve", action="store_true", help=serve)
    parser.add_argument("--port", type=int, default=8722, help="of --serve; 0: any free one")
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        check_release(run)
    if not arguments.serve:
        say(write_report(*arguments.runs))
        return
    try:
        server = ReportServer(arguments.runs, arguments.port)
    except OSError as error:
        raise ValueError(f"--port {arguments.port}: {error.strerror}; give another one") from None
    with server:
        say(f"{server.address} (Ctrl-C ends it)")
        server.serve_forever()
