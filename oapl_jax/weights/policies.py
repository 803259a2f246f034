"""Published policies: ``policy/VERSION/`` as Hugging Face folders, with a manifest, and a pointer to the newest.

    policy/000003/model.safetensors, config.json, tokenizer files
    policy/000003/manifest.json     written last: a version without it is not there
    policy/current.json             the version that samplers should use

Any engine that reads Hugging Face folders can follow it (docs/bring_your_own_sampler.md).
"""

import contextlib
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.team import Team
from oapl_jax.io import storage
from oapl_jax.io.lease import Lease, Leases
from oapl_jax.io.storage import SharedPath
from oapl_jax.model import hf, qwen
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.schema import SCHEMA_VERSION
from oapl_jax.types import Metrics

MANIFEST_FILE = "manifest.json"
CURRENT_FILE = "current.json"
HASHING_THREADS = 4


class PolicyGoneError(Exception):
    """The version is not there, or no longer: read the pointer again."""


class Current(NamedTuple):
    """What the pointer says."""

    policy_version: int
    is_finished: bool
    """The run is over: samplers end."""


class Manifest(NamedTuple):
    """What a published version is."""

    window: Window
    """What is to be sampled with it."""
    shard_groups: int
    """Groups of a file of the rollout log: file k has the groups from k * shard_groups on."""
    config: str
    """Digest of the run's config: a sampler of another one must not go on."""
    files: dict[str, dict[str, Any]]
    """``bytes`` and ``sha256`` of each file."""
    schema_version: int = SCHEMA_VERSION
    """Schema of the rollout log that the trainer reads."""


class PolicyStore:
    """The folder ``policy`` of a run; one writer, any number of readers."""

    def __init__(self, directory: SharedPath):
        self.directory = directory
        self._newest = -1  # version that was pointed to

    def publish(
        self,
        manifest: Manifest,
        config: qwen.QwenConfig,
        params: Any,
        tokenizer: Tokenizer,
        writers: Team,
        save: Callable[..., Any] = hf.save_folder,
    ) -> Metrics:
        """Writes a version and points to it. One that is whole already, from before a restart, is only pointed to.

        ``manifest`` has no files yet; ``params`` are of ``nnx.split(Qwen(...))[1]``; all ``writers`` call this. ``save``
        writes the folder and takes what ``hf.save_folder`` takes.
        """
        start, version = time.perf_counter(), manifest.window.policy_version
        folder, local = self.folder(version), storage.is_local(self.directory)
        if writers.agree(lambda: self._is_published(manifest), hf.WRITE_DEADLINE):
            if writers.is_leader:
                self._point_to(Current(version, is_finished=False))
            return {"sync/publish_seconds": time.perf_counter() - start, "sync/publish_bytes": 0}
        with storage.folder_for(folder) as written:
            save(written, config, params, tokenizer, writers=writers, is_shared=local)
            written_here = sorted(written.iterdir()) if writers.is_leader or not local else []
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                described_here = dict(pool.map(_describe, written_here))
        files = {name: facts for part in writers.gather(described_here) for name, facts in part.items()}
        if not writers.is_leader:
            return {"sync/publish_seconds": time.perf_counter() - start}
        if local:
            storage.sync_folder(written.parent)
        described = manifest._replace(files=files)._asdict() | {"window": manifest.window._asdict()}
        storage.replace(folder / MANIFEST_FILE, json.dumps(described, indent=1).encode())
        self._point_to(Current(version, is_finished=False))
        num_bytes = sum(file["bytes"] for file in files.values())
        return {"sync/publish_seconds": time.perf_counter() - start, "sync/publish_bytes": num_bytes}

    def _is_published(self, manifest: Manifest) -> bool:
        """Whether the version is whole, from before a restart. Anything else in its place is removed."""
        version = manifest.window.policy_version
        with contextlib.suppress(PolicyGoneError):
            if self.manifest(version)._replace(files={}) == manifest:
                return True
        self._remove(version)
        return False

    def finish(self, policy_version: int) -> None:
        """Marks the run as over, which ends the samplers."""
        self._point_to(Current(policy_version, is_finished=True))

    def current(self) -> Current | None:
        """What the pointer says; None before the first version."""
        try:
            found = Current(**storage.read_object(self.directory / CURRENT_FILE))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return found if _is_count(found.policy_version) and type(found.is_finished) is bool else None

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version all of whose files are there, at their size.

        Raises:
            PolicyGoneError: there is no such version, or it is not whole.
        """
        folder = self.folder(version)
        try:
            raw = storage.read_object(folder / MANIFEST_FILE)
            window = Window(**raw["window"])
            manifest = Manifest(**{**raw, "window": window._replace(asked_again=tuple(window.asked_again))})
            _check(manifest, version)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PolicyGoneError(f"{folder} has no manifest that can be read ({error})") from error
        for name in sorted(manifest.files):
            if not storage.exists(folder / name):  # a listing may be older than the files
                raise PolicyGoneError(f"{folder} lacks {name}, which its manifest names")
        return manifest

    def fetch(self, version: int, cache: pathlib.Path) -> pathlib.Path:
        """A local folder with the version's files, each checked against the manifest; in ``cache`` if it is a copy.

        Raises:
            PolicyGoneError: it is not there, or was removed meanwhile.
            ValueError: a file's content is not what the manifest says.
        """
        manifest, folder = self.manifest(version), self.folder(version)
        try:
            local = storage.get_folder(folder, list(manifest.files), cache / f"{version:06d}")
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                found = dict(pool.map(_describe, [local / name for name in manifest.files]))
        except FileNotFoundError as error:
            raise PolicyGoneError(f"{folder} was removed meanwhile ({error})") from error
        for name, facts in manifest.files.items():
            if found[name] != facts:
                raise ValueError(f"{folder / name} is damaged: it is {found[name]}, its manifest says {facts}")
        return local

    def versions(self) -> list[int]:
        """Versions that have a folder, ascending."""
        return storage.numbers(self.directory)

    def folder(self, version: int) -> SharedPath:
        """Where a version is."""
        return self.directory / f"{version:06d}"

    def collect(self, leases: "VersionLeases", keep: int = 2, patience: float = math.inf) -> list[int]:
        """Removes versions before the newest ``keep`` that no sampler uses, and their leases; returns them.

        A sampler may use one for ``patience`` seconds after it was seen here to be old.
        """
        versions = [version for version in self.versions() if version <= self._newest]  # not what others put there
        old = versions[:-keep]
        in_use = leases.in_use(versions[-keep], patience) if old else set()
        removed = [version for version in old if version not in in_use]
        for version in removed:
            self._remove(version)
        return removed

    def _remove(self, version: int) -> None:
        """The manifest first: what is half removed is not there. Of a link to another folder the link alone."""
        folder = self.folder(version)
        if not (storage.is_local(folder) and pathlib.Path(str(folder)).is_symlink()):
            storage.remove(folder / MANIFEST_FILE)
        storage.remove(folder)

    def _point_to(self, current: Current) -> None:
        self._newest = current.policy_version
        storage.replace(self.directory / CURRENT_FILE, json.dumps(current._asdict()).encode() + b"\n")


class VersionLeases(Leases):
    """Who uses which version: a lease for each pair of version and process, which no other process needs."""

    def use(self, version: int, name: str) -> Lease | None:
        """Says that a process of this name uses a version."""
        return self.claim(f"{version:06d}-{name}")

    def in_use(self, before: int, patience: float = math.inf) -> set[int]:
        """Versions before this one that a living process uses; the leases of all others are finished.

        A process that has fallen silent counts as living until the expiry.
        """
        found = set()
        for name in sorted({file.rpartition(".")[0] for file in storage.names(self._directory)}):
            version = name.partition("-")[0]
            if not storage.VERSION.fullmatch(version) or int(version) >= before:
                continue
            with contextlib.suppress(OSError):  # a name that no process can have claimed
                if (lease := self.claim(name, patience)) is None:
                    found.add(int(version))
                else:
                    lease.finish()
        return found

    def close(self) -> None:
        """Finishes the leases of this process."""
        for lease in list(self._held.values()):
            lease.finish()
        super().close()


def _check(manifest: Manifest, version: int) -> None:
    """Raises ValueError where a field has another type, or a file would lie outside the version's folder."""
    *numbers, asked_again = manifest.window
    counts = all(map(_is_count, (*numbers, *asked_again, manifest.shard_groups, manifest.schema_version)))
    if not counts or manifest.window.policy_version != version or not isinstance(manifest.files, dict):
        raise ValueError("it is not one of this version, or has other fields")
    for name in manifest.files:
        if name != pathlib.PurePath(name).name or name in ("", "..") or "\0" in name:
            raise ValueError(f"it names the file {name!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _describe(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.name, {"bytes": path.stat().st_size, "sha256": digest}
