"""The rollout log: append-only Parquet files, a folder for each policy version."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.io import json_lines, storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts import schema
from oapl_jax.types import FinishReason, RolloutGroup, Verdict
from oapl_jax.untrusted import parquet

PART = re.compile(r"part-(\d+)\.parquet")


class RolloutLog:
    """``rollouts/VERSION/part-NNNNNN.parquet`` under a run directory."""

    def __init__(self, directory: SharedPath, sampling: dict[str, float] | None = None):
        """Opens a log, which need not exist; ``sampling`` is written with each group: what it was drawn with."""
        self.directory, self.sampling = directory, sampling
        self._next_part: dict[int, int] = {}

    def append(self, groups: Sequence[RolloutGroup]) -> SharedPath:
        """Writes groups of one policy version as one file, whole or not at all.

        When this returns, the groups survive a crash of the process and of the machine.
        """
        (version,) = {group.policy_version for group in groups}
        part = self._next_part.get(version)
        if part is None:
            part = max(self.parts(version), default=-1) + 1
        while not self.create(part, groups):
            part += 1
        self._next_part = {version: part + 1}  # of the newest only: the log of a long run has many
        return self.path(version, part)

    def create(self, part: int, groups: Sequence[RolloutGroup]) -> bool:
        """Writes groups of one policy version as the file of this number; False where that is written already."""
        (version,) = {group.policy_version for group in groups}
        content = io.BytesIO()
        pq.write_table(schema.to_table(groups, self.sampling), content, compression="zstd", write_page_checksum=True)
        return storage.create(self.path(version, part), content.getvalue())

    def read(self, version: int) -> list[RolloutGroup]:
        """All groups of a policy version, by index; empty where there are none.

        Raises:
            ValueError: for an unreadable file, another schema, or a group that was written twice.
        """
        groups: list[RolloutGroup] = []
        for part in self.parts(version):
            with contextlib.suppress(FileNotFoundError):  # moved away, and still listed by an object store
                groups += self.read_part(version, part)
        groups.sort(key=lambda group: group.index)
        for before, after in itertools.pairwise(groups):
            if before.index == after.index:
                raise ValueError(f"{self._folder(version)}: group {after.id} is in the rollout log twice")
        return groups

    def versions(self) -> list[int]:
        """Policy versions that have rollouts, ascending."""
        return sorted(int(name) for name in storage.names(self.directory) if name.isdigit())

    def parts(self, version: int) -> list[int]:
        """Numbers of the files of a policy version, ascending."""
        matches = map(PART.fullmatch, storage.names(self._folder(version)))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, version: int, part: int) -> SharedPath:
        """The file of a number."""
        return self._folder(version) / f"part-{part:06d}.parquet"

    def _folder(self, version: int) -> SharedPath:
        return self.directory / f"{version:06d}"

    def read_part(self, version: int, part: int) -> list[RolloutGroup]:
        """The groups of one file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is torn, or of another schema.
        """
        path = self.path(version, part)
        return schema.from_table(_read_table(path), str(path))

    def read_columns(self, version: int, part: int, columns: list[str]) -> pa.Table:
        """Some columns of one file, without its other ones.

        Raises:
            ValueError: the file cannot be read, is of a newer schema, or lacks a required column.
        """
        path = self.path(version, part)
        return schema.select(_read_table(path, columns), columns, str(path))

    def count(self, version: int) -> dict[str, float]:
        """Groups and rollouts of a version that has any, and the means over its rollouts; decodes no tokens."""
        columns = ["group_id", "reward", "verdict", "finish_reason"]
        parts = [self.read_columns(version, part, columns) for part in self.parts(version)]
        rows = pa.concat_tables(parts).to_pydict()
        num_rollouts, rewards = len(rows["verdict"]), [reward for reward in rows["reward"] if reward is not None]
        return {
            "groups": len(set(rows["group_id"])),
            "rollouts": num_rollouts,
            "correct": rows["verdict"].count(Verdict.CORRECT) / num_rollouts,
            "invalid": rows["verdict"].count(Verdict.INVALID) / num_rollouts,
            "truncated": rows["finish_reason"].count(FinishReason.LENGTH) / num_rollouts,
            "reward": sum(rewards) / max(1, len(rewards)),
        }


class BatchRecord:
    """``batches.jsonl``: which groups formed the batch of each learner step.

    A resumed run repeats the steps that it had recorded before it was killed; their batches must be
    formed again from the same groups, or the run would not be the one it claims to resume.
    """

    def __init__(self, path: pathlib.Path, delete_after: int | None = None):
        """Reads what a former process recorded, but for a last line that a crash tore.

        Steps beyond ``delete_after`` are deleted: a changed config will do them in another way.

        Raises:
            ValueError: for a damaged line.
        """
        self._path = path
        kept = json_lines.keep(path, lambda step: delete_after is None or step <= delete_after)
        self._recorded: dict[int, list[str]] = {row["step"]: row["groups"] for row in kept}

    def groups(self, step: int) -> list[str] | None:
        """Ids of the groups of a step's batch, as a former process recorded it; None where it did not."""
        return self._recorded.get(step)

    def record(self, step: int, version: int, group_ids: list[str]) -> None:
        """Appends the batch of a step, or checks it against the one recorded before a crash.

        When this returns, the line survives a crash: no step is trained whose batch cannot be formed again.

        Raises:
            ValueError: when a replayed step consumes other groups than it did.
        """
        if step in self._recorded:
            if self._recorded[step] != group_ids:
                raise ValueError(
                    f"{self._path}: step {step} consumed groups {self._recorded[step]} before the restart and"
                    f" {group_ids} now; the rollout log or the config was changed in between"
                )
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "policy_version": version, "groups": group_ids}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read_table(path: SharedPath, columns: list[str] | None = None) -> pa.Table:
    return parquet.read(storage.read(path), path, lambda names: [n for n in names if columns is None or n in columns])
