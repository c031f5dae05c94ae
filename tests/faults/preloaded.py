"""What the processes of `lives` are forked with. Nothing here starts a thread."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # with a first engine it looks for that, and so loads a compiler
import torch
import torch._dynamo  # which an optimiser loads

import tests.train.toy
import upvla.train.resume

__all__ = ["deepspeed", "tests", "torch", "upvla"]
