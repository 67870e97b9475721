"""Which decoder layers stand on which pipeline stage, by cost: ``parallel.pipeline_split=auto``. No torch.

The first stage also encodes the pictures and the last one computes the head, so equal numbers of layers make unequal stages, and
a pipeline is as slow as its slowest. Frozen parts count without what they do not do in the backward pass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llava_mcore.settings.schema import Settings
from llava_mcore.training.observe.flops import FlopsCounter

# The stream that costs are counted on: samples of one picture and so many tokens of text, as in LLaVA's mixtures.
TEXT_TOKENS = 128
PICTURE = (1024, 768)  # pixels, where the size counts


@dataclass(frozen=True)
class Stage:
    """One pipeline stage.

    Attributes:
        layers: decoder layers of each of its parts (one, or ``virtual_pipeline``).
        encoder, decoder, head: FLOPs of one stream, forward and backward.
    """

    layers: tuple[int, ...]
    encoder: float
    decoder: float
    head: float

    @property
    def cost(self) -> float:
        """FLOPs of the stage for one stream."""
        return self.encoder + self.decoder + self.head


def resolve(settings: Settings) -> Settings:
    """The settings with ``pipeline_split`` as a list where it is ``auto``; others as they are."""
    if settings.parallel.pipeline_split != "auto":
        return settings
    parallel = dataclasses.replace(settings.parallel, pipeline_split=best_split(settings))
    return dataclasses.replace(settings, parallel=parallel)


def best_split(settings: Settings) -> list[int]:
    """Layers of each part in decoder order, such that the costliest stage is as cheap as can be.

    All decoder layers cost the same, so giving them out one by one, each to the stage that is cheapest with it, is optimal. A
    stage's layers are spread evenly over its parts.
    """
    parallel = settings.parallel
    encoder, layer, head = _costs(settings)
    totals = [0] * parallel.pipeline
    fixed = [0.0] * parallel.pipeline
    fixed[0] += encoder
    fixed[-1] += head
    for _ in range(settings.model.language.num_layers):
        totals[min(range(parallel.pipeline), key=lambda stage: (fixed[stage] + (totals[stage] + 1) * layer, -stage))] += 1
    parts = parallel.virtual_pipeline
    # The parts that get one layer more are the later ones on the first stage, whose first part has the encoder before it.
    shares = [
        sorted([total // parts + (part < total % parts) for part in range(parts)], reverse=stage > 0)
        for stage, total in enumerate(totals)
    ]
    return [shares[stage][part] for part in range(parts) for stage in range(parallel.pipeline)]


def stages(settings: Settings) -> list[Stage]:
    """What each stage holds and costs, under the split that is set."""
    parallel = resolve(settings).parallel
    split = parallel.pipeline_split
    if not isinstance(split, list):
        split = [settings.model.language.num_layers // parallel.chunks] * parallel.chunks
    encoder, layer, head = _costs(settings)
    return [
        Stage(
            layers=tuple(split[stage :: parallel.pipeline]),
            encoder=encoder if stage == 0 else 0.0,
            decoder=layer * sum(split[stage :: parallel.pipeline]),
            head=head if stage == parallel.pipeline - 1 else 0.0,
        )
        for stage in range(parallel.pipeline)
    ]


def table(settings: Settings) -> str:
    """The stages side by side: layers, and the share of each part in the cost of the mean stage."""
    found = stages(settings)
    mean = sum(stage.cost for stage in found) / len(found)
    lines = ["stage  layers          encoder  decoder   head    all  (1.00 is the mean stage)"]
    for number, stage in enumerate(found):
        layers = "+".join(map(str, stage.layers))
        shares = f"{stage.encoder / mean:7.2f}  {stage.decoder / mean:7.2f}  {stage.head / mean:5.2f}  {stage.cost / mean:5.2f}"
        lines.append(f"{number:5d}  {layers:<14s}  {shares}")
    return "\n".join(lines)


def _costs(settings: Settings) -> tuple[float, float, float]:
    """FLOPs of one stream: encoder (tower and projector), one decoder layer, head."""
    geometry = settings.model.geometry
    picture = geometry.picture(*PICTURE, False)
    sample = min(geometry.embeddings(picture) + TEXT_TOKENS, settings.data.sequence_length)
    samples = max(1, settings.data.sequence_length // sample)

    def breakdown(layers: int) -> dict[str, int]:
        language = dataclasses.replace(settings.model.language, num_layers=layers)
        model = dataclasses.replace(settings.model, language=language)
        # Settings check themselves as a whole, and one layer fits no pipeline; this model is only counted.
        one_rank = dataclasses.replace(
            settings.parallel, tensor=1, pipeline=1, context=1, virtual_pipeline=1, pipeline_split="even", tp_comm_overlap=False
        )
        counter = FlopsCounter(dataclasses.replace(settings, model=model, parallel=one_rank))
        return counter.breakdown([sample] * samples, samples * geometry.tiles(picture))

    one, two = breakdown(1), breakdown(2)
    layer = two["language_model"] - one["language_model"]
    return one["vision_tower"] + one["projector"], layer, one["language_model"] - layer
