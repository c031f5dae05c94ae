"""Simulated worlds behind the `Env` protocol, and the task contract that they share."""
