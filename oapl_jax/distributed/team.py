"""A team: processes of a JAX job that make the same calls in the same order. A process alone is a team of one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from oapl_jax.distributed.messages import delete, increment, put, wait_for

BARRIER_SECONDS = 1800.0
"""Others may be compiling, or reading weights."""
KEPT_KEYS = 100
"""Number of older messages of a kind that are kept for processes that have not read them yet: far more than needed."""


class Team:
    """The first member leads: it makes the decisions that the others follow. ``name`` is a prefix of the team's keys."""

    def __init__(self, name: str, members: Sequence[int]):
        self.name, self.members = name, tuple(sorted(members))
        self._num_agreed = self._num_barriers = 0

    @classmethod
    def alone(cls) -> "Team":
        """This process by itself."""
        return cls(f"process-{jax.process_index()}", [jax.process_index()])

    @classmethod
    def job(cls) -> "Team":
        """All processes of the JAX job."""
        return cls("job", range(jax.process_count()))

    @property
    def is_leader(self) -> bool:
        """Whether this process is the first member."""
        return jax.process_index() == self.members[0]

    @property
    def rank(self) -> int:
        """Index of this process among the members."""
        return self.members.index(jax.process_index())

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    def agree(self, make: Callable[[], Any], deadline: float, poll: Callable[[], object] = lambda: None) -> Any:
        """Returns in every member what ``make`` returns in the leader, as JSON has it; those who wait call ``poll``.

        Raises:
            PeerError: a process has failed.
            TimeoutError: the leader says nothing within ``deadline`` seconds.
        """
        if self.size == 1:
            return make()
        key = self._next_key()
        if not self.is_leader:
            return wait_for(key, deadline, poll)
        value = make()
        put(key, value)
        return value

    def gather(self, value: Any, deadline: float = BARRIER_SECONDS) -> list[Any]:
        """The values of all members, in their order, as JSON has them. Every member calls this.

        Raises:
            PeerError: a process has failed.
            TimeoutError: a member does not come.
        """
        if self.size == 1:
            return [value]
        key = self._next_key()
        put(f"{key}/{jax.process_index()}", value)
        return [wait_for(f"{key}/{member}", deadline) for member in self.members]

    def _next_key(self) -> str:
        self._num_agreed += 1
        if self.is_leader:
            delete(f"{self.name}/{self._num_agreed - KEPT_KEYS}")
        return f"{self.name}/{self._num_agreed}"

    def wait(self, deadline: float = BARRIER_SECONDS) -> None:
        """Returns when all members are here.

        Raises:
            PeerError: a process has failed.
            TimeoutError: a member does not come.
        """
        if self.size == 1:
            return
        self._num_barriers += 1
        key = f"{self.name}/barrier/{self._num_barriers}"
        # JAX's own barrier does not look at failures while it waits.
        if increment(f"{key}/arrived") == self.size:
            put(f"{key}/open", True)
        wait_for(f"{key}/open", deadline)
        if self.is_leader and self._num_barriers > 1:  # all have left the one before
            delete(f"{self.name}/barrier/{self._num_barriers - 1}")
