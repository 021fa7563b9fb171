"""How long jobs that wait for the model will take, from how long such jobs took before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


class Pace:
    """Seconds of computing per candidate, by endpoint, from the jobs that were done."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._candidates: defaultdict[str, int] = defaultdict(int)

    def add(self, endpoint: str, seconds: float, candidates: int) -> None:
        self._seconds[endpoint] += seconds
        self._candidates[endpoint] += candidates

    def seconds(self, endpoint: str) -> float | None:
        """Return the mean of an endpoint, else that of all; None before any job was done."""
        if self._candidates[endpoint]:
            return self._seconds[endpoint] / self._candidates[endpoint]
        total = sum(self._candidates.values())
        return sum(self._seconds.values()) / total if total else None


def seconds_until_done(running: Sequence[float], waiting: Sequence[float], slots: int) -> list[float]:
    """Return for each waiting job the seconds until it is done.

    Jobs in the slots take turns on one model, so that each goes on by an equal share of the time. A job that
    waits takes the first slot that becomes free.

    Args:
        running: seconds of computing that each job in a slot still needs.
        waiting: the same for jobs that wait, in the queue's order.
        slots: jobs that take turns.
    """
    now = 0.0
    left = dict(enumerate(running, start=-len(running)))  # number of a waiting job, or below 0 -> seconds
    done = [0.0] * len(waiting)
    following = list(enumerate(waiting))
    while following or left:
        while following and len(left) < slots:
            number, seconds = following.pop(0)
            left[number] = seconds

        first = min(left, key=lambda number: left[number])
        step = left[first]
        now += step * len(left)
        left = {number: seconds - step for number, seconds in left.items() if number != first}
        if first >= 0:
            done[first] = now
    return done
