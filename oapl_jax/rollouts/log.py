"""The rollout log: append-only Parquet files, a folder for each policy version."""

import contextlib
import hashlib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.io import json_lines, storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts import schema
from oapl_jax.types import FinishReason, RolloutGroup, Verdict
from oapl_jax.untrusted import parquet

PART = re.compile(r"part-([0-9]{6}|[1-9][0-9]{6,8})\.parquet")


class RolloutLog:
    """``rollouts/VERSION/part-NNNNNN.parquet`` under a run directory."""

    def __init__(self, directory: SharedPath, sampling: dict[str, Any] | None = None):
        """Opens a log, which need not exist; ``sampling`` is written with each group: what it was drawn with."""
        self.directory, self.sampling = directory, sampling
        self.engines: Mapping[int, dict[str, Any]] = {}
        """For the metadata too: what draws the groups of a policy version, where that is known."""
        self._next_part: dict[int, int] = {}

    def append(self, groups: Sequence[RolloutGroup]) -> SharedPath:
        """Writes groups of one policy version as one file, whole or not at all; returns when a crash cannot undo it."""
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
        table, content = schema.to_table(groups, self.sampling, self.engines.get(version)), io.BytesIO()
        pq.write_table(table, content, compression="zstd", write_page_checksum=True)
        path = self.path(version, part)
        if storage.create(path, content.getvalue()):
            return True
        # The answer to a first attempt may be lost; then these very bytes are there.
        return not storage.is_local(path) and storage.read(path) == content.getvalue()

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
                raise ValueError(f"{self.folder(version)}: group {after.id} is in the rollout log twice")
        return groups

    def versions(self) -> list[int]:
        """Policy versions that have rollouts, ascending."""
        return storage.numbers(self.directory)

    def remove_before(self, version: int) -> None:
        """Removes the rollouts of older versions."""
        for old in self.versions():
            if old < version:
                storage.remove(self.folder(old))

    def parts(self, version: int) -> list[int]:
        """Numbers of the files of a policy version, ascending."""
        matches = map(PART.fullmatch, storage.names(self.folder(version)))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, version: int, part: int) -> SharedPath:
        """The file of a number."""
        return self.folder(version) / f"part-{part:06d}.parquet"

    def folder(self, version: int) -> SharedPath:
        """The folder of a policy version."""
        return self.directory / f"{version:06d}"

    def read_part(self, version: int, part: int, limits: parquet.Limits | None = None) -> list[RolloutGroup]:
        """The groups of one file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is torn, beyond ``limits``, or of another schema, version or sampling distribution.
        """
        path = self.path(version, part)
        table = _read_table(path, limits=limits)
        if (problem := schema.sampling_problem(table.schema, self.sampling or {})) is not None:
            raise ValueError(f"{path}: {problem}")
        groups = schema.from_table(table, str(path))
        for group in groups:
            if group.policy_version != version:
                raise ValueError(f"{path}: has group {group.id}, of another policy version than its folder")
        return groups

    def read_columns(
        self, version: int, part: int, columns: list[str], limits: parquet.Limits | None = None
    ) -> pa.Table:
        """Some columns of one file, without its other ones.

        Raises:
            ValueError: the file cannot be read, is beyond ``limits`` or of a newer schema, or lacks a required column.
        """
        path = self.path(version, part)
        return schema.select(_read_table(path, columns, limits), columns, str(path))

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
    """``batches.jsonl``: which groups formed the batch of each step; a resumed run forms the recorded ones again."""

    def __init__(self, path: SharedPath, delete_after: int | None = None):
        """Reads what a former process recorded; a changed config does the steps after ``delete_after`` in another way.

        Raises:
            ValueError: for a damaged line, unless it is the last one, which a crash tore.
        """
        self._path = path
        self._lines, kept = json_lines.open_lines(path, lambda step: delete_after is None or step <= delete_after)
        self._recorded = {row["step"]: digests_of(row, f"{path}: step {row['step']}") for row in kept}
        self._digests = {name: digest for batch in self._recorded.values() for name, digest in batch.items()}

    def indices(self, step: int) -> list[int] | None:
        """Indices in their window of the groups of a step's batch, where a former process recorded it; else None."""
        batch = self._recorded.get(step)
        return None if batch is None else [int(name.rpartition("-")[2]) for name in batch]

    def digest(self, group_id: str) -> str | None:
        """Digest of a group that was trained on; None for any other."""
        return self._digests.get(group_id)

    def has_version(self, version: int) -> bool:
        """Whether groups of this policy version were trained on."""
        return any(name.startswith(f"{version:06d}-") for name in self._digests)

    def record(self, step: int, version: int, digests: dict[str, str]) -> None:
        """Appends the batch of a step, ids and digests of its groups, or checks it against the one recorded before a crash.

        When this returns, the line survives a crash: no step is trained whose batch cannot be formed again.

        Raises:
            ValueError: when a replayed step consumes other groups than it did.
        """
        if step in self._recorded:
            before = self._recorded[step]
            if list(before) != list(digests):
                raise ValueError(
                    f"{self._path}: step {step} consumed groups {list(before)} before the restart and"
                    f" {list(digests)} now; the rollout log or the config was changed in between"
                )
            for name, digest in digests.items():
                if before[name] != digest:
                    raise ValueError(
                        f"{self._path}: step {step} consumed another group {name} before the restart than the rollout log"
                        " has now; put its file back"
                    )
            return
        row = {"step": step, "policy_version": version, "groups": list(digests), "digests": list(digests.values())}
        self._lines.append(row, is_durable=True)


def digests_of(row: dict[str, Any], where: str) -> dict[str, str]:
    """Ids and digests of the groups of a line of ``batches.jsonl``, in the order of the batch.

    Raises:
        ValueError: it is none; names ``where``.
    """
    names, digests = row.get("groups"), row.get("digests")
    has_version = type(row.get("policy_version")) is int
    if not has_version or not isinstance(names, list) or not isinstance(digests, list) or len(names) != len(digests):
        raise ValueError(
            f"{where}: needs a policy_version and one digest for each group; the line is damaged, or of another release"
        )
    if not all(isinstance(text, str) for text in (*names, *digests)) or not all(map(schema.NAME.fullmatch, names)):
        raise ValueError(f"{where}: its groups are not ids and digests: {names!r:.80}")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: a group is in the batch twice")
    return dict(zip(names, digests, strict=True))


def digest(group: RolloutGroup) -> str:
    """Digest of what a train step reads of a group, in 16 digits."""
    found = hashlib.sha256(group.id.encode() + np.asarray(group.prompt.token_ids, np.int32).tobytes())
    for item in group.rollouts:
        numbers = float(item.advantage), float(item.grade.reward), len(item.rollout.token_ids)
        found.update(f"{numbers} {item.grade.verdict}".encode())
        found.update(np.asarray(item.rollout.token_ids, np.int32).tobytes())
        found.update(np.asarray(item.rollout.logprobs, np.float32).tobytes())
    return found.hexdigest()[:16]


def _read_table(path: SharedPath, columns: list[str] | None = None, limits: parquet.Limits | None = None) -> pa.Table:
    content = storage.read(path, None if limits is None else limits.num_bytes)
    return parquet.read(content, path, lambda names: [n for n in names if columns is None or n in columns], limits)
