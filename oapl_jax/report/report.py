"""The report of a run: ``report.html``, a page that needs nothing else, and its main curves as a picture.

``oapl-jax report RUN`` reads the run directory and writes ``report.html`` and ``curves.png`` into it. Training calls
``write_report`` when it ends. The report of an unfinished or incomplete run says what is missing, and which files of the
rollout log cannot be read.
"""

import sys
from collections.abc import Sequence

from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import say
from oapl_jax.report import page, picture, reservoir
from oapl_jax.report.record import RunRecord, read_run
from oapl_jax.types import RunError

REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"


def write_report(run_dir: SharedPath, *others: SharedPath) -> SharedPath:
    """Writes both files into the run directory and returns the path of the page; other runs are compared with it.

    A line on standard error names each file of a log or of a batch record that cannot be read.

    Raises:
        RunError: a file of a run is damaged, or the report cannot be written.
    """
    try:
        records = read_runs([run_dir, *others])
        storage.replace(run_dir / CURVES_FILE, picture.draw(records[0].metrics))
        storage.replace(run_dir / REPORT_FILE, page.render(records).encode())
    except Exception as error:  # whatever is in the files
        reason = str(error).partition("\n")[0]
        raise RunError(f"{run_dir}: no report was written: {type(error).__name__}: {reason}") from error
    for record in records:
        for problem in record.log.damaged:
            say(f"{record.directory}: not in the report: {problem}", sys.stderr)
    return run_dir / REPORT_FILE


def read_runs(run_dirs: Sequence[SharedPath]) -> list[RunRecord]:
    """The runs of a page, which share the rollouts that it may show."""
    return [read_run(run_dir, reservoir.MOST_ROLLOUTS // len(run_dirs)) for run_dir in run_dirs]
