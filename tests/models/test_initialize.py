"""Random weights: the same at every layout, and a padded vocabulary that is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks

sys.path.insert(0, str(Path(__file__).parent))

import ours  # noqa: E402

from llava_mcore.data.loader import Batch  # noqa: E402
from llava_mcore.models.initialize import initialize  # noqa: E402
from llava_mcore.settings.compose import from_dict  # noqa: E402
from llava_mcore.settings.schema import ModelSettings, Settings  # noqa: E402
from llava_mcore.training.checkpoint import sharding_metadata  # noqa: E402
from llava_mcore.training.engine import forward_logits  # noqa: E402

VOCAB, PADDED, LENGTH = 101, 128, 24


def settings(parallel: dict[str, Any], projector: str = "mlp2x_gelu", tied: bool = False) -> Settings:
    return from_dict(
        {
            "model": {
                "vision": {
                    "image_size": 20,
                    "patch_size": 5,
                    "hidden_size": 24,
                    "ffn_hidden_size": 40,
                    "num_layers": 3,
                    "num_attention_heads": 2,
                },
                "projector": {"type": projector},
                "language": {
                    "hidden_size": 32,
                    "ffn_hidden_size": 56,
                    "num_layers": 4,
                    "num_attention_heads": 4,
                    "num_query_groups": 2,
                    "vocab_size": VOCAB,
                    "max_position_embeddings": 64,
                    "tie_word_embeddings": tied,
                },
                "image_token_id": 7,
            },
            "data": {"sequence_length": LENGTH},
            "train": {"lr": 1e-2, "dtype": "float32", "weight_decay": 0.1, "steps": 5, "seed": 4},
            "parallel": parallel,
        }
    )


def initial(model: ModelSettings, parallel: dict[str, Any], seed: int) -> list[tuple]:
    """On a rank: its shards of the first weights."""
    built, _, groups = ours.build(model, parallel)
    initialize(built, seed, sharding_metadata(groups))
    return ours.shards(built, groups, {parameter: parameter.data for parameter in built.parameters()})


def weights(size: int, parallel: dict[str, Any], seed: int = 4, **kind: Any) -> dict[str, torch.Tensor]:
    parts = ranks(size).run(initial, settings(parallel, **kind).model, parallel, seed)
    return ours.assemble([shard for part in parts for shard in part])


@pytest.mark.parametrize("kind", [{}, {"projector": "linear", "tied": True}])
def test_the_same_at_every_layout(kind: dict[str, Any]) -> None:
    alone = weights(1, {}, **kind)
    for size, parallel in ((2, {"tensor": 2}), (2, {"tensor": 2, "encoder": "tensor_parallel"}), (2, {"pipeline": 2}), (2, {})):
        spread = weights(size, parallel, **kind)
        assert spread.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(spread[name], tensor), (parallel, name)


def test_what_they_are() -> None:
    found = weights(1, {})
    for name, tensor in found.items():
        if "norm" in name:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name
        elif name.startswith("projector"):
            bound = (32 if "linear_fc2" in name else 24) ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            real = tensor[:VOCAB] if tensor.shape[0] == PADDED else tensor
            assert float(real.std()) == pytest.approx(0.02, rel=0.25) and abs(float(real.mean())) < 0.005, name
            assert not tensor[len(real) :].any(), name
    layers = [name for name in found if name.endswith("mlp.linear_fc2.weight")]
    assert len(layers) == 2 + 4 and len({float(found[name].sum()) for name in layers}) == 6  # each drawn for itself
    other = weights(1, {}, seed=5)
    assert all(torch.equal(other[name], tensor) == bool((tensor == tensor.flatten()[0]).all()) for name, tensor in found.items())


def batch() -> Batch:
    """One text-only stream."""
    ids = torch.randint(8, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return Batch(
        input_ids_T=ids,
        labels_T=ids.roll(-1),
        position_ids_T=torch.arange(LENGTH),
        sample_lengths=[LENGTH],
        image_index_E=torch.zeros(0, dtype=torch.int64),
        pixel_values_NCHW=torch.zeros(0, 3, 20, 20),
        loss_tokens=LENGTH,
        real_tokens=LENGTH,
    )


def logits(model: ModelSettings, parallel: dict[str, Any]) -> torch.Tensor:
    """On a rank: the logits of the first weights."""
    built, _, groups = ours.build(model, parallel)
    initialize(built, 4, sharding_metadata(groups))
    return forward_logits(built, [batch()], [range(LENGTH)], groups, ours.CPU)[0]


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, {"tensor": 2})])
def test_padded_rows_are_never_trained_and_never_predicted(size: int, parallel: dict[str, Any]) -> None:
    trained = settings(parallel)
    parts = ranks(size).run(ours.train, trained, [batch()], 5)
    whole = ours.assemble([shard for part in parts for shard in part["weights"]])
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        assert whole[name].shape[0] == PADDED and not whole[name][VOCAB:].any()
        assert whole[name][:VOCAB].any(dim=1).all()
    for found in ranks(size).run(logits, trained.model, parallel):
        assert found.shape == (LENGTH, VOCAB)
    # With weights of almost nothing the softmax is even over the words there are, and over no others.
    assert parts[0]["losses"][0] == pytest.approx(float(torch.tensor(VOCAB).log()), rel=0.01)
