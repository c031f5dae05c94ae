"""The policy as an MLflow model, by MLflow's models-from-code: this file is copied beside every registered version.

`mlflow.pyfunc.load_model("models:/upvla-tiny@champion").predict(observation)`, with B observations at once:

    image_<camera>  u8[B,H,W,3]   every camera of the model's config, at any size
    state           f32[B,S]      not read by this model; part of the contract
    instruction     str[B]
    -> {"actions": f32[B,C,A]}    the next C actions, in the checkpoint's action space
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from upvla.checkpoint import load_bundle, read_marker
from upvla.errors import Mismatch
from upvla.rollout.golden import proven
from upvla.store import open_store
from upvla.types import Observation


class RegisteredPolicy(PythonModel):
    """Loads the checkpoint that its JSON reference names, after checking that it is still the one registered."""

    def load_context(self, context: PythonModelContext) -> None:
        reference = json.loads(Path(context.artifacts["checkpoint"]).read_text())
        found = read_marker(open_store(reference["checkpoint_url"]))
        if found.model_id != reference["model_id"]:
            raise Mismatch(
                f"{reference['checkpoint_url']} holds model {found.model_id}, registered was {reference['model_id']}: "
                "register the new checkpoint as a version of its own"
            )
        self._policy = proven(load_bundle(reference["checkpoint_url"]), reference["model_id"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: Mapping[str, np.ndarray],
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        cameras = {name.removeprefix("image_"): frames for name, frames in model_input.items() if "image_" in name}
        chunks = []
        for i, instruction in enumerate(np.atleast_1d(model_input["instruction"])):
            self._policy.reset(str(instruction))
            frames = {camera: batch[i] for camera, batch in cameras.items()}
            chunks.append(self._policy.act(Observation(frames, model_input["state"][i])).actions)
        return {"actions": np.stack(chunks).astype(np.float32)}


set_model(RegisteredPolicy())
