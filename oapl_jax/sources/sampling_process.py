"""The loop of a detached sampler: fills a run's rollout log with the policies that its trainer publishes.

It leases shards of the window's groups, generates, grades, writes them, and follows to the next version. Any number of
such processes may come and go, on any machine that sees the run's shared folder (``gs://`` or ``s3://`` too); none is
needed for the others. Paths in the run's config are those of the trainer: start it in the same folder where they are
relative.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax

from oapl_jax.build.sampler import make_sampler
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.data.prompts import HeldOut, load_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes
from oapl_jax.distributed.team import Team
from oapl_jax.io import run_dir, storage, terminal
from oapl_jax.io.lease import Leases
from oapl_jax.io.storage import SharedPath
from oapl_jax.model import hf
from oapl_jax.rewards.grader import make_grader
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Sampler, SamplingDistribution
from oapl_jax.rollouts.schema import SCHEMA_VERSION
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sampler.engine_process import EngineProcess
from oapl_jax.sources import follower
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.sources.setup import SamplingSetup, acceptance, make_grading
from oapl_jax.sources.turns import SamplerTurns
from oapl_jax.weights.policies import Current, Manifest, PolicyGoneError, PolicyStore, VersionLeases

ENGINES = {"transformers": "oapl_jax.sampler.pytorch:make", "vllm": "oapl_jax.sampler.engine_process:make_vllm"}
"""Engines other than ours. PyTorch is no requirement of any other program, so they are imported by name."""
POLL_SECONDS = 0.3
DRAIN_SECONDS = 3.0
IDLE_DEADLINE = 4 * 3600.0
"""For how long a sampler waits for a trainer that wants nothing: it may be stopped, or be at a long step."""


class SamplingProcess:
    """One process's part of a run: owns its leases and its sampling loop.

    Args:
        root: the run's shared folder.
        engine: ``jax``, a name in ``ENGINES``, or ``package.module:function`` (docs/bring_your_own_sampler.md).
        mesh: axes of this process's devices; the axes other than ``tensor`` are replicas.
        wait_seconds: for a run that has not begun.
        stop: set to end.
        options: of the engine, which has to be another one than ours.
    """

    def __init__(
        self,
        root: SharedPath,
        engine: str,
        mesh: str,
        wait_seconds: float,
        stop: threading.Event,
        options: dict[str, Any] | None = None,
    ):
        if engine == "jax" and options:
            raise ValueError(f"--engine jax has no options; remove {', '.join(options)}")
        self._root, self._engine, self._mesh_axes, self._stop = root, engine, mesh, stop
        self._options = options or {}
        self._wait_seconds = wait_seconds
        self._store = PolicyStore(root / follower.POLICY_FOLDER)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._reporter = follower.Reporter(root, self._name)
        self._resources = contextlib.ExitStack()
        self._leases: tuple[Leases, ...] = ()

    def run(self) -> None:
        """Samples until the run is over, or ``stop`` is set.

        Raises:
            ValueError: this process cannot sample for this run; says why.
            TimeoutError: the run does not begin, or a version that is pointed to does not come.
        """
        with self._resources:
            current = self._wait_for_policy()
            if current is None or current.is_finished:
                return
            config = run_dir.read_config(self._root, TrainConfig)
            storage.check_creates_once(self._root / follower.LEASES_FOLDER)
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
        version_leases = VersionLeases(self._root / follower.VERSION_LEASES_FOLDER, window.lease_seconds)
        self._resources.callback(version_leases.close)
        self._leases = (leases, version_leases)
        shards = ShardQueue(log, leases, acceptance(config), window.shard_groups, patience=window.deadline / 2)
        loop, version, hold, since = None, -1, None, time.monotonic()
        seen, end, delay = None, time.monotonic() + IDLE_DEADLINE, 0.0
        while not (self._stop.is_set() or current.is_finished):
            if current.policy_version != version:
                held = None
                with contextlib.suppress(OSError):  # without it the version may be removed, and is then left
                    held = version_leases.use(current.policy_version, self._name)
                fetched = self._fetch(current.policy_version, run_dir.digest(config), cache)
                if fetched is None:  # the trainer went on meanwhile
                    if held is not None:
                        held.finish()
                    current = self._store.current() or current
                    continue
                manifest, folder = fetched
                shards.open_window(None)
                if loop is None:
                    loop, load, weights = self._make_loop(config, folder, shards, log)
                    self._resources.callback(loop.stop, DRAIN_SECONDS)
                else:
                    weights = load(folder)
                loop.set_weights(current.policy_version, weights)
                del weights
                loop.start()
                shards.open_window(manifest.window)
                if hold is not None:
                    hold.finish()
                for copy in sorted(set(cache.iterdir()) - {folder})[:-1]:  # the last one may still be being loaded
                    shutil.rmtree(copy, ignore_errors=True)
                version, hold, since = current.policy_version, held, time.monotonic()
                say(f"sampling version {version}")
            if shards.failure is not None:
                raise shards.failure
            if seen != (version, shards.num_written):
                seen, end = (version, shards.num_written), time.monotonic() + IDLE_DEADLINE
            if time.monotonic() > end:
                raise TimeoutError(f"version {version} wanted nothing for {IDLE_DEADLINE:g} s; is its trainer running?")
            if loop is not None:
                self._reporter.report(loop)
            self._stop.wait(delay)
            start = time.monotonic()
            current = self._store.current() or current
            delay = storage.next_poll(time.monotonic() - start, start - since)
        say(f"{shards.num_written} groups written, {shards.num_wasted} made in vain")

    def _make_loop(
        self, config: TrainConfig, folder: pathlib.Path, shards: ShardQueue, log: RolloutLog
    ) -> tuple[SamplingLoop, Callable[[pathlib.Path], Any], Any]:
        """The loop, with a sampler that has compiled its programs, what loads folders for it, and this folder's weights."""
        tokenizer = tokenizers.load(config.model.tokenizer, folder, config.model.chat_template_kwargs)
        grading = make_grading(config, tokenizer, make_grader(config))
        self._resources.callback(grading.close)
        prompts = load_prompts(config.data, tokenizer, config.run.seed)
        if config.window.publish == "adapters" and self._engine in ("jax", "transformers"):
            raise ValueError(f"the run publishes adapters alone, which --engine {self._engine} cannot load; use vllm")
        if self._engine == "jax":
            sampler, load = self._make_sampler(config, folder, tokenizer)
        else:
            sampler, load = _make_foreign_sampler(self._engine, config, tokenizer, self._options)
            self._resources.callback(sampler.release)
            if isinstance(sampler, EngineProcess):
                log.engines = sampler.facts
        lock, alone = contextlib.nullcontext(), Team.alone()
        setup = SamplingSetup(
            config, tokenizer, prompts, HeldOut(), grading, SamplerTurns(sampler), lock, alone, alone, transfer=None
        )
        weights = load(folder)
        say(f"responses {Stops(tokenizer, setup.distribution)}")
        setup.warm_up(weights)
        return setup.make_loop(shards, shards), load, weights

    def _make_sampler(
        self, config: TrainConfig, folder: pathlib.Path, tokenizer: Tokenizer
    ) -> tuple[Sampler, Callable[[pathlib.Path], Any]]:
        """Our sampler on this process's devices, and what loads weights straight into its sharding."""
        mesh, _ = make_meshes(MeshConfig(trainer=self._mesh_axes))
        architecture = hf.load_config(folder)
        # Two copies of the weights: the next version is loaded while the last one samples.
        sampler = make_sampler(config, architecture, mesh, tokenizer, config.data.max_prompt_tokens, num_copies=2)

        def load(folder: pathlib.Path) -> Any:
            return jax.block_until_ready(hf.load_params(folder, mesh, SAMPLER_RULES, config.sampler.dtype)[1])

        return sampler, load

    def _fetch(self, version: int, digest: str, cache: pathlib.Path) -> tuple[Manifest, pathlib.Path] | None:
        """A version's manifest and files; None where it is no longer what the pointer names.

        Raises:
            ValueError: it is for samplers of another config or another program, or a file is damaged.
            TimeoutError: the pointer goes on naming a version that is not there.
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

    def _wait_for_policy(self) -> Current | None:
        end, is_waiting = time.monotonic() + self._wait_seconds, False
        while not self._stop.is_set():
            if (found := self._store.current()) is not None:
                return found
            if not is_waiting:
                is_waiting = True
                say(f"waiting for a published policy in {self._root}, of a trainer with mode=detached")
            if time.monotonic() > end:
                raise TimeoutError(
                    f"waited {self._wait_seconds:g} s for a published policy in {self._root}; is a trainer running?"
                )
            self._stop.wait(POLL_SECONDS)
        return None


def _make_foreign_sampler(
    name: str, config: TrainConfig, tokenizer: Tokenizer, options: dict[str, Any]
) -> tuple[Sampler, Any]:
    """What ``package.module:function`` makes: a sampler, and what loads a folder for it."""
    module, _, function = ENGINES.get(name, name).partition(":")
    try:
        make = getattr(importlib.import_module(module), function or "make")
    except (ImportError, AttributeError) as error:
        hint = ": pip install -r requirements-torch.txt" if name == "transformers" else ""
        raise ValueError(f"--engine {name}: {error}{hint}") from error
    try:
        inspect.signature(make).bind(config, tokenizer, **options)
    except TypeError as error:
        raise ValueError(f"--engine {name}: {error}") from None
    return make(config, tokenizer, **options)


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
    terminal.say(f"{time.strftime('%H:%M:%S')} {text}")
