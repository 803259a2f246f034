"""The producer of an offline run: a round's data instead of a sampler (docs/offline.md).

A round is a window: its data are made before its first step, with the policy that the round starts from, or
read from a finished log; then they are the rollout log of policy version ``round``, and the buffer gives them
to the learner, pass after pass.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from oapl_jax.build import policy
from oapl_jax.build.job import Job, acceptance
from oapl_jax.config.offline import RoundConfig
from oapl_jax.io import storage
from oapl_jax.io.lease import Leases
from oapl_jax.learner import batch as batches
from oapl_jax.learner.step import make_scorer
from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.rollouts import filters, import_rollouts
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer, Ticket
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.sources.generator import Generator, Work
from oapl_jax.types import FinishReason, Grade, Metrics, Prompt, RolloutGroup, Verdict

GROUPS_PER_FILE = 8
GROUPS_PER_SCORING = 64
"""Groups of a file of data that are taken in: scored together, those of one length in one batch."""
SECONDS_BETWEEN_NOTES = 10.0
ROUNDS_FOLDER = "rounds"
LEASES_FOLDER = "leases"
GENERATED_FOLDER = "generated"


class StoppedError(Exception):
    """The making of a round's data was stopped; the next start goes on with it."""


class Rounds:
    """Makes the data of each round, and stands where the online worker stands.

    Args:
        job: of the run.
        directory: of the run.
        log: the run's rollout log.
        is_stopped: looked at while data are generated.
        note: prints a line.

    Raises:
        ValueError: data that a round names are not there.
    """

    def __init__(
        self,
        job: Job,
        directory: pathlib.Path,
        log: RolloutLog,
        is_stopped: Callable[[], bool],
        note: Callable[[str], None],
    ):
        assert job.config.offline is not None
        self._job, self._config, self._directory, self._log = job, job.config.offline, directory, log
        self._is_stopped, self._note = is_stopped, note
        self._scorers: dict[str, tuple[Any, Any]] = {}
        """Structure and parameters of models that made the data of other programs."""
        for i, data in enumerate(self._config.rounds):
            if data.log is not None and not pathlib.Path(data.log).expanduser().exists():
                raise ValueError(f"offline.rounds.{i}.log={data.log!r} does not exist")
        self.steps_per_epoch = 0
        """Of the round that is open."""
        self.number = 0

    @property
    def num_steps(self) -> int:
        """Learner steps of the round that is open."""
        return self.steps_per_epoch * self._config.rounds[self.number].epochs

    @property
    def expected_steps(self) -> int:
        """Of this round and of those to come, were they as large as this one."""
        return self.steps_per_epoch * sum(data.epochs for data in self._config.rounds[self.number :])

    @property
    def is_last(self) -> bool:
        """Whether no round comes after the one that is open."""
        return self.number == len(self._config.rounds) - 1

    def make_buffer(self) -> GroupBuffer:
        """An empty buffer that keeps groups for as many passes as a round has."""
        epochs = max(data.epochs for data in self._config.rounds)
        return GroupBuffer(
            acceptance(self._job.config), None, Consumption(epochs=epochs, seed=self._job.config.run.seed)
        )

    def open(self, number: int, params: Any, sampler_params: Any, *, is_begun: bool) -> list[RolloutGroup]:
        """Makes the data of a round where they are not there yet, and returns them in the order of their index.

        Groups that the filter leaves out have no rollouts: the buffer passes over them.

        Args:
            number: of the round, from 0.
            params: the learner's, at the start of the round.
            sampler_params: the same on the sampler's mesh.
            is_begun: the round has made steps: ``params`` are no longer those of its start.

        Raises:
            ValueError: the data cannot be used, or are too few for one batch, or those of a round that has begun
                are gone.
            StoppedError: ``is_stopped`` said so.
        """
        data, path = self._config.rounds[number], self._path(number)
        if not path.exists():
            if is_begun:
                raise ValueError(f"{path} is gone, and round {number} has made steps: its data cannot be made again")
            self._make(number, data, params, sampler_params)
        groups = self._log.read(number)
        kept, counts = filters.apply(groups, data.filter, self._job.config.run.seed)
        usable = sum(map(acceptance(self._job.config), kept))
        per_batch = self._job.groups_per_batch
        self.number, self.steps_per_epoch = number, usable // per_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"round {number}: {usable} groups can be trained on, a batch has {per_batch} ({counts});"
                " give it more data, or lower learner.batch_rollouts"
            )
        self._note(
            f"round {number}: {usable:,} groups, {self.steps_per_epoch:,} steps an epoch, {data.epochs} epochs ({counts})"
        )
        left = {group.index: group for group in kept}
        return [left.get(group.index, dataclasses.replace(group, rollouts=())) for group in groups]

    def start(self) -> None:
        """Nothing runs beside the learner."""

    def stop(self) -> None:
        """Nothing to end."""

    def finish(self, policy_version: int) -> None:
        """Nobody waits for word of the end."""

    def report(self) -> Metrics:
        """The sampler rests while the learner learns."""
        return {}

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass is over with this step of the round, counted from 1."""
        return step % self.steps_per_epoch == 0

    def _path(self, number: int) -> pathlib.Path:
        return self._directory / ROUNDS_FOLDER / f"{number:06d}.json"

    def _make(self, number: int, data: RoundConfig, params: Any, sampler_params: Any) -> None:
        """Puts the data of a round into the rollout log, and then says so in a file."""
        record: dict[str, Any] = {"round": number, "source": data.log or "generated"}
        is_scored = self._config.logprobs == "scored"
        if data.log is None:
            work = RolloutLog(self._directory / GENERATED_FOLDER, self._log.sampling) if is_scored else self._log
            self._generate(number, data, work, sampler_params)
            source = self._directory / GENERATED_FOLDER / f"{number:06d}"
        else:
            source = pathlib.Path(data.log).expanduser()
        if data.log is not None or is_scored:
            record |= self._take_in(number, data, source, params)
        else:
            _, counts = filters.apply(self._log.read(number), data.filter, self._job.config.run.seed)
            record["filter"] = dataclasses.asdict(counts)
        storage.replace(self._path(number), json.dumps(record, indent=2).encode() + b"\n")

    def _generate(self, number: int, data: RoundConfig, log: RolloutLog, sampler_params: Any) -> None:
        """Draws a group for each prompt of the round; what a killed run has drawn is kept."""
        job = self._job
        prompts = self._prompts(number)
        work = Work(log, number, prompts, GROUPS_PER_FILE)
        start = last = time.monotonic()
        with Leases(self._directory / LEASES_FOLDER) as leases:
            generator = Generator(
                work,
                leases,
                job.engines,
                sampler_params,
                job.make_groups(),
                sampling=job.sampling,
                group_size=job.config.sampler.group_size,
                seed=job.config.run.seed,
                device_lock=job.sampler_lock,
                deadline=job.config.window.deadline,
            )

            def report(num_done: int) -> None:
                nonlocal last
                now = time.monotonic()
                if now - last > SECONDS_BETWEEN_NOTES:
                    last = now
                    speed = generator.num_tokens / (now - start)
                    self._note(f"round {number}: {num_done:,} of {len(prompts):,} groups, {speed:,.0f} tokens/s")

            if not generator.run(report, self._is_stopped):
                raise StoppedError

    def _prompts(self, number: int) -> list[Prompt]:
        """The next prompts of the stream after those of the rounds before: a random subset, drawn anew each epoch."""
        prompts = self._job.prompts
        sizes = [data.prompts or len(prompts) for data in self._config.rounds if data.log is None]
        before = sum(data.log is None for data in self._config.rounds[:number])
        if not self._job.config.data.task and sizes[before] > len(prompts):
            raise ValueError(
                f"offline.rounds.{number}.prompts={sizes[before]}: the data has only {len(prompts)} prompts; say null"
            )
        first = sum(sizes[:before])
        if not self._job.config.data.task:  # an epoch of its own, or a prompt could be there twice
            first = before * len(prompts)
        return [prompts[first + i] for i in range(sizes[before])]

    def _take_in(self, number: int, data: RoundConfig, source: pathlib.Path, params: Any) -> dict[str, Any]:
        """Reads, checks, cuts, filters and scores finished data, and writes them to the rollout log."""
        config, tokenizer = self._job.config, self._job.tokenizer
        bad = import_rollouts.BadRows(self._config.bad_rows)
        expectations = import_rollouts.Expectations(
            vocab_size=tokenizer.vocab_size,
            reward_range=self._config.reward_range,
            encode_prompt=tokenizer.encode_prompt,
            encode_response=tokenizer.encode,
            eos_id=tokenizer.eos_id,
            source_limit=self._config.source_limit,
            group_size=config.sampler.group_size,
            temperature=config.sampler.temperature,
        )
        found = [self._within_limits(responses, bad) for responses in import_rollouts.read(source, expectations, bad)]
        found = [responses for responses in found if responses.members]
        for reason, example in bad.examples.items():
            self._note(f"round {number}: {bad.counts[reason]:,} x {reason}, such as {example}")
        # In a random order: the file's own may go by difficulty, and the first pass takes groups by index.
        order = np.random.default_rng((config.run.seed, number)).permutation(len(found)).tolist()
        groups = [self._group(number, index, found[i]) for index, i in enumerate(order)]
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
        """Without what is too long; responses are cut where the config says so, and are wrong then."""
        config, members = self._job.config, []
        limit, overlong = config.sampler.max_response_tokens, self._config.overlong
        length = len(responses.prompt.token_ids)
        if length > config.data.max_prompt_tokens:
            message = f"its prompt has {length} tokens, over data.max_prompt_tokens={config.data.max_prompt_tokens}"
            self._too_long(responses, message, config.data.overlong, "overlong prompts", bad)
            return dataclasses.replace(responses, members=[])
        for member in responses.members:
            tokens = member.rollout.token_ids
            if len(tokens) <= limit:
                members.append(member)
            elif overlong == "truncate":
                bad.counts["cut responses"] += 1
                members.append(self._cut(member, limit))
            else:
                message = f"a response has {len(tokens)} tokens, over sampler.max_response_tokens={limit}"
                self._too_long(responses, message, overlong, "overlong responses", bad)
        return dataclasses.replace(responses, members=members)

    def _too_long(
        self, responses: import_rollouts.Responses, message: str, action: str, reason: str, bad: import_rollouts.BadRows
    ) -> None:
        if action == "error":
            raise ValueError(f"{responses.prompt.id}: {message}; raise the limit, or drop such rows")
        bad.counts[reason] += 1

    def _cut(self, member: import_rollouts.Response, limit: int) -> import_rollouts.Response:
        """The beginning of a response; the reward was for all of it and is lost."""
        rollout = dataclasses.replace(
            member.rollout,
            token_ids=member.rollout.token_ids[:limit],
            logprobs=member.rollout.logprobs[:limit],
            finish_reason=FinishReason.LENGTH,
        )
        grade = Grade(Verdict.WRONG, min(0.0, member.grade.reward), "cut for training")
        return import_rollouts.Response(rollout, self._job.tokenizer.decode(rollout.token_ids.tolist()), grade)

    def _group(self, number: int, index: int, responses: import_rollouts.Responses) -> RolloutGroup:
        """Not yet scored: whatever lacks log-probabilities is not usable."""
        members = responses.members
        return self._job.make_groups().group(
            Ticket(number, index, index),
            responses.prompt,
            [member.rollout for member in members],
            [member.text for member in members],
            [member.grade for member in members],
        )

    def _scored(self, groups: Sequence[RolloutGroup], data: RoundConfig, params: Any) -> tuple[list[RolloutGroup], int]:
        """With log-probabilities where there were none, or everywhere, and the advantages that go with them."""
        is_all = self._config.logprobs == "scored"
        todo = [
            (i, j)
            for i, group in enumerate(groups)
            for j, item in enumerate(group.rollouts)
            if is_all or np.isnan(item.rollout.logprobs).all()
        ]
        pairs = [(groups[i].prompt.token_ids, groups[i].rollouts[j].rollout.token_ids) for i, j in todo]
        if not OBJECTIVES[self._job.config.objective.name].needs_sampler_logprobs:
            scores, num_scored = [np.zeros(len(response), np.float32) for _, response in pairs], 0
        else:
            scores, num_scored = self._score(pairs, data, params), len(pairs)
        found = dict(zip(todo, scores, strict=True))
        make = self._job.make_groups().group
        scored = []
        for i, group in enumerate(groups):
            rollouts = [
                dataclasses.replace(item.rollout, logprobs=found.get((i, j), item.rollout.logprobs))
                for j, item in enumerate(group.rollouts)
            ]
            texts, grades = [item.text for item in group.rollouts], [item.grade for item in group.rollouts]
            ticket = Ticket(group.policy_version, group.index, group.index)
            scored.append(make(ticket, group.prompt, rollouts, texts, grades))
        return scored, num_scored

    def _score(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], data: RoundConfig, params: Any
    ) -> list[np.ndarray]:
        """Log-probabilities of the responses, by the model that made the data, at ``sampler.temperature``."""
        job, scores = self._job, [np.zeros(0, np.float32)] * len(pairs)
        if not pairs:
            return scores
        graphdef, params = self._scorer(data, params)
        layout = dataclasses.replace(job.rows, row_tokens=None)
        score = make_scorer(graphdef, temperature=job.config.sampler.temperature, vocab_size=job.tokenizer.vocab_size)
        # Those of one length together: a batch is as long as its longest row.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        for start in range(0, len(order), layout.num_rollouts):
            members = order[start : start + layout.num_rollouts]
            batch = batches.from_pairs([pairs[i] for i in members], layout)
            with job.trainer_lock:
                logprobs = np.asarray(jax.device_get(score(params, batches.place(batch, layout))))
            rows = logprobs.reshape(batch.tokens.shape)
            for row, i in enumerate(members):
                scores[i] = rows[row][batch.response_mask[row]].astype(np.float32)
        return scores

    def _scorer(self, data: RoundConfig, params: Any) -> tuple[Any, Any]:
        """Structure and parameters of the model that made the data."""
        if data.scorer is None:
            return self._job.graphdef, params
        if data.scorer not in self._scorers:
            config = self._job.config
            section = config.model.model_copy(update={"path": data.scorer, "warm_start": None, "config": None})
            loaded = policy.load(section, data.scorer, self._job.trainer_mesh, config.run.seed)
            self._scorers = {data.scorer: (loaded.graphdef, loaded.params)}
        return self._scorers[data.scorer]
