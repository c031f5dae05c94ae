"""Policies acting in environments, and what their scores mean."""
