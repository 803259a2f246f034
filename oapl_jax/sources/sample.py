"""A detached sampler: fills a run's rollout log with the policies that its trainer publishes.

    python -m oapl_jax sample --run DIR [--engine jax|transformers|package.module:function] [--mesh AXES]

It leases shards of the window's groups, generates, grades, writes them, and follows to the next version. Any
number may come and go, on any machine that sees DIR (a folder, ``gs://`` or ``s3://``); none is needed for the
others. It ends with the run, or within ten seconds of SIGTERM, with code 0. Paths in the run's config are
those of the trainer: start it in the same folder where they are relative.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import uuid
from typing import Any

import jax
from jax.sharding import Mesh

from oapl_jax.build.job import acceptance, make_engines, make_group_maker
from oapl_jax.config import config_file
from oapl_jax.config.schema import MeshConfig, TrainConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes
from oapl_jax.io import run_dir, storage
from oapl_jax.io.lease import Leases
from oapl_jax.io.storage import SharedPath
from oapl_jax.model import hf
from oapl_jax.rewards.grader import make_grader
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.schema import SCHEMA_VERSION
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sampler.replicas import replica_meshes
from oapl_jax.sources import follower
from oapl_jax.sources.local import RequestRunner, Worker
from oapl_jax.weights.policies import Current, Manifest, PolicyGoneError, PolicyStore, VersionLeases

TRANSFORMERS = "oapl_jax.sampler.torch:make"
"""PyTorch is no requirement of any other program, so it is imported by name."""
POLL_SECONDS = 0.3
"""Between two looks for a policy that is to come."""
REPORT_SECONDS = 1.0
DRAIN_SECONDS = 3.0
IDLE_DEADLINE = 4 * 3600.0
"""For how long a sampler waits for a trainer that wants nothing: it may be stopped, or be at a long step."""


class Sampler:
    """One process's part of a run: owns its leases, its worker and its place among the versions.

    Args:
        root: the run's shared folder.
        engine: ``jax``, ``transformers``, or ``package.module:function`` (docs/bring_your_own_sampler.md).
        mesh: axes of this process's devices; the axes other than ``tensor`` are replicas.
        wait_seconds: how long to wait for a run that has not begun.
        stop: set to end.
    """

    def __init__(self, root: SharedPath, engine: str, mesh: str, wait_seconds: float, stop: threading.Event):
        self._root, self._engine, self._mesh_axes, self._stop = root, engine, mesh, stop
        self._wait_seconds = wait_seconds
        self._store = PolicyStore(root / "policy")
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._resources = contextlib.ExitStack()
        self._leases: tuple[Leases | VersionLeases, ...] = ()
        self._next_report, self._beat = 0.0, 0

    def run(self) -> None:
        """Samples until the run is over, or ``stop`` is set.

        Raises:
            ValueError: this process cannot sample for this run; says why.
            TimeoutError: the run does not begin, or a version that is pointed to does not come.
        """
        with self._resources:
            current = self._wait_for(self._store.current, "a published policy")
            if current is None or current.is_finished:
                return
            config = self._read_config()
            with tempfile.TemporaryDirectory(prefix="oapl-policy-") as cache:
                self._sample(config, current, pathlib.Path(cache))

    def give_back(self) -> None:
        """Releases all leases, from another thread, when the process must end with work in hand."""
        for leases in list(self._leases):
            leases.close()

    def _sample(self, config: TrainConfig, current: Current, cache: pathlib.Path) -> None:
        window = config.window
        log = RolloutLog(self._root / "rollouts", dataclasses.asdict(SamplingDistribution.of(config.sampler)))
        leases = self._resources.enter_context(Leases(self._root / follower.LEASES_FOLDER, window.lease_seconds))
        version_leases = VersionLeases(self._root / "leases" / "policies", window.lease_seconds)
        self._resources.callback(version_leases.close)
        self._leases = (leases, version_leases)
        shards = ShardQueue(log, leases, acceptance(config), window.shard_groups)
        worker, version, hold, since = None, -1, None, time.monotonic()
        seen, end, delay = None, time.monotonic() + IDLE_DEADLINE, 0.0
        while not self._stop.is_set():
            if current.is_finished:
                break
            if current.policy_version != version:
                held = None
                with contextlib.suppress(OSError):  # without it the version may be removed, and is then left
                    held = version_leases.claim(current.policy_version, self._name)
                fetched = self._fetch(current.policy_version, run_dir.digest(config), cache)
                if fetched is None:  # the trainer went on meanwhile
                    if held is not None:
                        held.finish()
                    current = self._store.current() or current
                    continue
                manifest, folder = fetched
                if worker is None:
                    worker, load, prompt_lengths = self._make_worker(config, folder, shards)
                    self._resources.callback(worker.stop, DRAIN_SECONDS)
                    params = load(folder)
                    worker.warm_up(params, prompt_lengths)
                    worker.set_weights(current.policy_version, params)
                    worker.start()
                else:
                    shards.open_window(None)
                    worker.set_weights(current.policy_version, load(folder))
                shards.open_window(manifest.window)
                if hold is not None:
                    hold.finish()
                if folder.is_relative_to(cache):  # a copy, which is in memory now
                    shutil.rmtree(folder, ignore_errors=True)
                version, hold, since = current.policy_version, held, time.monotonic()
                say(f"sampling version {version}")
            if shards.failure is not None:
                raise shards.failure
            if seen != (version, shards.num_written):
                seen, end = (version, shards.num_written), time.monotonic() + IDLE_DEADLINE
            if time.monotonic() > end:
                raise TimeoutError(f"version {version} wanted nothing for {IDLE_DEADLINE:g} s; is its trainer running?")
            self._report(worker)
            self._stop.wait(delay)
            start = time.monotonic()
            current = self._store.current() or current
            delay = storage.next_look(time.monotonic() - start, start - since)
        say(f"{shards.num_written} groups written, {shards.num_wasted} made in vain")

    def _make_worker(
        self, config: TrainConfig, folder: pathlib.Path, shards: ShardQueue
    ) -> tuple[Worker, Any, set[int]]:
        """The worker, what loads a version's folder for it, and the lengths of the first prompts."""
        tokenizer = tokenizers.load(config.model.tokenizer, folder)
        grader = make_grader(config)
        self._resources.callback(grader.close)
        prompts = load_prompts(config.data, tokenizer, config.run.seed)
        mesh, _ = make_meshes(MeshConfig(trainer=self._mesh_axes))
        if self._engine != "jax":
            engines, load = _make_foreign_engine(self._engine, config, tokenizer)
        else:
            engines = make_engines(
                config, hf.load_config(folder), tokenizer.vocab_size, tokenizer.stop_ids, replica_meshes(mesh)
            )
            load = functools.partial(_load, mesh=mesh, config=config)
        worker = Worker(
            engines,
            prompts,
            make_group_maker(config, tokenizer, grader),
            shards,
            shards,
            sampling=SamplingDistribution.of(config.sampler),
            group_size=config.sampler.group_size,
            seed=config.run.seed,
            device_lock=threading.RLock() if mesh.size > 1 else contextlib.nullcontext(),
        )
        return worker, load, {len(prompts[i].token_ids) for i in range(config.sampler.groups_in_flight)}

    def _fetch(self, version: int, digest: str, cache: pathlib.Path) -> tuple[Manifest, pathlib.Path] | None:
        """A version's manifest and files; None where it is no longer what the pointer names.

        Raises:
            ValueError: it is for samplers of another config or another program.
            TimeoutError: the pointer goes on naming a version that is not there, or is damaged.
        """
        end, problem = time.monotonic() + self._wait_seconds, None
        while not self._stop.is_set() and time.monotonic() < end:
            current = self._store.current()
            if current is not None and current != Current(version, is_finished=False):
                return None
            try:
                manifest = self._store.manifest(version)
                _check(manifest, digest)
                return manifest, self._store.fetch(version, cache)
            except (PolicyGoneError, OSError) as error:
                if problem is None:
                    say(f"waiting for version {version}: {error}")
                problem = error
            self._stop.wait(POLL_SECONDS)
        if self._stop.is_set():
            return None
        raise TimeoutError(f"waited {self._wait_seconds:g} s for version {version}: {problem}")

    def _wait_for(self, look: Any, what: str) -> Any:
        end = time.monotonic() + self._wait_seconds
        while not self._stop.is_set():
            if (found := look()) is not None:
                return found
            if time.monotonic() > end:
                raise TimeoutError(f"waited {self._wait_seconds:g} s for {what} in {self._root}; is a trainer running?")
            self._stop.wait(POLL_SECONDS)
        return None

    def _read_config(self) -> TrainConfig:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / run_dir.CONFIG_FILE
            path.write_bytes(storage.read(self._root / run_dir.CONFIG_FILE))
            return config_file.load(TrainConfig, path)

    def _report(self, worker: Worker | None) -> None:
        if worker is not None and time.monotonic() >= self._next_report:
            self._next_report, self._beat = time.monotonic() + REPORT_SECONDS, self._beat + 1
            tokens, idle_seconds = worker.sums
            with contextlib.suppress(OSError):  # for people; a full disk must not end the sampling
                follower.write_report(self._root, self._name, self._beat, tokens, idle_seconds)


def _load(folder: pathlib.Path, mesh: Mesh, config: TrainConfig) -> Any:
    """The weights, straight into the sampler's sharding."""
    return jax.block_until_ready(hf.load_params(folder, mesh, SAMPLER_RULES, config.sampler.dtype)[1])


def _make_foreign_engine(name: str, config: TrainConfig, tokenizer: Tokenizer) -> tuple[RequestRunner, Any]:
    """A runner, and what loads a folder for it, of ``package.module:function``."""
    module, _, function = TRANSFORMERS.partition(":") if name == "transformers" else name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function or "make")
    except (ImportError, AttributeError) as error:
        hint = ": pip install -r requirements-torch.txt" if name == "transformers" else ""
        raise ValueError(f"--engine {name}: {error}{hint}") from error
    return make(config, tokenizer)


def _check(manifest: Manifest, digest: str) -> None:
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"the trainer reads rollout logs of schema version {manifest.schema_version}, this program writes version"
            f" {SCHEMA_VERSION}: start samplers of the trainer's release"
        )
    if manifest.config != digest:
        raise ValueError("the run's config is not the one that this sampler has read: start it again")


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
