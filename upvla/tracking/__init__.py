"""MLflow, and nothing else that knows it: runs with their metrics and artifacts, and the registry of models."""

from upvla.tracking.registry import CHAMPION, Registry
from upvla.tracking.runs import PROTOCOL, Run, Tracker, flatten, protocol_tags

__all__ = ["CHAMPION", "PROTOCOL", "Registry", "Run", "Tracker", "flatten", "protocol_tags"]
