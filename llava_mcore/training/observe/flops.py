"""Model FLOPs and parameter counts from the settings alone. No torch: the dry run asks here too.

A multiply-add is 2 FLOPs. Only matrix multiplications are counted (norms, activations, rotary and the optimizer are not), only
real tokens (padding of streams and of the vocabulary is not), and recomputation is not: this is the arithmetic the model needs,
as MFU is defined in PaLM (Chowdhery et al. 2022, appendix B). With T tokens, h hidden, d head width, q query heads, g key/value
heads, f MLP width, V vocabulary:

    decoder layer, linear       2 T (h d (2 q + 2 g) + 3 h f)      with experts: k of them a token, and h times their number
    decoder layer, attention    4 q d * sum over samples of L (L + 1) / 2   (a token sees itself and its sample before it, or as
                                                                             much of it as a sliding window shows)
    head                        2 N h V                N tokens with a label: nothing is computed for the others
    tower, patches              2 P (3 p^2) h          P patches of p x p pixels
    tower layer, linear         2 K (4 h^2 + 2 h f)    K = P, and one for the class token where there is one
    tower layer, attention      4 h K^2                (every token attends to all)
    projector                   2 E (w h [+ h h])      E embeddings of w numbers each (h_tower, or more after a pixel shuffle)

Where a tower's layers merge tokens, K is what each product gets; merging itself is not counted. While a schedule of merging
before the projector runs, the projector is counted as at its end.

Backward, each product on its own: the gradient of the weights costs one forward where the module is trained; the gradient of the
input costs one forward where anything below is trained, so that a frozen decoder above a trained projector costs 2x its forward,
and a frozen tower at the bottom 1x. Attention multiplies activations only: its backward costs two forwards where a gradient has
to cross it, frozen or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava_mcore.data.packing import Cost
from llava_mcore.geometry import num_patches
from llava_mcore.settings.schema import ModelSettings, Settings

MODULES = ("vision_tower", "projector", "language_model")

# Dense peaks, without sparsity, as NVIDIA publishes them: (words of torch's device name, tried in this order) -> FLOP/s per type.
# float32 is the rate outside the tensor cores, as torch multiplies by default (TF32 off).
_PEAKS = (
    ("B200", {"float8": 4500e12, "bfloat16": 2250e12, "float32": 75e12}),
    ("GH200", {"float8": 1979e12, "bfloat16": 989e12, "float32": 67e12}),
    ("H200 NVL", {"float8": 1671e12, "bfloat16": 835e12, "float32": 60e12}),
    ("H200", {"float8": 1979e12, "bfloat16": 989e12, "float32": 67e12}),
    ("H100 NVL", {"float8": 1671e12, "bfloat16": 835e12, "float32": 60e12}),
    ("H100 PCIe", {"float8": 1513e12, "bfloat16": 756e12, "float32": 51e12}),
    ("H100", {"float8": 1979e12, "bfloat16": 989e12, "float32": 67e12}),
    ("H800", {"float8": 1979e12, "bfloat16": 989e12, "float32": 67e12}),
    ("A100", {"bfloat16": 312e12, "float32": 19.5e12}),
    ("A800", {"bfloat16": 312e12, "float32": 19.5e12}),
    ("L40S", {"float8": 733e12, "bfloat16": 362e12, "float32": 91.6e12}),
    ("A10", {"bfloat16": 125e12, "float32": 31.2e12}),
    ("L4", {"float8": 242e12, "bfloat16": 121e12, "float32": 30.3e12}),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of one device, or None where it isn't known (a CPU, a part not in the table).

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, for instance ``NVIDIA H100 80GB HBM3``.
        dtype: ``float8``, ``bfloat16`` or ``float32``.
    """
    words = device_name.upper().replace("-", " ").split()
    for part, peaks in _PEAKS:
        wanted = part.upper().split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return peaks.get(dtype)
    return None


def trained_modules(settings: Settings) -> frozenset[str]:
    """The modules that learn. Only whole modules in ``train.freeze`` count as frozen, not expressions over parameter names."""
    return frozenset(MODULES) - set(settings.train.freeze)


@dataclass(frozen=True)
class _Product:
    """Matrix multiplications that share a fate in the backward pass."""

    module: str
    forward: int
    has_weights: bool
    below: tuple[str, ...]
    """Modules with weights under its input: if one of them is trained, a gradient has to cross."""


class FlopsCounter:
    """Model FLOPs of a step, forward and backward, over all ranks.

    >>> FlopsCounter(settings).step(sample_lengths=[650, 700], pictures=2)
    """

    def __init__(self, settings: Settings) -> None:
        self._model = settings.model
        self._trained = trained_modules(settings)

    def step(self, sample_lengths: Sequence[int], pictures: int, labelled: int | None = None) -> int:
        """FLOPs of one step.

        Args:
            sample_lengths: tokens of every sample, image embeddings included, padding not.
            pictures: pictures of all samples.
            labelled: tokens with a label (None: all of them).
        """
        return sum(self.breakdown(sample_lengths, pictures, labelled).values())

    def breakdown(self, sample_lengths: Sequence[int], pictures: int, labelled: int | None = None) -> dict[str, int]:
        """FLOPs of one step by module: ``vision_tower``, ``projector``, ``language_model`` (its head included)."""
        return self._count(sample_lengths, pictures, labelled, backward=True)

    def forward(self, sample_lengths: Sequence[int], pictures: int, labelled: int | None = None) -> dict[str, int]:
        """FLOPs of the forward pass alone, by module."""
        return self._count(sample_lengths, pictures, labelled, backward=False)

    def cost(self) -> Cost:
        """What a sample costs in decoder tokens, for dealing streams to ranks: the same FLOPs, forward and backward."""
        alone, two = self.step([1], 0), self.step([2], 0)
        pair = two - 2 * alone  # a sample of L tokens has L (L + 1) / 2 pairs
        token = alone - pair / 2
        return Cost(attention_length=2 * token / pair, picture=self.step([], 1) / token)

    def _count(self, sample_lengths: Sequence[int], pictures: int, labelled: int | None, backward: bool) -> dict[str, int]:
        totals = dict.fromkeys(MODULES, 0)
        for product in [*self._vision(pictures), *self._language(sample_lengths, labelled)]:
            times = 1
            if backward:
                crossed = any(module in self._trained for module in product.below)
                trained = product.module in self._trained
                times += trained + crossed if product.has_weights else 2 * crossed
            totals[product.module] += times * product.forward
        return totals

    def _vision(self, pictures: int) -> list[_Product]:
        vision, decoder_width = self._model.vision, self._model.language.hidden_size
        width, patches = vision.hidden_size, num_patches(vision.image_size, vision.patch_size)
        embeddings, inputs = pictures * self._model.projected_per_image, self._model.feature_size
        linear, attention, tokens = 0, 0, vision.positions
        for merged in vision.merged_tokens:
            linear += 2 * tokens * 4 * width**2 + 2 * (tokens - merged) * 2 * width * vision.ffn_hidden_size
            attention += 4 * width * tokens**2
            tokens -= merged
        tower = ("vision_tower",)
        products = [
            _Product("vision_tower", pictures * 2 * patches * 3 * vision.patch_size**2 * width, True, ()),
            _Product("vision_tower", pictures * linear, True, tower),
            _Product("vision_tower", pictures * attention, False, tower),
            _Product("projector", 2 * embeddings * inputs * decoder_width, True, tower),
        ]
        if self._model.projector.type == "mlp2x_gelu":
            products.append(_Product("projector", 2 * embeddings * decoder_width**2, True, (*tower, "projector")))
        return products

    def _language(self, sample_lengths: Sequence[int], labelled: int | None) -> list[_Product]:
        language = self._model.language
        width, queries, groups = language.hidden_size, language.num_attention_heads, language.query_groups
        tokens = sum(sample_lengths)
        asked = tokens if labelled is None else labelled
        pairs = sum(_pairs(length, language.sliding_window) for length in sample_lengths)
        linear = width * language.head_dim * (2 * queries + 2 * groups)
        if language.num_experts is None:
            linear += 3 * width * language.ffn_hidden_size
        else:
            linear += language.experts_per_token * 3 * width * language.ffn_hidden_size + width * language.num_experts
        return [
            _Product("language_model", 2 * tokens * language.num_layers * linear, True, MODULES),
            _Product("language_model", 4 * queries * language.head_dim * language.num_layers * pairs, False, MODULES),
            _Product("language_model", 2 * asked * width * language.vocab_size, True, MODULES),
        ]


def _pairs(length: int, window: int | None) -> int:
    """Tokens that the tokens of a sample see, all together."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def parameter_counts(model: ModelSettings, padded: bool = False) -> dict[str, int]:
    """Parameters by module, as the published checkpoints have them less what is never computed.

    The layers above ``select_layer`` and the last layer norm of the tower are not built, so they are not counted.

    Args:
        model: the model's settings.
        padded: count the embedding and the head with the rows that pad the vocabulary, as they lie in memory.
    """
    vision, language = model.vision, model.language
    tower = vision_embedding_parameters(model) + vision.used_layers * sum(vision_layer_parameters(model))
    projector = language.hidden_size * (model.feature_size + 1)
    if model.projector.type == "mlp2x_gelu":
        projector += language.hidden_size * (language.hidden_size + 1)
    rows = language.padded_vocab_size if padded else language.vocab_size
    matrices = 1 if language.tie_word_embeddings else 2
    layers = language.num_layers * sum(language_layer_parameters(model))
    decoder = layers + language.hidden_size + matrices * rows * language.hidden_size
    return {"vision_tower": tower, "projector": projector, "language_model": decoder}


def vision_embedding_parameters(model: ModelSettings) -> int:
    """Patches, class token, positions and the layer norm before the first layer, as far as the tower has them."""
    vision = model.vision
    rows = 3 * vision.patch_size**2 + vision.patch_bias + vision.class_token + vision.positions + 2 * vision.pre_norm
    return vision.hidden_size * rows


def vision_layer_parameters(model: ModelSettings) -> tuple[int, int]:
    """One tower layer's parameters: (those tensor parallelism splits, those every rank keeps)."""
    width, ffn = model.vision.hidden_size, model.vision.ffn_hidden_size
    split = 4 * width**2 + 3 * width + 2 * width * ffn + ffn
    whole = width + width + 4 * width  # biases of the two row-parallel layers, two layer norms
    return split, whole


class LayerParameters(NamedTuple):
    """One decoder layer's parameters, by where they lie."""

    split: int
    """Split over tensor-parallel ranks."""
    whole: int
    """On every rank."""
    experts: int
    """Split over tensor-parallel and over expert-parallel ranks."""


def language_layer_parameters(model: ModelSettings) -> LayerParameters:
    """One decoder layer's parameters."""
    language = model.language
    width, queries, groups = language.hidden_size, language.num_attention_heads, language.query_groups
    split = width * language.head_dim * (2 * queries + 2 * groups)
    split += language.head_dim * (queries + 2 * groups) if language.qkv_bias else 0
    whole = 2 * width + (2 * language.head_dim if language.qk_norm else 0)
    mlp = 3 * width * language.ffn_hidden_size
    if language.num_experts is None:
        return LayerParameters(split + mlp, whole, 0)
    return LayerParameters(split, whole + language.num_experts * width, language.num_experts * mlp)
