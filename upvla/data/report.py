"""What a person looks at before training on a dataset: one HTML file that needs nothing else, and its short form."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from upvla.data.table import Dataset
from upvla.images import Resize, decode_image, encode_jpeg, resize

_STRIP_RECORDINGS, _STRIP_FRAMES = 4, 8
_SMALL = Resize(size=64)  # pixels a side of a frame in the short form: four strips are some 50 KB
_HISTOGRAM_RECORDINGS = 200
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right}.row{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{color:#666;font-size:13px}
img{height:110px;margin-right:2px}svg{background:#f6f6f4}rect{fill:#3b6ea5}
"""


def render_report(dataset: Dataset) -> str:
    """Counts, lengths, action histograms, a strip of frames, and the quarantine, as one HTML page."""
    manifest, episodes = dataset.manifest, dataset.episodes
    lengths = [episode.length for episode in episodes]
    tasks = Counter(span.task for episode in episodes for span in episode.spans).most_common()
    scenes = Counter(episode.scene for episode in episodes).most_common()
    some = np.linspace(0, len(episodes) - 1, min(len(episodes), _HISTOGRAM_RECORDINGS)).astype(int).tolist()
    dims = manifest.action_space.dims
    actions = [dataset.read(i, range(episodes[i].length), ["action"])["action"] for i in some] if dims else []
    parts = [
        f"<h1>{html.escape(manifest.dataset)}</h1>",
        _table(("", ""), _facts(dataset).items()),
        "<h2>Lengths</h2><div class=row>",
        _histogram("steps a recording", lengths),
        _histogram("steps a segment", [span.end - span.start for e in episodes for span in e.spans]),
        "</div><h2>Actions</h2><div class=row>",
        *(_histogram(dim.name, np.concatenate(actions)[:, i]) for i, dim in enumerate(dims)),
        "</div><h2>Frames</h2>",
        *_strip(dataset),
        "<h2>Scenes and tasks</h2><div class=row>",
        _table(("scene", "recordings"), scenes),
        _table(("task", "segments"), tasks),
        "</div><h2>Quarantine</h2>",
        _table(("recording", "reason", "detail"), [row[:3] for row in dataset.quarantine])
        if dataset.quarantine
        else "<p>Nothing was rejected.</p>",
    ]
    title = html.escape(f"{manifest.dataset} v{manifest.version}")
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>{''.join(parts)}\n"


def render_summary(dataset: Dataset) -> str:
    """Counts, reasons of the quarantine, statistics and a strip of frames as Markdown, pictures inside: for Prefect."""
    names = {"action": [dim.name for dim in dataset.manifest.action_space.dims]}
    figures = ("mean", "std", "low", "q01", "q99", "high")
    rows = [
        (
            feature,
            names.get(feature, [*map(str, range(len(of.mean)))])[i],
            *(f"{getattr(of, f)[i]:.3g}" for f in figures),
        )
        for feature, of in sorted(dataset.stats.features.items())
        for i in range(len(of.mean))
    ]
    rejected = sorted(dataset.manifest.quarantined.items())
    parts = [
        f"### {dataset.manifest.dataset}",
        _markdown(("what", "value"), _facts(dataset).items()),
        "#### Quarantine",
        _markdown(("reason", "recordings"), rejected) if rejected else "Nothing was rejected.",
        "#### Statistics",
        _markdown(("feature", "dimension", *figures), rows),
        "#### Frames",
    ]
    for frames, said in _samples(dataset):
        strip = encode_jpeg(np.concatenate([resize(decode_image(frame), _SMALL) for frame in frames], axis=1))
        quoted = said.replace("`", "'")
        parts += [f"![frames](data:image/jpeg;base64,{base64.b64encode(strip).decode()})", f"`{quoted}`"]
    return "\n\n".join(parts)


def _facts(dataset: Dataset) -> dict[str, object]:
    manifest = dataset.manifest
    sides = Counter(episode.split for episode in dataset.episodes)
    return {
        "version": f"{manifest.version} (content {manifest.content_id})",
        "recordings": f"{manifest.num_episodes} ({sides['train']} for training, {sides['validation']} for validation)",
        "language segments": manifest.num_spans,
        "steps": manifest.num_steps,
        "questions": len(dataset.qa),
        "cameras": ", ".join(manifest.cameras),
        "action space": f"{manifest.action_space.name}, {1 / manifest.action_space.dt_s:.0f} Hz",
        "statistics": manifest.stats_id,
        "shards": f"{len(manifest.shards)}, {sum(shard.num_bytes for shard in manifest.shards) / 1e6:.1f} MB",
    }


def _markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(str(cell).replace("|", r"\|") for cell in row) for row in (header, *rows)]
    return "\n".join([f"| {lines[0]} |", "|---" * len(header) + "|", *(f"| {line} |" for line in lines[1:])])


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        return f"<td{' class=n' if isinstance(value, int) else ''}>{html.escape(str(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _histogram(name: str, values: Sequence[int] | np.ndarray, bins: int = 24) -> str:
    if len(values) == 0:
        return ""
    counts, edges = np.histogram(values, bins)
    heights = 80 * counts / counts.max()
    bars = "".join(
        f'<rect x="{9 * i}" y="{80 - height:.1f}" width="8" height="{height:.1f}"/>' for i, height in enumerate(heights)
    )
    caption = f"{html.escape(name)}: {edges[0]:.3g} to {edges[-1]:.3g}"
    return f'<figure><svg width="{9 * bins}" height="80">{bars}</svg><figcaption>{caption}</figcaption></figure>'


def _strip(dataset: Dataset) -> Iterable[str]:
    for frames, said in _samples(dataset):
        images = "".join(f'<img src="data:;base64,{base64.b64encode(frame).decode()}">' for frame in frames)
        yield f"<figure>{images}<figcaption>{html.escape(said)}</figcaption></figure>"


def _samples(dataset: Dataset) -> Iterable[tuple[Sequence[bytes], str]]:
    """Evenly spaced frames of a few recordings, the first camera's, as they are stored; and what they are of."""
    column = f"image_{dataset.manifest.cameras[0]}"
    count = len(dataset.episodes)
    for i in np.linspace(0, count - 1, min(count, _STRIP_RECORDINGS)).astype(int).tolist():
        episode = dataset.episodes[i]
        steps = np.linspace(0, episode.length - 1, min(episode.length, _STRIP_FRAMES)).astype(int).tolist()
        frames = dataset.read(i, steps, [column])[column]
        said = "; ".join(dict.fromkeys(span.text for span in episode.spans))
        yield frames, f"{episode.scene}: {said}"
