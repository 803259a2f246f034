"""Windows of rollouts that others collected, between the windows that a run samples (docs/offline.md).

Each file in the folder ``window.imports`` becomes one window, when the next sync is due after it has appeared: its rollouts are
checked, graded where they have no grade, and put into the run's rollout log under a policy version that no sampler gets.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts import import_rollouts
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket, Window
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.import_rollouts import IMPORTS_FOLDER, BadRows, Expectations, Responses
from oapl_jax.rollouts.log import RolloutLog, digest
from oapl_jax.rollouts.source import GroupSource, Taken, Weights, WindowPlan
from oapl_jax.sources.follower import POLICY_FOLDER
from oapl_jax.sources.local import BufferedSource
from oapl_jax.sources.setup import SamplingSetup, acceptance
from oapl_jax.types import Metrics, RolloutGroup
from oapl_jax.weights.policies import MANIFEST_FILE

GROUPS_PER_FILE = 64


def read(
    path: pathlib.Path, config: TrainConfig, tokenizer: Tokenizer, grading: Grading, bad: BadRows
) -> list[Responses]:
    """The groups of a file or folder as a run of this config takes them: checked, within its limits, graded.

    Raises:
        ValueError: as ``import_rollouts.read``.
    """
    expectations = dataclasses.replace(
        Expectations.of(config, tokenizer),
        needs_logprobs=True,
        most_tokens=(config.data.max_prompt_tokens, config.sampler.max_response_tokens),
    )
    return import_rollouts.graded(import_rollouts.read(path, expectations, bad), grading, bad)


def make_groups(version: int, found: Sequence[Responses], grading: Grading) -> list[RolloutGroup]:
    """The groups of a policy version, with the advantages of the objective."""
    return [
        grading.group(Ticket(version, index, index), responses.prompt, responses.members)
        for index, responses in enumerate(found)
    ]


def write(log: RolloutLog, groups: Sequence[RolloutGroup]) -> None:
    """Puts the groups of a policy version into a log that has none of it."""
    for part, start in enumerate(range(0, len(groups), GROUPS_PER_FILE)):
        log.create(part, groups[start : start + GROUPS_PER_FILE])


def counts(groups: Sequence[RolloutGroup], bad: BadRows) -> dict[str, Any]:
    """What became of the records, for people."""
    rollouts = [item for group in groups for item in group.rollouts]
    return {
        "groups": len(groups),
        "rollouts": len(rollouts),
        "correct": sum(item.grade.verdict == "correct" for item in rollouts),
        "left_out": {reason: count for reason, count in bad.counts.items() if count},
        "examples": bad.examples,
    }


class ImportedWindows(BufferedSource):
    """A ``GroupSource``: the windows of another one, and between them one for each file of a folder.

    ``directory``: of the run; ``note`` prints a sentence for the user.
    """

    def __init__(
        self,
        source: GroupSource,
        setup: SamplingSetup,
        directory: SharedPath,
        log: RolloutLog,
        note: Callable[[str], None],
    ):
        super().__init__(GroupBuffer(acceptance(setup.config)), setup.config.window)
        self._source, self._setup, self._log, self._note = source, setup, log, note
        self._records = directory / IMPORTS_FOLDER
        self._folder = pathlib.Path(str(setup.config.window.imports)).expanduser()
        self._window: Window | None = None
        """The one that is open, where it is of a file."""
        self._took_imported = False
        """Whether the last batch was of such a window: at a sync the next one is open before the step is reported."""

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Opens a window of the next file, where there is one; else one of the other source.

        Raises:
            ValueError: as that of the other source; or a file is gone, or another one, before all of it was in the log.
        """
        version, per_batch = window.policy_version, self._setup.groups_per_batch
        published = self._setup.root / POLICY_FOLDER / f"{version:06d}" / MANIFEST_FILE
        has_begun = bool(taken or self._log.parts(version)) or storage.exists(published)
        is_sampled = has_begun and not storage.exists(self._record(version))
        while not is_sampled and not storage.exists(self._record(version)) and (path := self._next_file()):
            self._take_in(path, version)
        if storage.exists(self._record(version)):
            record = storage.read_object(self._record(version))
            groups = self._logged(version, record["digest"])
            if groups is None:
                groups = self._take_in(self._existing(record["source"], version), version)
            steps = sum(map(acceptance(self._setup.config), groups)) // per_batch
            if not steps:
                source = self._folder / record["source"]
                raise ValueError(f"{source}: has changed, and has no batch of version {version}; put it back as it was")
            self._buffer.open_window(Window(version, 0, steps * per_batch), logged=groups, batches=taken)
            self._window = window
            return WindowPlan(steps)
        self._window = None
        return self._source.open_window(window, weights, taken)

    def take(
        self, num_groups: int, is_cancelled: Callable[[], bool], recorded: Sequence[int] | None = None
    ) -> Taken | None:
        """As the other source; imported groups ask no prompt of the stream."""
        self._took_imported = self._window is not None
        if self._window is None:
            return self._source.take(num_groups, is_cancelled, recorded)
        taken = super().take(num_groups, is_cancelled, recorded)
        return taken and Taken(taken.groups, 0, list(self._window.asked_again))

    def report(self) -> Metrics:
        """Those of the other source, and ``window/imported``."""
        metrics = self._source.report() | {"window/imported": int(self._took_imported)}
        return metrics if self._window is None else metrics | {"window/ready_groups": self._buffer.num_ready}

    def finish(self) -> None:
        """No other window comes."""
        self._source.finish()

    def close(self) -> None:
        """Closes the other source."""
        self._source.close()

    def _record(self, version: int) -> SharedPath:
        return self._records / f"{version:06d}.json"

    def _next_file(self) -> pathlib.Path | None:
        """The first file, by name, that no record has."""
        records = [name for name in storage.names(self._records) if name.endswith(".json")]
        done = {storage.read_object(self._records / name)["source"] for name in records}
        files = sorted(self._folder.glob("*")) if self._folder.is_dir() else []
        return next((file for file in files if file.name not in done and not file.name.startswith(".")), None)

    def _existing(self, name: str, version: int) -> pathlib.Path:
        if not (self._folder / name).exists():
            raise ValueError(
                f"{self._folder / name}: is gone, and not all of it is in the log as version {version}; put it back"
            )
        return self._folder / name

    def _logged(self, version: int, wanted: str) -> list[RolloutGroup] | None:
        """The groups of the log; None where a killed process has not written all, or a sampler has written there."""
        with contextlib.suppress(ValueError):
            groups = self._log.read(version)
            return groups if _digest(groups) == wanted else None
        return None

    def _take_in(self, path: pathlib.Path, version: int) -> list[RolloutGroup]:
        """Notes the groups of a file in a record, and puts them into the log, alone.

        A file with too few groups for a batch, or none, has a record that is no version's.
        """
        setup, bad = self._setup, BadRows("drop")
        try:
            found = read(path, setup.config, setup.tokenizer, setup.grading, bad)
        except ValueError as error:
            bad.found("unusable file", str(path), str(error))
            found = []
        groups = make_groups(version, found, setup.grading)
        is_enough = sum(map(acceptance(setup.config), groups)) >= setup.groups_per_batch
        record: dict[str, Any] = {"source": path.name, "policy_version": version if is_enough else None}
        record |= counts(groups, bad) | {"digest": _digest(groups)}
        target = self._record(version) if is_enough else self._records / f"refused-{path.name}.json"
        storage.replace(target, json.dumps(record, indent=2).encode() + b"\n")
        if is_enough:
            storage.remove(self._log.folder(version))
            write(self._log, groups)
        left_out = ", ".join(f"{count:,} x {reason}" for reason, count in record["left_out"].items()) or "none"
        becomes = (
            f"policy version {version}" if is_enough else f"no window: a batch has {setup.groups_per_batch} groups"
        )
        self._note(
            f"{path}: {record['groups']:,} groups, {record['rollouts']:,} rollouts; left out: {left_out}; {becomes}"
        )
        for reason, example in bad.examples.items():
            self._note(f"{reason}, such as {example}")
        return groups


def _digest(groups: Sequence[RolloutGroup]) -> str:
    return hashlib.sha256("".join(map(digest, groups)).encode()).hexdigest()
