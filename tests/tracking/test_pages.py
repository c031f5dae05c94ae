"""MLflow as a person uses it: tick runs, Compare, read a model's card; in a real browser against a real server.

Screenshots lie under `$UPVLA_HOME/pages` (in CI: `.upvla/pages`), else in the test's own folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollout.test_policy import make_bundle
from tests.tracking.conftest import Server
from upvla.checkpoint import export
from upvla.launch.card import model_card
from upvla.rollout.evaluate import as_metrics
from upvla.store import open_store
from upvla.tracking import CHAMPION, Registry, Tracker
from upvla.types import Estimate

pytestmark = [pytest.mark.seam, pytest.mark.slow, pytest.mark.timeout(1200)]
WAIT_MS = 240_000
SCORES = {
    "stage2": {"chains_d/avg_len": Estimate(1.2, 0.9, 1.5), "chains_d/sr_1": Estimate(0.7, 0.6, 0.8)},
    "reference random": {"chains_d/avg_len": Estimate(0.1, 0.0, 0.2), "chains_d/sr_1": Estimate(0.1, 0.0, 0.2)},
}


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install -y chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        opened = browser.new_page(viewport={"width": 1900, "height": 1000})
        opened.set_default_timeout(WAIT_MS)
        yield opened
        browser.close()


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    home = os.environ.get("UPVLA_HOME")
    folder = Path(home) / "pages" if home else tmp_path / "pages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fill(tracker: Tracker, folder: Path) -> str:
    """Two runs with curves and scores, and a registered champion with its card; the experiment's id."""
    for name, scores in SCORES.items():
        run = tracker.start(name, name, params={"seed": 1}, tags={"git_commit": "abc"})
        for step in range(1, 21):
            run.log({"loss/act": 1.0 / step}, step)
        run.log(as_metrics(scores), 0)
        if name == "stage2":
            run.picture(np.full((96, 192, 3), 90, np.uint8), "rollouts/chain-000-frames.png")
        run.close(timeout_s=240)
    bundle, run_id = make_bundle(), tracker.run_id("stage2", "stage2")
    checkpoint, registry = export(open_store(str(folder)), "one", bundle), Registry(tracker)
    tags = {"stats_id": "s1", "protocol.chains_d": "0123abcd"}
    version = registry.register("upvla-tiny", checkpoint, run_id, cameras=("static",), metrics={}, tags=tags)
    scored = {
        "scores": {"upvla-tiny": {name: estimate._asdict() for name, estimate in SCORES["stage2"].items()}},
        "protocols": {"chains_d": "0123abcd"},
    }
    strips = tracker.artifacts(run_id, "rollouts")
    card = model_card("upvla-tiny", bundle, checkpoint, scored, tags, run_id=run_id, strips=strips)
    registry.describe("upvla-tiny", version.version, card)
    registry.set_alias("upvla-tiny", CHAMPION, version.version)
    return tracker.experiment_id()


def test_a_person_compares_runs_and_reads_a_models_card(page: Any, server: Server, pages: Path, tmp_path: Path) -> None:
    server.wait_healthy()
    tracker = Tracker(server.uri, "pages")
    experiment = fill(tracker, tmp_path / "models")

    page.goto(f"{tracker.uri}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
    page.get_by_test_id("experiment-view-compare-runs-card").first.wait_for()
    for metric in ("chains_d/avg_len", "chains_d/sr_1"):
        page.get_by_text(metric, exact=True).first.wait_for(state="attached")
    page.wait_for_timeout(3000)  # charts draw themselves
    page.screenshot(path=pages / "experiment.png")
    # a section's charts exist only while it is in sight, and the losses are below the scores
    page.get_by_test_id("experiment-view-compare-runs-section-header").last.scroll_into_view_if_needed()
    page.get_by_text("loss/act", exact=True).first.wait_for(state="attached")
    page.wait_for_timeout(3000)
    page.screenshot(path=pages / "curves.png")

    page.goto(f"{tracker.uri}/#/experiments/{experiment}/runs?compareRunsMode=TABLE")
    rows = page.get_by_role("checkbox", name=re.compile("toggle row selection"))
    rows.nth(1).wait_for(state="attached")
    for index in range(2):
        rows.nth(index).check(force=True)
    page.get_by_test_id("runs-compare-button").click()
    page.wait_for_url(re.compile("compare-runs"))
    for text in ("stage2", "reference random", "chains_d/avg_len_low", "chains_d/avg_len_high"):
        page.get_by_text(text).first.wait_for(state="attached")
    page.wait_for_timeout(3000)
    page.screenshot(path=pages / "compare.png", full_page=True)

    page.goto(tracker.run_page(tracker.run_id("stage2", "stage2"), "rollouts"))
    page.get_by_text("chain-000-frames.png").first.wait_for()

    page.goto(tracker.version_page("upvla-tiny", "1"))
    for text in ("Results, with 95 % intervals", "1.20 [0.90, 1.50]", "Limits", "Predicted frames", "0123abcd"):
        page.get_by_text(text).first.wait_for(state="attached")
    page.get_by_text("champion").first.wait_for()
    strip = page.locator("img[src*='chain-000-frames.png']").first
    strip.wait_for(state="attached")
    page.wait_for_function("picture => picture.complete && picture.naturalWidth == 192", arg=strip.element_handle())
    page.screenshot(path=pages / "model.png", full_page=True)
    assert all((pages / f"{name}.png").stat().st_size > 20_000 for name in ("experiment", "curves", "compare", "model"))
