"""upvla: robot episodes in, a policy you can trust out."""

__version__ = "0.1.0"
