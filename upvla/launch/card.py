"""The model card that a registered version shows: data, recipe, results with intervals, limits, what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from upvla.checkpoint import Bundle
from upvla.types import Checkpoint

LIMITS = (
    "It acts in its own action space only (below) and refuses cameras that it was not trained on.",
    "Scores are of the suites named here, under the protocols named here; the playtable's are no CALVIN numbers.",
    "Nothing was measured on a real robot: drive one slowly, clipped to its limits, with a hand on the stop.",
)


def model_card(
    name: str,
    bundle: Bundle,
    checkpoint: Checkpoint,
    scored: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    run_id: str,
    strips: Sequence[str],
) -> str:
    """Markdown. `strips` are artifacts of the run: pictures of what was seen, predicted, and came."""
    meta = bundle.meta
    weights = sum(value.numel() for value in bundle.model.parameters())
    data = [f"| {n} | {d['version']} | `{d['content_id']}` |" for n, d in sorted(meta.get("datasets", {}).items())]
    lines = [
        f"# {name}",
        f"{bundle.config.preset}, {weights / 1e6:.1f} M weights, model `{checkpoint.model_id}`, step {checkpoint.step} "
        f"of run `{checkpoint.run}`" + (f", fine-tuned from `{meta['parent']}`" if meta.get("parent") else ""),
        "## Data",
        "\n".join(["| dataset | version | content |", "|---|---|---|", *data]),
        f"Statistics `{tags.get('stats_id', '')}`, mixture `{tags.get('mixture', '')}`.",
        "## Recipe",
        f"Configuration `{tags.get('config', '')}`, commit `{tags.get('git_commit', '')}`.",
        "## Results, with 95 % intervals",
        _table(scored["scores"]),
        "Protocols: " + ", ".join(f"{suite} `{mark}`" for suite, mark in sorted(scored["protocols"].items())) + ".",
        "## Action space",
        _actions(bundle),
        "## Limits",
        "\n".join(f"- {limit}" for limit in LIMITS),
    ]
    if strips:
        lines += ["## Predicted frames", "Rows: seen now, predicted, really seen then."]
        lines += [f"![{path}](get-artifact?path={quote(path, safe='')}&run_uuid={run_id})" for path in strips]
    return "\n\n".join(lines)


def _table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One row a metric, single tasks left out: the run has them."""
    policies = list(scores)
    metrics = sorted({metric for each in scores.values() for metric in each if "/task/" not in metric})
    rows = [f"| metric | {' | '.join(policies)} |", "|---" * (len(policies) + 1) + "|"]
    for metric in metrics:
        cells = []
        for policy in policies:
            score = scores[policy].get(metric)
            cells.append("" if score is None else "{value:.2f} [{low:.2f}, {high:.2f}]".format(**score))
        rows.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _actions(bundle: Bundle) -> str:
    space = bundle.action_space
    rows = [f"`{space.name}`, every {1000 * space.dt_s:.1f} ms", "", "| dimension | unit | frame | 1.0 is | range |"]
    rows += ["|---|---|---|---|---|"]
    rows += [
        f"| {d.name} | {d.unit} | {d.frame}, {d.mode} | {d.scale:g} | {d.low:g} to {d.high:g} {d.convention} |"
        for d in space.dims
    ]
    return "\n".join(rows)
