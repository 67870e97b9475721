"""Everything that can be set, as pydantic dataclasses. The field descriptions are the help text.

No torch here: settings are composed, checked and printed before anything heavy is imported.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from llava_mcore.geometry import num_image_embeddings, round_up
from llava_mcore.settings.layouts import layout_problems

STRICT = ConfigDict(extra="forbid", strict=False, validate_default=True)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

# The vocabulary is padded to this multiple and not to the tensor-parallel size, so that a checkpoint does not depend on the
# layout it was saved from. Padded rows never take part in the softmax.
VOCAB_MULTIPLE = 64


def _fail_on(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(config=STRICT, kw_only=True)
class VisionSettings:
    """The vision tower."""

    family: Literal["clip"] = Field("clip", description="tower architecture")
    image_size: Positive = Field(description="side of the square picture the tower sees, in pixels")
    patch_size: Positive = Field(description="side of a patch, in pixels")
    hidden_size: Positive = Field(description="width of the residual stream")
    ffn_hidden_size: Positive = Field(description="width inside the MLP")
    num_layers: Positive = Field(description="layers of the published tower, the unused last ones included")
    num_attention_heads: Positive = Field(description="attention heads")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the layer norms")
    select_layer: int = Field(-2, description="hidden state handed to the projector; -1 is the last layer's, -2 the one before")
    select_feature: Literal["patch", "cls_patch"] = Field("patch", description="drop or keep the class token")

    @model_validator(mode="after")
    def _check(self) -> VisionSettings:
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if not -self.num_layers <= self.select_layer <= -1:
            problems.append(f"select_layer {self.select_layer} must lie between -{self.num_layers} and -1")
        _fail_on(problems)
        return self

    @property
    def used_layers(self) -> int:
        """Layers that are built: those after the selected hidden state would compute nothing anyone reads."""
        return self.num_layers + 1 + self.select_layer

    @property
    def embeddings_per_image(self) -> int:
        """Decoder embeddings one picture becomes."""
        return num_image_embeddings(self.image_size, self.patch_size, self.select_feature)


@dataclass(config=STRICT, kw_only=True)
class ProjectorSettings:
    """From tower features to decoder embeddings."""

    type: Literal["linear", "mlp2x_gelu"] = Field("mlp2x_gelu", description="one linear layer, or two with a GELU between")


@dataclass(config=STRICT, kw_only=True)
class LanguageSettings:
    """The decoder."""

    family: Literal["llama"] = Field("llama", description="decoder architecture")
    hidden_size: Positive = Field(description="width of the residual stream")
    ffn_hidden_size: Positive = Field(description="width inside the gated MLP")
    num_layers: Positive = Field(description="decoder layers")
    num_attention_heads: Positive = Field(description="query heads")
    num_query_groups: Positive | None = Field(None, description="key/value heads (null: as many as query heads)")
    kv_channels: Positive | None = Field(None, description="width of a head (null: hidden_size / num_attention_heads)")
    vocab_size: Positive = Field(description="rows of the embedding that have a meaning")
    max_position_embeddings: Positive = Field(description="longest sample the decoder was made for, in tokens")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMS norms")
    rotary_base: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    tie_word_embeddings: bool = Field(False, description="the head uses the embedding's weights")

    @model_validator(mode="after")
    def _check(self) -> LanguageSettings:
        problems = []
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.query_groups:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )
        if self.head_dim % 2:
            problems.append(f"heads are {self.head_dim} wide, but a rotary embedding needs an even width")
        _fail_on(problems)
        return self

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

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.image_token_id >= self.language.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is outside the vocabulary of {self.language.vocab_size}")
        return self


TemplateName = Literal[
    "plain",
    "plain_eos",
    "v0",
    "v1",
    "vicuna_v1",
    "llava_v1",
    "llava_llama_2",
    "mistral_instruct",
    "chatml",
    "mpt",
    "qwen_1_5",
    "qwen_2",
    "qwen_2_5",
    "chat_template",
]


@dataclass(config=STRICT, kw_only=True)
class SourceSettings:
    """One dataset of a mixture."""

    path: str = Field(description="folder of webdataset shards with their index")
    weight: Annotated[float, Field(ge=0)] | dict[NonNegative, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        description="share of the samples, relative to the other datasets'; or {step: weight} to change it on the way",
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="times the dataset occurs in an epoch of the mixture"
    )
    sampling_strategy: str = Field(
        default="all", description="samples that take part: all, first:N, end:N or random:N; N may be 20%"
    )


@dataclass(config=STRICT, kw_only=True)
class DataSettings:
    """What is read, and how it becomes packed streams."""

    path: str | None = Field(None, description="folder of webdataset shards with their index (tools/prepare_data.py shard)")
    mixture: list[SourceSettings] = Field(
        default_factory=list,
        description="several datasets in place of path, all with a weight or all with epochs (1 where neither is given): "
        "a list of {path, weight, epochs, sampling_strategy}",
    )
    mixture_file: str | None = Field(None, description="YAML file with the mixture as its list `datasets`, in place of path")
    tokenizer: str | None = Field(None, description="folder with tokenizer.json or tokenizer.model, or such a file")
    template: TemplateName = Field(
        "vicuna_v1", description="how a conversation becomes text and labels; chat_template: the tokenizer's own"
    )
    system_prompt: str | None = Field(None, description="in place of the template's (a sample's own goes before it)")
    label_rule: Literal["answers", "published"] = Field(
        "answers", description="learn the answers and what ends them, or what the published models of the template learned"
    )
    image_start_token: str = Field("", description="token in front of every picture, as <im_start>; the tokenizer must have it")
    image_end_token: str = Field("", description="token behind every picture, as <im_end>")
    image_mode: Literal["pad", "square"] = Field(
        "pad", description="pad: to a square with the mean colour, then resize; square: resize the short side, then centre-crop"
    )
    image_mean: tuple[float, float, float] = Field((0.48145466, 0.4578275, 0.40821073), description="mean per channel (CLIP's)")
    image_std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="standard deviation per channel (CLIP's)"
    )
    sequence_length: Positive = Field(2048, description="tokens of one packed stream")
    packing: bool = Field(True, description="several samples in a stream; false: one sample in each")
    packing_window: NonNegative = Field(
        4096,
        description="samples that are packed together, in whole steps: a step then has train.global_batch_size samples on "
        "average; 0: every step is packed alone and has exactly as many",
    )
    streams_multiple: Positive = Field(
        1,
        description="streams of a step come in groups of so many, where a window has enough: "
        "with the data-parallel size no rank gets an empty one",
    )
    shuffle: bool = Field(True, description="a new order every epoch; false: the order of the shards")
    shuffle_shards: Positive = Field(16, description="shards whose samples are mixed with each other; all are read at a time")
    quarantine: str | None = Field(
        None,
        description="list of samples to leave out, each from a stated position on (tools/prepare_data.py quarantine)",
    )
    max_bad_samples: NonNegative = Field(100, description="unreadable samples that are skipped before the run stops")
    max_bad_rate: Fraction = Field(0.01, description="largest share of unreadable samples among the last 100,000")
    max_bad_in_a_row: Positive = Field(32, description="unreadable samples one after the other that stop the run")
    read_ahead: NonNegative = Field(2, description="steps whose bytes are read before their turn to be decoded")
    read_threads: Positive = Field(4, description="threads that read bytes")
    prefetch: Positive = Field(2, description="steps made ready ahead of the model")
    decode_threads: Positive = Field(2, description="threads that decode pictures")
    decoder: Literal["auto", "dali", "python"] = Field(
        "auto", description="what decodes: dali (Pillow and PyAV where it cannot), python (Pillow, PyAV), or DALI if installed"
    )
    decode_on: Literal["cpu", "gpu"] = Field("cpu", description="where DALI decodes; gpu: by nvJPEG and NVDEC")
    video_frames: Positive = Field(8, description="frames of a video, at most")
    video_frames_by: Literal["uniform", "segments", "time", "fps"] = Field(
        "uniform",
        description="frames of a video: middles of equal parts (uniform), a random one of each part (segments), middles of parts "
        "of equal duration (time), or so many a second (fps)",
    )
    video_fps: float = Field(1.0, gt=0, description="frames of a video a second, where video_frames_by is fps")

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        named = [name for name in ("path", "mixture", "mixture_file") if getattr(self, name)]
        problems = [f"{' and '.join(named)} exclude each other; set one of them"] if len(named) > 1 else []
        if self.mixture:
            given = {name for source in self.mixture for name in ("weight", "epochs") if getattr(source, name) is not None}
            weighted = [source.weight is not None for source in self.mixture]
            if len(given) > 1 or any(weighted) != all(weighted):
                problems.append("mixture: give every dataset a weight, or none and epochs where they are not 1")
        _fail_on(problems)
        return self


@dataclass(config=STRICT, kw_only=True)
class TrainSettings:
    """Optimisation, checkpoints, logging."""

    seed: NonNegative = Field(1234, description="seed of the weights and of the data order")
    epochs: float = Field(1.0, gt=0, description="passes over the data, where steps is null")
    steps: Positive | None = Field(None, description="optimizer steps (null: derived from epochs)")
    stop_after: Positive | None = Field(
        None, description="save and end after this step without shortening the schedule (null: run to the end)"
    )
    global_batch_size: Positive = Field(128, description="samples of one optimizer step, over all ranks")
    micro_batch_size: Positive = Field(1, description="streams in one forward pass of one model replica")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="type of weights and activations")
    lr: float = Field(gt=0, description="peak learning rate")
    module_lr: dict[Literal["vision_tower", "projector", "language_model"], Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="peak learning rate of single modules, in place of lr"
    )
    min_lr_ratio: Fraction = Field(0.0, description="last learning rate as a share of the peak")
    warmup_ratio: Fraction = Field(0.03, description="share of the steps that warm up linearly from zero")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warmup")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (never on biases and norms)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    freeze: list[str] = Field(
        default_factory=list,
        description="what is not trained: vision_tower, projector, language_model, or regular expressions over parameter names",
    )
    init_from: str | None = Field(
        None, description="weights to start from, nothing else: a checkpoint of this project or a Hugging Face folder"
    )
    output_dir: str = Field("runs/default", description="checkpoints, logs and the composed settings go here")
    resume: bool = Field(True, description="go on from the newest checkpoint in output_dir, if there is one")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="decoder activations computed again in the backward pass: none, those of attention, or all but inputs"
    )
    save_every: NonNegative = Field(500, description="steps between checkpoints; 0 saves only at the end")
    keep_checkpoints: NonNegative = Field(2, description="newest checkpoints that are kept; 0 keeps all")
    log_every: Positive = Field(1, description="steps between console lines")
    tensorboard: bool = Field(True, description="write TensorBoard events under output_dir")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="Weights & Biases")
    wandb_project: str = Field("llava_mcore", description="Weights & Biases project")


@dataclass(config=STRICT, kw_only=True)
class ParallelSettings:
    """How the model is spread. The data-parallel size is what remains of the world size."""

    tensor: Positive = Field(1, description="tensor-parallel ranks")
    pipeline: Positive = Field(1, description="pipeline stages")
    context: Positive = Field(1, description="context-parallel ranks: each holds a part of every sample")
    sequence: bool = Field(True, description="sequence parallelism; takes effect where tensor > 1")
    virtual_pipeline: Positive = Field(
        1, description="parts of the decoder that each pipeline stage holds (interleaved schedule)"
    )
    pipeline_split: Literal["even", "auto"] | list[NonNegative] = Field(
        "even", description="decoder layers of each stage: even, auto (by cost, the encoder counted), or a list in decoder order"
    )
    context_exchange: Literal["all_gather", "ring"] = Field(
        "all_gather", description="how context-parallel ranks see each other's keys and values"
    )
    encoder: Literal["data_parallel", "tensor_parallel"] = Field(
        "data_parallel",
        description="tower and projector: whole on each rank of the first stage, pictures dealt out; or split over tensor",
    )
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward pass still runs")
    overlap_param_gather: bool = Field(False, description="gather updated parameters during the next forward pass")
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that takes longer ends the run")

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        problems = []
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            problems.append("overlap_param_gather needs overlap_grad_reduce=true")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            problems.append(f"virtual_pipeline {self.virtual_pipeline} needs pipeline > 1")
        if isinstance(self.pipeline_split, list) and len(self.pipeline_split) != self.chunks:
            problems.append(
                f"pipeline_split {self.pipeline_split} has {len(self.pipeline_split)} entries; pipeline x virtual_pipeline needs "
                f"{self.chunks}"
            )
        _fail_on(problems)
        return self

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between tensor-parallel regions are split along the stream."""
        return self.sequence and self.tensor > 1

    @property
    def chunks(self) -> int:
        """Parts the decoder is cut into."""
        return self.pipeline * self.virtual_pipeline

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one stream together."""
        return self.tensor * self.pipeline * self.context


@dataclass(config=STRICT, kw_only=True)
class PrecisionSettings:
    """What layers are made of and in which precision they multiply. What the machine lacks is refused at the start of a run."""

    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto", description="layers; auto: Transformer Engine where it is installed, on a GPU and in bfloat16, else torch"
    )
    attention: Literal["auto", "sdpa", "flash", "fused"] = Field(
        default="auto",
        description="attention: torch's sdpa, flash (torch's varlen_attn or flash-attn), fused (cuDNN, by Transformer Engine), "
        "or the fastest there is",
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        default=None, description="FP8 matrix products (null: none); hybrid: e4m3 forward, e5m2 for gradients"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        default="tensorwise",
        description="where FP8 scales come from: earlier steps, the tensor, its blocks, or blocks of 32 (Blackwell)",
    )
    fp8_first_last_bf16: NonNegative = Field(default=0, description="decoder layers at each end that stay in bfloat16")
    fp8_modules: list[Literal["language_model", "projector", "vision_tower"]] = Field(
        default=["language_model"], description="modules that multiply in FP8; embedding and head never do"
    )
    fp8_param_gather: bool = Field(
        default=False, description="keep and gather the FP8 modules' weights in FP8 (float32 masters stay)"
    )

    @model_validator(mode="after")
    def _check(self) -> PrecisionSettings:
        problems = []
        if self.fp8 and not self.fp8_modules:
            problems.append("fp8_modules is empty; name a module or set fp8=null")
        if self.fp8 and self.fp8_recipe == "delayed" and self.fp8_first_last_bf16:
            problems.append("fp8_first_last_bf16 and fp8_recipe=delayed exclude each other; use fp8_recipe=tensorwise")
        if self.fp8 and self.fp8_recipe == "mxfp8" and self.fp8_param_gather:
            problems.append("fp8_param_gather is not supported with fp8_recipe=mxfp8; set fp8_param_gather=false")
        if self.fp8_param_gather and not self.fp8:
            problems.append("fp8_param_gather needs fp8=hybrid or fp8=e4m3")
        _fail_on(problems)
        return self

    @property
    def fp8_multiple(self) -> int:
        """What the rows and columns of an FP8 matrix product must be a multiple of."""
        return 32 if self.fp8_recipe == "mxfp8" else 16


@dataclass(config=STRICT, kw_only=True)
class Settings:
    """A whole run."""

    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    parallel: ParallelSettings
    precision: PrecisionSettings = Field(default_factory=PrecisionSettings)

    @model_validator(mode="after")
    def _check(self) -> Settings:
        problems = []
        image = self.model.vision.embeddings_per_image
        if image >= self.data.sequence_length:
            problems.append(
                f"data.sequence_length {self.data.sequence_length} has no room for one picture of {image} embeddings; "
                f"set data.sequence_length above {image}"
            )
        if self.data.sequence_length > self.model.language.max_position_embeddings:
            problems.append(
                f"data.sequence_length {self.data.sequence_length} exceeds "
                f"model.language.max_position_embeddings {self.model.language.max_position_embeddings}"
            )
        _fail_on(problems + layout_problems(self))
        return self
