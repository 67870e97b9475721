"""What can be set of a model: tower, projector, decoder. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from llava_mcore.geometry import Geometry, Shape, num_image_embeddings, num_patches, round_up
from llava_mcore.settings.families import DECODERS, TOWERS, Family, contradictions
from llava_mcore.settings.reduction import Pooling, Reduction, TokenMerging, TowerMerging
from llava_mcore.settings.rules import STRICT, NonNegative, Positive, fail_on
from llava_mcore.settings.visual import AnyresSettings, VideoSettings

# The vocabulary is padded to this multiple and not to the tensor-parallel size, so that a checkpoint does not depend on the
# layout it was saved from. Padded rows never take part in the softmax.
VOCAB_MULTIPLE = 64


def _with_family(values: Any, families: Mapping[str, Family], default: str) -> Any:
    """The values with those filled in that follow from the family; an unknown family is named later."""
    given = values.kwargs if isinstance(values, ArgsKwargs) else values
    if not isinstance(given, dict) or given.get("family", default) not in families:
        return values
    given = {**families[given.get("family", default)].fixed, **given}
    return ArgsKwargs((), given) if isinstance(values, ArgsKwargs) else given


def _family_problems(settings: Any, families: Mapping[str, Family], optional: Mapping[str, Any]) -> list[str]:
    if settings.family not in families:
        return [
            f"family {settings.family!r} is unknown; known: {', '.join(families)} (a new one is an entry in settings/families.py)"
        ]
    return contradictions(families[settings.family], settings.family, asdict(settings), optional)


# Settings that not every family has, with the value that leaves them out.
OPTIONAL_OF_TOWERS = {"class_token": True, "patch_bias": False, "pre_norm": True, "activation": "quick_gelu"}
OPTIONAL_OF_DECODERS = {
    "qkv_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "rotary_percent": 1.0,
    "num_experts": None,
    "normalize_expert_weights": True,
}


@dataclass(config=STRICT, kw_only=True)
class VisionSettings:
    """The vision tower."""

    family: str = Field("clip", description=f"published architecture: {', '.join(TOWERS)}")
    image_size: Positive = Field(description="side of the square picture the tower sees, in pixels")
    patch_size: Positive = Field(description="side of a patch, in pixels")
    hidden_size: Positive = Field(description="width of the residual stream")
    ffn_hidden_size: Positive = Field(description="width inside the MLP")
    num_layers: Positive = Field(description="layers of the published tower, the unused last ones included")
    num_attention_heads: Positive = Field(description="attention heads")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the layer norms")
    select_layer: int = Field(-2, description="hidden state handed to the projector; -1 is the last layer's, -2 the one before")
    select_feature: Literal["patch", "cls_patch"] = Field("patch", description="drop or keep the class token")
    class_token: bool = Field(True, description="a class token before the patches (left out: as the family has it)")
    patch_bias: bool = Field(False, description="the patch projection has a bias (left out: as the family has it)")
    pre_norm: bool = Field(True, description="a layer norm before the first layer (left out: as the family has it)")
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = Field(
        "quick_gelu", description="activation of the MLP (left out: as the family has it)"
    )
    token_merging: TowerMerging | None = Field(None, description="merging of tokens inside the tower (null: none)")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return _with_family(values, TOWERS, "clip")

    @model_validator(mode="after")
    def _check(self) -> VisionSettings:
        problems = _family_problems(self, TOWERS, OPTIONAL_OF_TOWERS)
        if self.image_size < self.patch_size:
            problems.append(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.select_feature == "cls_patch" and not self.class_token:
            problems.append("select_feature=cls_patch: this tower has no class token; use patch, which keeps every patch")
        if self.hidden_size % self.num_attention_heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if not -self.num_layers <= self.select_layer <= -1:
            problems.append(f"select_layer {self.select_layer} must lie between -{self.num_layers} and -1")
        fail_on(problems)
        return self

    @property
    def used_layers(self) -> int:
        """Layers that are built: those after the selected hidden state would compute nothing anyone reads."""
        return self.num_layers + 1 + self.select_layer

    @property
    def positions(self) -> int:
        """Rows of the position table: patches, and the class token where there is one."""
        return num_patches(self.image_size, self.patch_size) + self.class_token

    @property
    def side(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def merged_tokens(self) -> list[int]:
        """Tokens that each used layer merges; zeros where the tower merges none."""
        if self.token_merging is None:
            return [0] * self.used_layers
        return self.token_merging.merged(self.positions, self.used_layers, self.class_token)

    @property
    def features_per_image(self) -> int:
        """Features one picture becomes; what the projector merges or pools is still among them."""
        return num_image_embeddings(self.image_size, self.patch_size, self.select_feature) - sum(self.merged_tokens)


@dataclass(config=STRICT, kw_only=True)
class ProjectorSettings:
    """From tower features to decoder embeddings."""

    type: Literal["linear", "mlp2x_gelu"] = Field("mlp2x_gelu", description="one linear layer, or two with a GELU between")
    token_merging: TokenMerging | None = Field(None, description="merging of patches that look alike (null: none)")
    pooling: Pooling | None = Field(None, description="pooling of squares of patches (null: none)")

    @property
    def reduction(self) -> TokenMerging | Pooling | None:
        """What makes fewer embeddings of a picture's features, if anything."""
        return self.token_merging or self.pooling


# What each kind of rotary scaling must be given, and what it may be.
ROPE_SCALING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("original_max_position_embeddings", "short_factor", "long_factor"), ("factor", "attention_factor")),
}


@dataclass(config=STRICT, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of the pretraining; named as in config.json."""

    type: Literal["linear", "llama3", "yarn", "longrope"] = Field(description="the method")
    factor: float | None = Field(None, gt=0, description="how much longer (null: as max_position_embeddings is)")
    original_max_position_embeddings: Positive | None = Field(None, description="longest sample of the pretraining")
    low_freq_factor: float | None = Field(None, gt=0, description="llama3: wavelengths that are scaled wholly")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3: wavelengths that are left alone")
    beta_fast: float | None = Field(None, gt=0, description="yarn: rotations above which nothing is scaled (null: 32)")
    beta_slow: float | None = Field(None, gt=0, description="yarn: rotations below which all is scaled (null: 1)")
    truncate: bool | None = Field(None, description="yarn: round those bounds to whole dimensions (null: true)")
    mscale: float | None = Field(None, ge=0, description="yarn: weight of the scale of queries and keys")
    mscale_all_dim: float | None = Field(None, ge=0, description="yarn: weight of what that scale is divided by")
    attention_factor: float | None = Field(None, gt=0, description="scale of queries and keys (null: from the factor)")
    short_factor: list[float] | None = Field(None, description="longrope: a divisor for each frequency in short samples")
    long_factor: list[float] | None = Field(
        None, description="longrope: the same in samples longer than those of the pretraining"
    )

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        needed, allowed = ROPE_SCALING[self.type]
        given = {name for name, value in asdict(self).items() if value is not None and name != "type"}
        problems = [f"{name} is required for type={self.type}" for name in needed if name not in given]
        problems += [f"{name} has no meaning for type={self.type}" for name in sorted(given - {*needed, *allowed})]
        if self.type == "llama3" and not problems and self.low_freq_factor == self.high_freq_factor:
            problems.append(f"low_freq_factor and high_freq_factor must differ, both are {self.low_freq_factor}")
        fail_on(problems)
        return self


@dataclass(config=STRICT, kw_only=True)
class LanguageSettings:
    """The decoder."""

    family: str = Field("llama", description=f"published architecture: {', '.join(DECODERS)} (Vicuna is llama)")
    hidden_size: Positive = Field(description="width of the residual stream")
    ffn_hidden_size: Positive = Field(description="width inside the gated MLP; of one expert, where there are experts")
    num_layers: Positive = Field(description="decoder layers")
    num_attention_heads: Positive = Field(description="query heads")
    num_query_groups: Positive | None = Field(None, description="key/value heads (null: as many as query heads)")
    kv_channels: Positive | None = Field(None, description="width of a head (null: hidden_size / num_attention_heads)")
    vocab_size: Positive = Field(description="rows of the embedding that have a meaning")
    max_position_embeddings: Positive = Field(description="longest sample the decoder was made for, in tokens")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMS norms")
    rotary_base: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    rotary_percent: float = Field(1.0, gt=0, le=1, description="share of a head's width that is turned by position")
    rope_scaling: RopeScaling | None = Field(None, description="change of the rotary frequencies for longer contexts")
    sliding_window: Positive | None = Field(
        None, description="tokens that a token attends to, itself included (null: all before)"
    )
    qkv_bias: bool = Field(False, description="queries, keys and values have a bias (left out: as the family has it)")
    qk_norm: bool = Field(False, description="an RMS norm over each query and key head (left out: as the family has it)")
    tie_word_embeddings: bool = Field(False, description="the head uses the embedding's weights")
    num_experts: Positive | None = Field(None, description="experts of each layer (null: one MLP for all tokens)")
    experts_per_token: Positive = Field(2, description="experts that each token is sent to")
    normalize_expert_weights: bool = Field(True, description="the weights of a token's experts add up to one")
    router_aux_loss: float = Field(
        0.0, ge=0, description="weight of the loss that keeps experts evenly used (Switch Transformers); 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return _with_family(values, DECODERS, "llama")

    @model_validator(mode="after")
    def _check(self) -> LanguageSettings:
        problems = _family_problems(self, DECODERS, OPTIONAL_OF_DECODERS)
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.query_groups:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )
        problems += self._rotary_problems() + self._expert_problems()
        fail_on(problems)
        return self

    def _expert_problems(self) -> list[str]:
        if self.num_experts is None:
            needed = self.family in DECODERS and "num_experts" in DECODERS[self.family].entries
            return [f"num_experts: family {self.family} has experts; set how many"] if needed else []
        if self.experts_per_token > self.num_experts:
            return [f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}"]
        if self.experts_per_token == 1 and self.normalize_expert_weights:
            return [
                "experts_per_token=1 with normalize_expert_weights=true gives the router no gradient; set one of them otherwise"
            ]
        return []

    def _rotary_problems(self) -> list[str]:
        problems, width, scaling = [], self.rotary_dim, self.rope_scaling
        if width % 2 or not width:
            share = "" if self.rotary_percent == 1.0 else f", of which {width} turn (rotary_percent {self.rotary_percent})"
            problems.append(f"heads are {self.head_dim} wide{share}, but a rotary embedding needs an even width")
        if scaling is None or self.family not in DECODERS:
            return problems
        if scaling.type not in DECODERS[self.family].rope_types:
            known = ", ".join(DECODERS[self.family].rope_types)
            problems.append(f"rope_scaling.type={scaling.type}: family {self.family} knows {known}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if factors is not None and len(factors) != width // 2:
                problems.append(f"rope_scaling.{name} has {len(factors)} numbers, {width // 2} frequencies need one each")
        return problems

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that is turned by position."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as built: a multiple of 64 whatever the layout."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)


@dataclass(config=STRICT, kw_only=True)
class ModelSettings:
    """Vision tower, projector and decoder."""

    vision: VisionSettings
    projector: ProjectorSettings
    language: LanguageSettings
    image_token_id: NonNegative = Field(description="token id written at every place an image embedding will take")
    init_std: float = Field(0.02, gt=0, description="standard deviation of randomly initialised weights")
    anyres: AnyresSettings | None = Field(None, description="pictures of several tiles (null: each is one tile)")
    video: VideoSettings = Field(default_factory=VideoSettings, description="frames of a clip")

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        problems = self._reduction_problems()
        if self.image_token_id >= self.language.vocab_size:
            problems.append(f"image_token_id {self.image_token_id} is outside the vocabulary of {self.language.vocab_size}")
        geometry = self.geometry
        if geometry.class_token and not geometry.plain:
            problems.append("vision.select_feature=cls_patch makes no grid; anyres, pooling and newlines need patch")
        coarsest = max(geometry.strides(Shape(frames=2)))
        if not geometry.pooled_side(coarsest):
            problems.append(f"video.stride: pooling by {coarsest} leaves nothing of a frame of {geometry.side} x {geometry.side}")
        fail_on(problems)
        return self

    def _reduction_problems(self) -> list[str]:
        vision, projector = self.vision, self.projector
        problems = []
        grids = {
            "anyres.merge other than flat": self.anyres is not None and self.anyres.merge != "flat",
            "video.pool other than none": self.video.pool != "none",
            "video.newline=grid": self.video.newline == "grid",
        }
        if self.reduced_by and any(grids.values()):
            problems.append(
                f"{' and '.join(self.reduced_by)} would take the grid of features from "
                f"{' and '.join(name for name, needed in grids.items() if needed)}; change one of them"
            )
        if projector.reduction is None:
            return problems
        name = "token_merging" if projector.token_merging else "pooling"
        problems += [f"projector.{problem}" for problem in projector.reduction.problems(vision.side)]
        if projector.token_merging and projector.pooling:
            problems.append("projector.token_merging and projector.pooling exclude each other; set one of them to null")
        if vision.select_feature != "patch":
            problems.append(
                f"projector.{name} needs a grid of patches; set vision.select_feature=patch, which drops the class token"
            )
        if vision.token_merging:
            problems.append(f"vision.token_merging leaves projector.{name} no grid of patches; set one of them to null")
        return problems

    @property
    def reduced_by(self) -> list[str]:
        """The sections that make fewer embeddings of every tile alike."""
        chosen = {
            "projector.token_merging": self.projector.token_merging,
            "projector.pooling": self.projector.pooling,
            "vision.token_merging": self.vision.token_merging,
        }
        return [name for name, section in chosen.items() if section is not None]

    @property
    def reduction(self) -> Reduction | None:
        """The way in which fewer embeddings are made of every tile alike."""
        return self.vision.token_merging or self.projector.reduction

    @property
    def positions_move(self) -> bool:
        """Whether it depends on a picture's pixels at which positions its embeddings stand in the decoder."""
        return self.geometry.in_place and self.projector.pooling is None

    @property
    def geometry(self) -> Geometry:
        """From sizes of pictures and clips to tiles and embeddings, when a schedule has run its course."""
        return self._geometry(self.embeddings_per_image)

    def geometry_at(self, step: int) -> Geometry:
        """The same in a step, counted from 0; no medium ever becomes more than in step 0."""
        return self._geometry(self.embeddings_at(step))

    def _geometry(self, each: int) -> Geometry:
        return Geometry(
            self.vision.image_size,
            self.vision.side,
            self.vision.select_feature == "cls_patch",
            None if self.anyres is None else self.anyres.geometry,
            self.video.geometry,
            each if self.reduced_by else None,
            self.projector.pooling.stride if self.projector.pooling else 1,
            self.reduction is not None and self.reduction.positions == "kept",
        )

    @property
    def embeddings_per_image(self) -> int:
        """Decoder embeddings one tile becomes, when a schedule has run its course."""
        reduction = self.projector.reduction
        return self.vision.features_per_image if reduction is None else reduction.kept(self.vision.side)

    def embeddings_at(self, step: int) -> int:
        """Decoder embeddings one tile becomes in a step, counted from 0; never more than in step 0."""
        merging = self.projector.token_merging
        return self.embeddings_per_image if merging is None else merging.kept(self.vision.side, merging.ratio_at(step))

    @property
    def projected_per_image(self) -> int:
        """Rows of a tile that go through the projector, when a schedule has run its course."""
        reduction = self.projector.reduction
        after = reduction is None or reduction.where == "after"
        return self.vision.features_per_image if after else self.embeddings_per_image

    @property
    def feature_size(self) -> int:
        """Width of the features that the projector reads."""
        pooling = self.projector.pooling
        wider = pooling.stride**2 if pooling is not None and pooling.kind == "pixel_shuffle" else 1
        return self.vision.hidden_size * wider
