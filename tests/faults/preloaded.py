"""What the processes of `lives` are forked with. Nothing here starts a thread."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

import tests.train.toy
import upvla.train.resume

__all__ = ["deepspeed", "tests", "torch", "upvla"]
