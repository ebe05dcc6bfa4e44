"""The life of a rollout worker, and how often it may begin anew: pure, without any process.

    starting ─▶ stale ─▶ healthy ◀─▶ suspect       what may follow what
       ▲  └───────────────▲  │          │
       └─────── dead ◀───────┴──────────┘          dead may follow all others

A worker serves the versions that it has received whole since it began, and nothing once it has
failed until it has received again.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Literal

from ppo_dist.config.workers import Cluster

State = Literal["starting", "stale", "healthy", "suspect", "dead"]

HOPELESS = 3  # versions missed in a row, after which a new process takes a worker's place

FOLLOWS: dict[State, set[State]] = {
    "starting": {"stale", "healthy", "dead"},
    "stale": {"healthy", "suspect", "dead"},
    "healthy": {"healthy", "suspect", "dead"},
    "suspect": {"healthy", "suspect", "dead"},
    "dead": {"starting"},
}


@dataclass(frozen=True)
class Life:
    """Where a worker is in its life: its process is `starting`, it is there but `stale`, it is
    `healthy` with some versions, it failed and is `suspect`, or it is `dead`.

    `starts` counts its processes before this one, so that late news of an earlier one can be told
    from news of this. `missed` are the versions that did not reach it since one last did. One that
    `joins` was added while others were at work; one that `is_out` is dead for good.

    Example: Life(state="healthy", versions=frozenset({6, 7}), starts=1, is_out=False)
    """

    state: State = "starting"
    versions: frozenset[int] = frozenset()
    starts: int = 0
    missed: frozenset[int] = frozenset()
    is_out: bool = False
    joins: bool = False

    @property
    def is_late(self) -> bool:
        """Whether versions may have been sent before its process began."""
        return self.joins or self.starts > 0

    def serves(self, version: int) -> bool:
        """Whether it may generate with a version."""
        return self.state == "healthy" and version in self.versions

    @property
    def takes_weights(self) -> bool:
        """Whether versions can be sent to it: also while its first engine starts, since its end of
        the transport is open by then; a later process is not known to be there yet.
        """
        begins = self.state == "starting" and not self.is_late
        return begins or self.state in ("stale", "healthy", "suspect")

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being started in its place."""
        return self.is_out or self.state not in ("starting", "dead")

    @property
    def is_hopeless(self) -> bool:
        """Whether it has missed so many versions that all would wait for it with each to come."""
        return len(self.missed) >= HOPELESS

    def received(self, version: int, kept: Container[int] = ()) -> Life:
        """After a version came whole; of the earlier ones those in `kept` stay."""
        versions = frozenset({version, *(v for v in self.versions if v in kept)})
        if self.state == "starting":
            return replace(self, versions=versions)
        return replace(self._become("healthy", versions), missed=frozenset())

    def taken(self, version: int) -> Life:
        """Before it generates with a version: loading it drops those that are older, and one that
        must be given to it anew takes the place of all.
        """
        stay = {v for v in self.versions if v >= version} if self.serves(version) else set()
        return replace(self, versions=frozenset(stay))

    def started(self) -> Life:
        """After its engine came up: it serves what it has received meanwhile, if anything."""
        return self._become("healthy" if self.versions else "stale", self.versions)

    def failed(self, version: int | None = None) -> Life:
        """After it did not do what it was told, though its process may be all right; with which
        version.
        """
        if self.state == "starting":
            return replace(self, versions=frozenset())
        missed = self.missed if version is None else self.missed | {version}
        return replace(self._become("suspect"), missed=missed)

    def lost(self, for_good: bool = False) -> Life:
        """After its process ended, or hung."""
        return replace(self._become("dead"), is_out=for_good)

    def left_out(self) -> Life:
        """A dead one that nothing is started for any more."""
        assert self.state == "dead", self
        return replace(self, is_out=True)

    def restarted(self) -> Life:
        """With a new process in the place of a dead one."""
        return replace(self._become("starting"), starts=self.starts + 1, missed=frozenset())

    def _become(self, state: State, versions: frozenset[int] = frozenset()) -> Life:
        if self.is_out or state not in FOLLOWS[self.state]:
            raise ValueError(f"a worker that is {self.state} cannot become {state}: {self}")
        return replace(self, state=state, versions=versions)


class Restarts:
    """How often a worker may be started anew (`cluster.restarts` within
    `cluster.restart_window_s`), and how long to wait before: `cluster.backoff_s`, doubled with
    each that the window holds.
    """

    def __init__(self, limits: Cluster) -> None:
        self._limits = limits
        self._times: list[float] = []

    def pause(self, now: float) -> float | None:
        """Seconds to wait before the next one, which counts from now on; None: it may not be."""
        self._times = [t for t in self._times if now - t < self._limits.restart_window_s]
        if len(self._times) >= self._limits.restarts:
            return None
        self._times.append(now)
        return self._limits.backoff_s * 2.0 ** (len(self._times) - 1)
