"""Measures of continual training, from the matrix of every task's score after every task.

`scores[i][j]` is the score of task j after task i, rows 0 to n-1; `base[j]` that before the first task. With a score
of which more is better: average accuracy, backward transfer and forward transfer as Lopez-Paz and Ranzato (2017, GEM,
arXiv 1706.08840) define them, forgetting as Chaudhry et al. (2018, arXiv 1801.10112).
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Transfer:
    """The effects of a sequence of tasks on each other; None with too few tasks, or without scores before the first.

    `average` is the mean score of all tasks at the end. `backward` is the mean change of each earlier task since it was
    trained, `forward` the mean change of each later task before it is trained. `forgetting` is the mean loss of each
    earlier task since its best. The last three are positive for a gain, a gain, and a loss, whatever the metric.
    """

    average: float
    backward: float | None
    forward: float | None
    forgetting: float | None


def measure_transfer(
    scores: Sequence[Sequence[float]], base: Sequence[float] | None = None, *, greater_is_better: bool = True
) -> Transfer:
    """Return the measures of a square matrix of scores; see the module for rows and columns."""
    sign = 1.0 if greater_is_better else -1.0
    count, last = len(scores), scores[-1]
    average = sum(last) / count
    if count == 1:
        return Transfer(average=average, backward=None, forward=None, forgetting=None)
    earlier = range(count - 1)
    backward = sum(sign * (last[j] - scores[j][j]) for j in earlier) / (count - 1)
    best = [max(sign * scores[i][j] for i in range(j, count - 1)) for j in earlier]
    forgetting = sum(best[j] - sign * last[j] for j in earlier) / (count - 1)
    forward = None
    if base is not None:
        forward = sum(sign * (scores[j - 1][j] - base[j]) for j in range(1, count)) / (count - 1)
    return Transfer(average=average, backward=backward, forward=forward, forgetting=forgetting)
