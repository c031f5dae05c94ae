"""MLflow, and nothing else that knows it: runs with their metrics and artifacts, and the registry of models."""

from upvla.tracking.registry import CHAMPION, Registry
from upvla.tracking.runs import Run, Tracker, flatten

__all__ = ["CHAMPION", "Registry", "Run", "Tracker", "flatten"]
