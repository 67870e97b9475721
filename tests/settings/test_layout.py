"""Which layouts are refused, with which fix; and what is derived from the number of samples and processes."""

import pytest

from llava_mcore.settings.compose import SettingsError, compose
from llava_mcore.settings.derive import derive
from llava_mcore.settings.schema import layout_problems

TINY = ["experiment=quickstart"]


def refused(*overrides):
    with pytest.raises(SettingsError) as caught:
        compose([*TINY, *overrides])
    return str(caught.value)


def test_tensor_size_must_divide_heads_groups_and_widths():
    text = refused("parallel.tensor=4")
    assert "model.language.num_query_groups (2) is not divisible by parallel.tensor=4; use a divisor of 2" in text
    assert "num_attention_heads" not in text  # 4 heads divide
    text = refused("parallel.tensor=3")
    for name in (
        "model.language.num_attention_heads (4)",
        "model.language.hidden_size (128)",
        "model.vision.num_attention_heads (4)",
        "the vocabulary padded to 64 (512)",
        "data.sequence_length x train.micro_batch_size (256)",
    ):
        assert f"{name} is not divisible by parallel.tensor=3" in text


def test_pipeline_size_must_divide_layers():
    assert "model.language.num_layers (4) is not divisible by parallel.pipeline=3; use a divisor of 4" in refused(
        "parallel.pipeline=3"
    )
    assert compose([*TINY, "parallel.pipeline=4"]).parallel.pipeline == 4


def test_sequence_parallelism_needs_divisible_streams():
    assert "(255) is not divisible by parallel.tensor=2" in refused("parallel=tp2", "data.sequence_length=255")
    assert compose([*TINY, "parallel=tp2", "data.sequence_length=255", "parallel.sequence=false"]).parallel.tensor == 2
    assert compose([*TINY, "parallel=tp2", "data.sequence_length=255", "train.micro_batch_size=2"]).parallel.sequence_parallel


def test_world_size_must_hold_whole_models():
    settings = compose([*TINY, "parallel=tp2_pp2"])
    assert layout_problems(settings) == layout_problems(settings, 8) == []
    (problem,) = layout_problems(settings, 6)
    assert "6 processes" in problem and "start a multiple of 4 processes" in problem


def test_streams_must_hold_a_picture_and_fit_the_decoder():
    assert "has no room for one picture of 16 embeddings" in refused("data.sequence_length=16")
    assert "exceeds model.language.max_position_embeddings 512" in refused("data.sequence_length=1024")


def test_overlap_needs_what_it_builds_on():
    assert "overlap_param_gather needs overlap_grad_reduce=true" in refused("parallel.overlap_param_gather=true")


@pytest.mark.parametrize(
    ("experiment", "samples", "steps", "warmup"),
    [
        ("pretrain_llava_7b", 558_128, 2181, 66),
        ("finetune_llava_7b", 665_298, 5198, 156),
        ("pretrain_llava_13b", 558_128, 2181, 66),
        ("finetune_llava_13b", 665_298, 5198, 156),
    ],
)
def test_llava_steps(experiment, samples, steps, warmup):
    settings = compose([f"experiment={experiment}"])
    derived = derive(settings, samples, 8)
    assert (derived.steps, derived.warmup_steps, derived.total_samples) == (steps, warmup, samples)
    assert derived.data_parallel == 8 // settings.parallel.tensor


def test_steps_beat_epochs():
    derived = derive(compose([*TINY, "train.steps=7", "train.epochs=3"]), 1000, 1)
    assert (derived.steps, derived.total_samples) == (7, 7 * 64)


def test_shares_are_decimal():
    """0.07 * 100 and 0.1 * 30 lie just above 7 and 3 in binary."""
    settings = compose([*TINY, "train.steps=100", "train.warmup_ratio=0.07"])
    assert derive(settings, 1, 1).warmup_steps == 7
    settings = compose([*TINY, "train.steps=null", "train.epochs=0.1", "train.global_batch_size=1", "train.warmup_ratio=0"])
    assert derive(settings, 30, 1).steps == 3 and derive(settings, 30, 1).warmup_steps == 0
    assert derive(settings, 31, 1).steps == 4


def test_what_cannot_be_derived_is_an_error():
    settings = compose([*TINY, "parallel=tp2"])
    with pytest.raises(SettingsError, match="3 processes") as caught:
        derive(settings, 0, 3)
    assert len(caught.value.problems) == 2 and "nothing to train on" in caught.value.problems[1]
