"""Everything that can be set, as pydantic dataclasses. The field descriptions are the help text.

No torch here: settings are composed, checked and printed before anything heavy is imported.
"""

from __future__ import annotations

from math import lcm
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from llava_mcore.settings.layouts import layout_problems
from llava_mcore.settings.model import (
    ROPE_SCALING,
    VOCAB_MULTIPLE,
    LanguageSettings,
    ModelSettings,
    ProjectorSettings,
    RopeScaling,
    VisionSettings,
)
from llava_mcore.settings.reduction import Pooling, TokenMerging, TowerMerging
from llava_mcore.settings.rules import STRICT, Fraction, NonNegative, Positive, fail_on

__all__ = [
    "ROPE_SCALING",
    "VOCAB_MULTIPLE",
    "DataSettings",
    "LanguageSettings",
    "ModelSettings",
    "ParallelSettings",
    "Pooling",
    "PrecisionSettings",
    "ProjectorSettings",
    "RopeScaling",
    "Settings",
    "TokenMerging",
    "TowerMerging",
    "TrainSettings",
    "VisionSettings",
]


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
    image_mode: Literal["pad", "square", "stretch"] = Field(
        "pad",
        description="a picture or frame of one tile; pad: to a square with the mean colour, then resize; square: resize the "
        "short side, then centre-crop; stretch: resize both sides (pictures of several tiles: model.anyres)",
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
        8,
        description="streams of a step come in groups of so many, halved until a step has two groups on average: every rank gets "
        "as many at data-parallel sizes that divide it",
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
        "auto",
        description="what decodes and resizes: python (Pillow, PyAV; the pixels of transformers' processor to the bit), dali "
        "(DALI where it can, a fast resize within 2/255 of those), or auto: as dali, the same bits where it is not installed",
    )
    decode_on: Literal["cpu", "gpu"] = Field("cpu", description="where DALI decodes; gpu: by nvJPEG and NVDEC")
    video_frames: Positive = Field(8, description="frames of a video, at most")
    video_frames_by: Literal["uniform", "segments", "time", "fps"] = Field(
        "uniform",
        description="frames of a video: middles of equal parts (uniform), a random one of each part (segments), middles of parts "
        "of equal duration (time), or so many a second (fps)",
    )
    video_fps: float = Field(1.0, gt=0, description="frames of a video a second, where video_frames_by is fps")
    video_time_instruction: bool = Field(
        False, description="after a video stands how long it is and when its frames are shown, in LLaVA-Video's words"
    )

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        named = [name for name in ("path", "mixture", "mixture_file") if getattr(self, name)]
        problems = [f"{' and '.join(named)} exclude each other; set one of them"] if len(named) > 1 else []
        if self.mixture:
            given = {name for source in self.mixture for name in ("weight", "epochs") if getattr(source, name) is not None}
            weighted = [source.weight is not None for source in self.mixture]
            if len(given) > 1 or any(weighted) != all(weighted):
                problems.append("mixture: give every dataset a weight, or none and epochs where they are not 1")
        if self.video_time_instruction and self.video_frames_by == "segments":
            problems.append(
                "video_time_instruction needs the same frames in every epoch, as its text is counted before the run: set "
                "video_frames_by to uniform, time or fps"
            )
        fail_on(problems)
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
        "none",
        description="activations computed again in the backward pass: none, recompute_modules of each layer, or whole layers",
    )
    recompute_modules: list[Literal["core_attn", "mlp"]] = Field(
        default=["core_attn"], description="what of a layer recompute=selective computes again (mlp: in the decoder only)"
    )
    recompute_in: list[Literal["vision_tower", "language_model"]] = Field(
        default=["language_model"], description="modules whose layers are recomputed"
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
    expert: Positive = Field(
        1, description="expert-parallel ranks, taken from the data- and context-parallel ones: each holds a part of the experts"
    )
    context: Positive = Field(1, description="context-parallel ranks: each holds a part of every sample")
    sequence: bool = Field(True, description="sequence parallelism; takes effect where tensor > 1")
    virtual_pipeline: Positive = Field(
        1, description="parts of the decoder that each pipeline stage holds (interleaved schedule)"
    )
    pipeline_split: Literal["even", "auto"] | list[NonNegative] = Field(
        "even", description="decoder layers of each stage: even, auto (by cost, the encoder counted), or a list in decoder order"
    )
    context_exchange: Literal["all_gather", "ring", "p2p", "a2a"] = Field(
        "all_gather",
        description="how context-parallel ranks see each other's keys and values: all_gather or ring on any backend, or "
        "Transformer Engine's p2p (a ring) or a2a (each rank gets whole samples for its share of the heads)",
    )
    encoder: Literal["data_parallel", "tensor_parallel"] = Field(
        "data_parallel",
        description="tower and projector: whole on each rank of the first stage, pictures dealt out; or split over tensor",
    )
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward pass still runs")
    overlap_param_gather: bool = Field(False, description="gather updated parameters during the next forward pass")
    tp_comm_overlap: bool = Field(
        False,
        description="split the decoder's products so that tensor-parallel communication runs beside them (user buffers of "
        "Transformer Engine: twelve of a micro-batch's hidden states, with FP8 as many more; tensor-parallel ranks on one node)",
    )
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that takes longer ends the run")

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        problems = []
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            problems.append("overlap_param_gather needs overlap_grad_reduce=true")
        if self.tp_comm_overlap and not self.sequence_parallel:
            problems.append("tp_comm_overlap overlaps what sequence parallelism sends; it needs tensor > 1 and sequence=true")
        if self.tp_comm_overlap and self.te_exchange:
            problems.append(
                f"tp_comm_overlap has buffers of one size, context_exchange={self.context_exchange} pads streams to others; use "
                f"context_exchange=ring or all_gather"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            problems.append(f"virtual_pipeline {self.virtual_pipeline} needs pipeline > 1")
        if isinstance(self.pipeline_split, list) and len(self.pipeline_split) != self.chunks:
            problems.append(
                f"pipeline_split {self.pipeline_split} has {len(self.pipeline_split)} entries; pipeline x virtual_pipeline needs "
                f"{self.chunks}"
            )
        fail_on(problems)
        return self

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between tensor-parallel regions are split along the stream."""
        return self.sequence and self.tensor > 1

    @property
    def te_exchange(self) -> str | None:
        """Transformer Engine's scheme where ``context_exchange`` is one of its own and there is something to exchange."""
        return self.context_exchange if self.context > 1 and self.context_exchange in ("p2p", "a2a") else None

    @property
    def chunks(self) -> int:
        """Parts the decoder is cut into."""
        return self.pipeline * self.virtual_pipeline

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one stream together."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_ranks(self) -> int:
        """Ranks of the smallest run: expert parallelism may need several replicas of what is not an expert."""
        return self.tensor * self.pipeline * lcm(self.context, self.expert)


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
    gradient_accumulation_fusion: bool | None = Field(
        default=None,
        description="matrix products add weight gradients straight to the float32 gradients (null: where the machine can)",
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
        fail_on(problems)
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
        image = self.model.embeddings_at(0)
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
        last = image + self.model.geometry_at(0).skipped
        if last >= self.model.language.max_position_embeddings > image:
            problems.append(
                f"model.language.max_position_embeddings {self.model.language.max_position_embeddings} has no room for the "
                f"positions of one picture's {last} patches; set positions=counted where they are merged or pooled"
            )
        fail_on(problems + self._fp8_problems() + layout_problems(self))
        return self

    def _fp8_problems(self) -> list[str]:
        """Merging that gives FP8 products another number of rows than they can take."""
        modules = self.precision.fp8_modules if self.precision.fp8 else []
        merging = self.model.projector.token_merging
        problems = []
        if self.model.vision.token_merging and "vision_tower" in modules:
            problems.append("model.vision.token_merging: leave vision_tower out of precision.fp8_modules; its rows become uneven")
        if merging and merging.schedule_steps and merging.where == "before" and "projector" in modules:
            problems.append(
                "model.projector.token_merging.schedule_steps: leave projector out of precision.fp8_modules; its rows change"
            )
        return problems
