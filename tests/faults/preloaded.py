"""What the processes of `lives` are forked with. Nothing here starts a thread."""

from __future__ import annotations

import boto3  # which a store on S3 loads
import torch._dynamo  # which an optimiser loads

import tests.train.toy
import upvla.train.resume
from upvla.train.zero import import_deepspeed

import_deepspeed(use_gpu=False)

__all__ = ["boto3", "tests", "torch", "upvla"]
