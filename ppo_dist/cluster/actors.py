"""Why a Ray actor did not answer."""

from __future__ import annotations

from collections.abc import Sequence

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

GRACE_S = 2.0  # for the death of one to be known after others told that they lost a peer


def reason(error: Exception) -> str:
    """What Ray raised, in a line."""
    if isinstance(error, GetTimeoutError):
        return "no answer before the deadline"
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {_first_line(error.cause)}"
    return _first_line(error)


def cause(answers: Sequence[ray.ObjectRef]) -> str:
    """Why actors that work together, by rank, did not all answer: a death if there was one, since
    the others only tell that they lost a peer.
    """
    ray.wait(list(answers), num_returns=len(answers), timeout=GRACE_S)
    errors: dict[int, RayError] = {}
    for rank, answer in enumerate(answers):
        try:
            ray.get(answer, timeout=0)
        except RayError as error:
            errors[rank] = error
    for kind in (RayActorError, RayTaskError, RayError):
        ranks = [rank for rank, error in errors.items() if isinstance(error, kind)]
        if ranks:
            return f"rank {', '.join(map(str, ranks))}: {reason(errors[ranks[0]])}"
    return "all answered in the end"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
