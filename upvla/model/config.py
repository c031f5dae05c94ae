"""What a model is: sizes, cameras, image codes, token ids. One dial for size: `preset: tiny | small | base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from upvla.errors import ConfigError
from upvla.images import Resize
from upvla.model.presets import PRESETS


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VQLossConfig(_Section):
    """Weights of the tokenizer's training loss; they do not touch the numerics of a trained tokenizer."""

    l1: float = 1.0
    l2: float = 1.0
    contrast: float = 4.0
    """Extra weight of a pixel by how far it is from its neighbourhood: small objects must not be washed out."""
    commitment: float = 0.125
    """0.1 x (1 + 0.25) in the published quantiser."""
    entropy: float = 0.1


class VQConfig(_Section):
    """MAGVIT-v2-style convolutional tokenizer with look-up-free quantisation: 2^`z_channels` codes.

    Level 0 is full resolution; every further level halves it. Zero blocks at a level keep its width.
    """

    image_size: int | tuple[int, int]
    """Side in pixels, or (height, width); each a multiple of `downsampling`."""
    channels: int = Field(gt=0)
    encoder_multipliers: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_multipliers: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    z_channels: int = Field(gt=0, le=16)
    loss: VQLossConfig = VQLossConfig()

    @model_validator(mode="after")
    def _levels_agree(self) -> VQConfig:
        levels = {
            len(v)
            for v in (self.encoder_multipliers, self.encoder_blocks, self.decoder_multipliers, self.decoder_blocks)
        }
        if len(levels) != 1:
            raise ValueError("encoder and decoder multipliers and blocks must name the same number of levels")
        for multiplier in (1, *self.encoder_multipliers, *self.decoder_multipliers):
            if (width := self.channels * multiplier) > 32 and width % 32:
                raise ValueError(f"a level of {width} channels cannot be normalised in 32 groups")
        if any(side <= 0 or side % self.downsampling for side in self.sides):
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.downsampling}")
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.encoder_multipliers) - 1))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        height, width = self.sides
        return height // self.downsampling, width // self.downsampling

    @property
    def codebook_size(self) -> int:
        return int(2**self.z_channels)


class VisionConfig(_Section):
    """The understanding encoder E1: `vit` trains here, `clip` by `upvla.model.weights`, `features` takes what comes.

    With kind `features` the batch carries `f32[B,K,P,D]` patch features (a cache of a frozen tower, or a test's
    stand-in) in place of frames, and `num_patches` says P.
    """

    kind: Literal["vit", "clip", "features"]
    image_size: int = Field(gt=0)
    width: int = Field(gt=0)
    patch: int = 16
    blocks: int = 0
    heads: int = 1
    mlp: int = 0
    stem: tuple[int, ...] = ()
    """Channels of the convolutional stem: the first layer divides the side by 4, each other one and the last by 2."""
    pool: tuple[int, ...] = (1,)
    """Per camera: average this many patches a side into one token."""
    keypoints: int = 0
    """With a `vit`: one more token a camera that says where this many learnt features are (spatial softmax)."""
    frozen: bool = False
    num_patches: int | None = None

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    @property
    def patches_by_camera(self) -> tuple[int, ...]:
        if self.num_patches is not None:
            return (self.num_patches,) * len(self.pool)
        return tuple((self.grid // p) ** 2 + (self.keypoints > 0) for p in self.pool)

    @property
    def cacheable(self) -> bool:
        """Its features can be made once: it does not learn, and every camera gives as many."""
        return self.frozen and len(set(self.patches_by_camera)) == 1

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.num_patches is None and any(self.grid % p for p in self.pool):
            raise ValueError(f"pool {self.pool} does not divide the {self.grid} x {self.grid} patch grid")
        if self.kind == "features" and self.num_patches is None:
            raise ValueError("vision.kind 'features' needs vision.num_patches")
        if self.keypoints and self.kind != "vit":
            raise ValueError("vision.keypoints are a part of kind 'vit'")
        if self.kind == "vit" and self.frozen:
            raise ValueError("a 'vit' starts from random weights and cannot be frozen: freeze it in a later stage")
        if self.kind == "vit" and self.patch != 2 ** (len(self.stem) + 2):
            raise ValueError(f"a stem of {len(self.stem)} layers makes patches of {2 ** (len(self.stem) + 2)} pixels")
        return self


class BackboneConfig(_Section):
    """Geometry of the causal LM, by any family of transformers that takes `inputs_embeds` and a 4-D mask."""

    family: Literal["phi", "llama", "qwen2", "qwen3"] = "phi"
    width: int = Field(gt=0)
    blocks: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp: int = Field(gt=0)
    rotary_fraction: float = 0.5
    rotary_base: float = 10000.0
    max_positions: int = 2048
    norm_eps: float = 1e-5
    init_std: float = 0.02
    attention: Literal["sdpa", "eager", "flex"] = "sdpa"
    """`flex` reads the mask as blocks (FlexAttention; compiled on a GPU); results agree to rounding."""
    gradient_checkpointing: bool = False


class ActionHeadConfig(_Section):
    heads: int = Field(gt=0)
    """The published block doubles this number; 4 means 8 attention heads."""
    gripper: Literal["mse", "bce"] = "mse"
    """`mse` is the released code, `bce` the paper: a logit on the last dimension with target (g + 1) / 2."""
    supervise_padding: bool = True
    """The released code trains on a short window's padding (stand still, keep the gripper)."""


class DescriptionConfig(_Section):
    """The MMU-conditioned prompt: robot rows read the model's own description of the scene before the instruction."""

    question: str = "Please describe this image in detail."
    """The released configuration's generic question; the paper's own wording is not known."""
    budget: int = Field(default=64, gt=0)
    """Longest description in tokens; what is longer is cut. The text span grows by this."""
    every_steps: int = Field(default=30, gt=0)
    """Training frames share the description of the first frame of each such stretch of a recording."""
    every_chunks: int = Field(default=0, ge=0)
    """In a rollout it is made anew with each instruction, and again after so many chunks (0: never)."""


class ModelConfig(_Section):
    """Everything that fixes the model's numerics. `{preset: tiny, chunk: 6}` is a preset with one value replaced."""

    preset: str
    text_vocab_size: int = Field(gt=0)
    """Ids of the text tokenizer (its end token included) are below this; the special ids start here."""
    eot_id: int = Field(ge=0)
    text_budget: int = Field(gt=3)
    """T of the published prompt: a robot row's text span (task, bos, instruction, eot) has at most T + 1 tokens."""
    overlong: Literal["refuse", "cut"] = "refuse"
    """An instruction over its budget is an error, or loses its tail as in the released code."""
    description: DescriptionConfig | None = None
    """The description part of the paper's action prompt (section 4.3); None: without, as in the released code."""
    qa_budget: int = Field(gt=0)
    """Longest conversation of a question row, in tokens; what is longer is cut."""
    system_ids: tuple[int, ...] = ()
    """The tokenised system prompt of question rows (28 ids in the released training, none in its rollout)."""
    vision_cameras: tuple[str, ...]
    code_cameras: tuple[str, ...]
    vision_prompt: bool
    """Robot rows start with the understanding encoder's patches (paper section 4.3) or not (released code)."""
    image_softmax: Literal["codebook", "full"]
    """`full` is the released loss: whole vocabulary, delimiters included. `codebook` normalises over image codes."""
    chunk: int = Field(gt=0)
    action_dims: int = Field(gt=1)
    trim: bool = True
    """Cut padding columns that the whole batch shares. Results do not depend on it: positions keep their values."""
    join_rows: bool = True
    """Robot and question rows in one pass of the decoder, the shorter kind padded; else each kind in its own pass.
    One pass has fewer kernels, two have no padding between kinds: better where their lengths differ much."""
    backbone: BackboneConfig
    vision: VisionConfig
    vq: VQConfig
    action_head: ActionHeadConfig
    vision_filter: Literal["area", "linear", "cubic", "pil_bicubic"] = "area"
    vq_filter: Literal["area", "linear", "cubic", "pil_bicubic"] = "area"

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("preset") not in PRESETS:
            return values
        return merge(PRESETS[values["preset"]], values)

    @model_validator(mode="after")
    def _coherent(self) -> ModelConfig:
        if len(self.vision.pool) != len(self.vision_cameras):
            raise ValueError(
                f"vision.pool names {len(self.vision.pool)} cameras, vision_cameras {len(self.vision_cameras)}"
            )
        if self.eot_id >= self.text_vocab_size:
            raise ValueError(f"eot_id {self.eot_id} must be below text_vocab_size {self.text_vocab_size}")
        if self.backbone.width % (2 * self.action_head.heads) or self.backbone.width % self.backbone.heads:
            raise ValueError(f"backbone.width {self.backbone.width} must divide by the attention heads")
        longest = max(self.max_robot_length, self.max_qa_length)
        if longest > self.backbone.max_positions:
            raise ValueError(f"rows of {longest} tokens exceed backbone.max_positions {self.backbone.max_positions}")
        return self

    # -- the vocabulary, in the published order: text, [PAD], nine special tokens, image codes, one mask id

    @property
    def pad_id(self) -> int:
        return self.text_vocab_size

    @property
    def soi_id(self) -> int:
        return self.text_vocab_size + 1

    @property
    def eoi_id(self) -> int:
        return self.text_vocab_size + 2

    @property
    def predict_id(self) -> int:
        """`<|t2i|>` in Show-o and in the rollout, renamed `<|pre|>` by the training script: one id."""
        return self.text_vocab_size + 5

    @property
    def mmu_id(self) -> int:
        return self.text_vocab_size + 6

    @property
    def action_id(self) -> int:
        """`<|lvg|>`, reused as the action query."""
        return self.text_vocab_size + 9

    @property
    def image_offset(self) -> int:
        return self.text_vocab_size + 10

    @property
    def mask_id(self) -> int:
        return self.image_offset + self.vq.codebook_size

    @property
    def image_ids(self) -> slice:
        """Ids of the image codes, code c at `image_offset + c`."""
        return slice(self.image_offset, self.mask_id)

    @property
    def vocab_size(self) -> int:
        return self.mask_id + 1

    # -- lengths

    @property
    def cameras(self) -> tuple[str, ...]:
        """What an observation must hold."""
        return tuple(dict.fromkeys((*self.vision_cameras, *self.code_cameras)))

    @property
    def num_views(self) -> int:
        return len(self.code_cameras)

    @property
    def codes_per_view(self) -> int:
        rows, columns = self.vq.grid
        return rows * columns

    @property
    def num_patches(self) -> int:
        """Patch tokens of one observation, all cameras."""
        return sum(self.vision.patches_by_camera)

    @property
    def prompt_budget(self) -> int:
        """Longest text of a robot row in tokens: description and instruction."""
        return self.text_budget + (self.description.budget if self.description else 0)

    @property
    def max_robot_length(self) -> int:
        prompt = self.num_patches + 2 if self.vision_prompt else 0
        return prompt + self.prompt_budget + 1 + 2 + self.num_views * self.codes_per_view + self.chunk

    @property
    def max_qa_length(self) -> int:
        return 3 + len(self.system_ids) + self.num_patches + self.qa_budget

    @property
    def vision_resize(self) -> Resize:
        return Resize(size=self.vision.image_size, filter=self.vision_filter)

    @property
    def vq_resize(self) -> Resize:
        height, width = self.vq.sides
        return Resize(size=height, width=None if width == height else width, filter=self.vq_filter)


def preset(name: str, **changes: Any) -> ModelConfig:
    """`preset("tiny", chunk=6)`. Raises `ConfigError` for a name that does not exist."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return ModelConfig.model_validate({"preset": name, **changes})


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `under`, section by section; values and lists are replaced."""
    merged = dict(under)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
