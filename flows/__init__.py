"""Prefect flows: each reads like a paragraph and holds no logic; the stages are `upvla.launch.line`."""
