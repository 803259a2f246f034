"""Windows of finished data: an offline run's rounds (docs/offline.md).

A round is a window. Its data are made before its first step, with the policy that the round starts from, or read from
a finished log. Then they are the rollout log of policy version ``round``, and the buffer gives them to the learner,
epoch after epoch.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from oapl_jax.build import policy
from oapl_jax.build.learner import Learner
from oapl_jax.config.offline import RoundConfig
from oapl_jax.io import storage
from oapl_jax.io.lease import Leases
from oapl_jax.io.storage import SharedPath
from oapl_jax.learner import batch as batches
from oapl_jax.learner.step import make_scorer
from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.rollouts import filters, import_rollouts
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer, Ticket, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Weights, WindowPlan
from oapl_jax.sources.generation import Generation, generate
from oapl_jax.sources.imported import make_groups
from oapl_jax.sources.local import BufferedSource
from oapl_jax.sources.setup import SamplingSetup, acceptance
from oapl_jax.types import FinishReason, Grade, GradedRollout, PreemptedError, Prompt, RolloutGroup, Verdict

GROUPS_PER_FILE = 8
GROUPS_PER_SCORING = 64
"""Groups that are scored together and written as one file; responses of one length share a batch."""
SECONDS_BETWEEN_NOTES = 10.0
ROUNDS_FOLDER = "rounds"
LEASES_FOLDER = "leases"
GENERATED_FOLDER = "generated"


class OfflineRounds(BufferedSource):
    """A ``GroupSource``: makes the data of each round, and gives them out.

    The learner scores responses that lack log-probabilities; ``is_stopped`` is polled while data are generated.

    Raises:
        ValueError: data that a round names are not there.
    """

    def __init__(
        self,
        setup: SamplingSetup,
        learner: Learner,
        directory: SharedPath,
        log: RolloutLog,
        is_stopped: Callable[[], bool],
        note: Callable[[str], None],
    ):
        assert setup.config.offline is not None
        self._setup, self._learner = setup, learner
        self._config, self._directory, self._log = setup.config.offline, directory, log
        self._is_stopped, self._note = is_stopped, note
        self._scorers: dict[str, tuple[Any, Any]] = {}
        """Of models that made the data of other programs: ``_scorer``."""
        for i, data in enumerate(self._config.rounds):
            if data.log is not None and not pathlib.Path(data.log).expanduser().exists():
                raise ValueError(f"offline.rounds.{i}.log={data.log!r} does not exist")
        epochs = max(data.epochs for data in self._config.rounds)
        consumption = Consumption(epochs=epochs, seed=setup.config.run.seed)
        super().__init__(GroupBuffer(acceptance(setup.config), None, consumption), setup.config.window)

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Makes the data of the round where they are not there yet.

        Groups that the filter leaves out have no rollouts: the buffer passes over them.

        Raises:
            ValueError: the data cannot be used, or are too few for one batch, or those of a round that has begun
                are gone.
            PreemptedError: ``is_stopped`` said so; the next start goes on with the data.
        """
        number = window.policy_version
        data, path = self._config.rounds[number], self._path(number)
        if not storage.exists(path):
            if taken:
                raise ValueError(f"{path} is gone, and round {number} has made steps: its data cannot be made again")
            self._make(number, data, weights)
        groups = self._log.read(number)
        kept, counts = filters.apply(groups, data.filter, self._setup.config.run.seed)
        usable = sum(map(acceptance(self._setup.config), kept))
        per_batch = self._setup.groups_per_batch
        steps = usable // per_batch
        if steps == 0:
            raise ValueError(
                f"round {number}: {usable} groups can be trained on, a batch has {per_batch} ({counts});"
                " give it more data, or lower learner.batch_rollouts"
            )
        self._note(f"round {number}: {usable:,} groups, {steps:,} steps an epoch, {data.epochs} epochs ({counts})")
        left = {group.index: group for group in kept}
        self._buffer.open_window(
            Window(number, 0, steps * per_batch),
            logged=[left.get(group.index, dataclasses.replace(group, rollouts=())) for group in groups],
            batches=taken,
        )
        return WindowPlan(
            steps * data.epochs,
            epoch_steps=steps,
            is_next_slow=True,
            is_last=number == len(self._config.rounds) - 1,
            # Were the rounds to come as large as this one.
            expected_steps=steps * sum(later.epochs for later in self._config.rounds[number:]),
        )

    def finish(self) -> None:
        """Nobody waits for the end."""

    def close(self) -> None:
        """Nothing runs beside the learner."""

    def _path(self, number: int) -> SharedPath:
        return self._directory / ROUNDS_FOLDER / f"{number:06d}.json"

    def _make(self, number: int, data: RoundConfig, weights: Weights) -> None:
        """Puts the data of a round into the rollout log, and then says so in a file."""
        record: dict[str, Any] = {"round": number, "source": data.log or "generated"}
        is_scored = self._config.logprobs == "scored"
        if data.log is None:
            work = RolloutLog(self._directory / GENERATED_FOLDER, self._log.sampling) if is_scored else self._log
            self._generate(number, work, weights.sampler)
        if data.log is not None:
            record |= self._take_in(number, data, pathlib.Path(data.log).expanduser(), weights.learner)
        elif is_scored:
            generated = self._directory / GENERATED_FOLDER / f"{number:06d}"
            with tempfile.TemporaryDirectory() as copies:
                source = storage.get_folder(generated, storage.names(generated), pathlib.Path(copies))
                record |= self._take_in(number, data, source, weights.learner)
        else:
            _, counts = filters.apply(self._log.read(number), data.filter, self._setup.config.run.seed)
            record["filter"] = dataclasses.asdict(counts)
        storage.replace(self._path(number), json.dumps(record, indent=2).encode() + b"\n")

    def _generate(self, number: int, log: RolloutLog, weights: Any) -> None:
        """Draws a group for each prompt of the round; what a killed run has drawn is kept."""
        prompts, config, last = self._prompts(number), self._setup.config, time.monotonic()

        def report(num_done: int, tokens_per_second: float) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
                last = time.monotonic()
                self._note(
                    f"round {number}: {num_done:,} of {len(prompts):,} groups, {tokens_per_second:,.0f} tokens/s"
                )

        assert self._setup.turns is not None
        with Leases(self._directory / LEASES_FOLDER) as leases:
            is_done = generate(
                Generation(log, leases, number, prompts, GROUPS_PER_FILE, config.window.deadline),
                self._setup.turns,
                self._setup.grading,
                weights,
                config.sampler,
                config.run.seed,
                report=report,
                is_stopped=self._is_stopped,
            )
        if not is_done:
            raise PreemptedError

    def _prompts(self, number: int) -> list[Prompt]:
        """The next prompts of the stream after those of the rounds before: a new random subset each epoch."""
        prompts = self._setup.prompts
        sizes = [data.prompts or len(prompts) for data in self._config.rounds if data.log is None]
        before = sum(data.log is None for data in self._config.rounds[:number])
        is_endless = self._setup.config.data.is_endless
        if not is_endless and sizes[before] > len(prompts):
            raise ValueError(
                f"offline.rounds.{number}.prompts={sizes[before]}: the data has only {len(prompts)} prompts; say null"
            )
        # Each round of a file has an epoch of its own, or a prompt could be there twice.
        first = sum(sizes[:before]) if is_endless else before * len(prompts)
        return [prompts[first + i] for i in range(sizes[before])]

    def _take_in(self, number: int, data: RoundConfig, source: pathlib.Path, params: Any) -> dict[str, Any]:
        """Reads, checks, truncates, filters and scores finished data, and writes them to the rollout log."""
        config, bad = self._setup.config, import_rollouts.BadRows(self._config.bad_rows)
        expectations = import_rollouts.Expectations.of(config, self._setup.tokenizer)
        found = [self._within_limits(responses, bad) for responses in import_rollouts.read(source, expectations, bad)]
        found = import_rollouts.graded(found, self._setup.grading, bad)
        for reason, example in bad.examples.items():
            self._note(f"round {number}: {bad.counts[reason]:,} x {reason}, such as {example}")
        # In a random order: the file's own may go by difficulty, and the first pass takes groups by index.
        order = np.random.default_rng((config.run.seed, number)).permutation(len(found)).tolist()
        groups = make_groups(number, [found[i] for i in order], self._setup.grading)
        kept, counts = filters.apply(groups, data.filter, config.run.seed)
        kept = [dataclasses.replace(group, index=index) for index, group in enumerate(kept)]
        num_scored = 0
        for file, start in enumerate(range(0, len(kept), GROUPS_PER_SCORING)):
            if not storage.exists(self._log.path(number, file)):  # else a killed run has scored it
                scored, number_of = self._scored(kept[start : start + GROUPS_PER_SCORING], data, params)
                num_scored += number_of
                self._log.create(file, scored)
        if num_scored:
            self._note(f"round {number}: {num_scored:,} responses scored by {data.scorer or 'the policy of the run'}")
        return {"bad_rows": dict(bad.counts), "filter": dataclasses.asdict(counts), "scored": num_scored}

    def _within_limits(
        self, responses: import_rollouts.Responses, bad: import_rollouts.BadRows
    ) -> import_rollouts.Responses:
        """Without what is too long; responses are truncated where the config says so, and are wrong then."""
        config, members = self._setup.config, []
        limit, overlong = config.sampler.max_response_tokens, self._config.overlong
        length = len(responses.prompt.token_ids)

        def too_long(message: str, action: str, reason: str) -> None:
            if action == "error":
                raise ValueError(f"{responses.prompt.id}: {message}; raise the limit, or drop such rows")
            bad.counts[reason] += 1

        if length > config.data.max_prompt_tokens:
            message = f"its prompt has {length} tokens, over data.max_prompt_tokens={config.data.max_prompt_tokens}"
            too_long(message, config.data.overlong, "overlong prompts")
            return dataclasses.replace(responses, members=[])
        for member in responses.members:
            tokens = member.rollout.token_ids
            if len(tokens) <= limit:
                members.append(member)
            elif overlong == "truncate":
                bad.counts["truncated responses"] += 1
                members.append(self._truncate(member, limit))
            else:
                message = f"a response has {len(tokens)} tokens, over sampler.max_response_tokens={limit}"
                too_long(message, overlong, "overlong responses")
        return dataclasses.replace(responses, members=members)

    def _truncate(self, member: GradedRollout, limit: int) -> GradedRollout:
        """The beginning of a response; the reward was for all of it and is lost."""
        rollout = dataclasses.replace(
            member.rollout,
            token_ids=member.rollout.token_ids[:limit],
            logprobs=member.rollout.logprobs[:limit],
            finish_reason=FinishReason.LENGTH,
        )
        grade = Grade(Verdict.WRONG, min(0.0, member.grade.reward), "truncated for training")
        text = self._setup.tokenizer.decode(rollout.token_ids.tolist())
        return dataclasses.replace(member, rollout=rollout, text=text, grade=grade)

    def _scored(self, groups: Sequence[RolloutGroup], data: RoundConfig, params: Any) -> tuple[list[RolloutGroup], int]:
        """With log-probabilities where there were none, or everywhere, and the advantages that go with them."""
        is_all = self._config.logprobs == "scored"
        todo = [
            (group.prompt.token_ids, item.rollout.token_ids)
            for group in groups
            for item in group.rollouts
            if is_all or np.isnan(item.rollout.logprobs).all()
        ]
        is_needed = OBJECTIVES[self._setup.config.objective.name].needs_sampler_logprobs
        scores = iter(
            self._score(todo, data, params) if is_needed else [np.zeros(len(ids), np.float32) for _, ids in todo]
        )
        scored = []
        for group in groups:
            members = []
            for item in group.rollouts:
                if is_all or np.isnan(item.rollout.logprobs).all():
                    rollout = dataclasses.replace(item.rollout, logprobs=next(scores))
                    item = dataclasses.replace(item, rollout=rollout)
                members.append(item)
            ticket = Ticket(group.policy_version, group.index, group.index)
            scored.append(self._setup.grading.group(ticket, group.prompt, members))
        return scored, len(todo) if is_needed else 0

    def _score(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], data: RoundConfig, params: Any
    ) -> list[np.ndarray]:
        """Log-probabilities of the responses, by the model that made the data, at ``sampler.temperature``."""
        scores = [np.zeros(0, np.float32)] * len(pairs)
        if not pairs:
            return scores
        score, params = self._scorer(data, params)
        layout, order = self._learner.rows, range(len(pairs))
        if layout.row_tokens is None:  # those of one length together: a batch is as long as its longest row
            order = sorted(order, key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        for start in range(0, len(order), layout.num_rollouts):
            members = order[start : start + layout.num_rollouts]
            taken = [pairs[i] for i in members]
            batch = batches.from_pairs(taken, layout)
            with self._setup.device_lock:
                logprobs = np.asarray(jax.device_get(score(params, batches.place(batch, layout))))
            found = batches.of_pairs(logprobs.reshape(batch.tokens.shape), batch, taken, layout)
            for i, values in zip(members, found, strict=True):
                scores[i] = values.astype(np.float32)
        return scores

    def _scorer(self, data: RoundConfig, params: Any) -> tuple[Any, Any]:
        """Scorer and parameters of the model that made the data."""
        if data.scorer is None:
            return self._learner.score, params
        if data.scorer not in self._scorers:
            config, learner = self._setup.config, self._learner
            section = config.model.model_copy(update={"path": data.scorer, "warm_start": None, "config": None})
            architecture, _ = policy.outline(section, data.scorer)
            graphdef, _ = policy.abstract(section, architecture, learner.mesh)
            score = make_scorer(graphdef, temperature=learner.temperature, vocab_size=learner.vocab_size)
            params = policy.load_params(section, data.scorer, architecture, learner.mesh, config.run.seed)
            self._scorers = {data.scorer: (score, params)}
        return self._scorers[data.scorer]
