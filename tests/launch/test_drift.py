"""New data against the statistics that a model keeps."""

from __future__ import annotations

import numpy as np

from upvla.data.stats import Statistics, Summary
from upvla.launch.drift import as_metrics, drift


def statistics(state: np.ndarray, actions: np.ndarray) -> Statistics:
    rows = {"state": state.astype(np.float32), "actions": actions.astype(np.float32)}
    return Statistics.merged([{name: Summary.of(values) for name, values in rows.items()}])


def test_the_dimension_that_moved_comes_first() -> None:
    rng = np.random.Generator(np.random.Philox(0))
    state, actions = rng.normal(0, 2, (500, 3)), rng.normal(0, 1, (500, 2))
    parent = statistics(state, actions).to_json()
    assert max(one.size for one in drift(parent, statistics(state, actions))) == 0
    moved = state + np.array([0, 3 * state[:, 1].std(), 0])
    wider = actions * np.array([1, 0.1])
    found = drift(parent, statistics(moved, wider))
    assert [(one.feature, one.dim) for one in found[:2]] == [("state", 1), ("actions", 1)]
    assert abs(found[0].shift - 3) < 0.05 and found[0].outside
    assert abs(found[1].spread - 0.1) < 0.01 and not found[1].outside
    metrics = as_metrics(found)
    assert abs(metrics["drift/worst_shift"] - 3) < 0.05 and metrics["drift/dims_outside"] == 1
    assert as_metrics([]) == {"drift/worst_shift": 0.0, "drift/dims_outside": 0.0}


def test_a_dimension_that_never_moved_does_not_divide_by_zero() -> None:
    still = np.zeros((10, 1))
    (one,) = drift(statistics(still, still).to_json(), statistics(still + 0.5, still))[:1]
    assert (one.feature, one.shift, one.outside) == ("state", 0.5, True)
