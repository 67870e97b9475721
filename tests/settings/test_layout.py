"""Which layouts are refused, with which fix; and what is derived from the number of samples and processes."""

import pytest

from llava_mcore.settings.compose import SettingsError, compose
from llava_mcore.settings.derive import derive
from llava_mcore.settings.layouts import layout_problems, nearest_layouts

TINY = ["experiment=quickstart"]


def refused(*overrides):
    with pytest.raises(SettingsError) as caught:
        compose([*TINY, *overrides])
    return str(caught.value)


def test_tensor_size_must_divide_heads_groups_and_widths():
    text = refused("parallel.tensor=4")
    assert "model.language.num_query_groups (2) is not divisible by parallel.tensor=4; use one of 1, 2" in text
    assert "num_attention_heads" not in text  # 4 heads divide
    language = ("model.language.num_attention_heads (4)", "the padded vocabulary (512)")
    encoder = ("model.language.hidden_size (128)", "model.vision.num_attention_heads (4)")
    for mode, names in (("data_parallel", language), ("tensor_parallel", language + encoder)):
        text = refused("parallel.tensor=3", f"parallel.encoder={mode}")
        for name in names:
            assert f"{name} is not divisible by parallel.tensor=3" in text
        assert (encoder[0] in text) == (mode == "tensor_parallel")  # a whole encoder on every rank need not divide


def test_layouts_that_would_work_are_named():
    settings = compose(TINY)
    assert nearest_layouts(settings, 1) == ["parallel.tensor=1 parallel.pipeline=1 parallel.context=1"]
    for layout in nearest_layouts(settings, 8):
        assert not layout_problems(compose([*TINY, *layout.split()]), 8)
    text = refused("parallel.tensor=4", "parallel.pipeline=2")
    assert "layouts near it that work on 8 processes: parallel.tensor=2 parallel.pipeline=2 parallel.context=1" in text


def test_transformer_engines_exchange_must_fit_the_decoder():
    a2a = ["parallel.context_exchange=a2a", "parallel.tensor=2", "parallel.context=2"]
    text = refused(*a2a)
    wanted = "is not divisible by parallel.tensor=2 x parallel.context=2, as parallel.context_exchange=a2a needs; use ring"
    assert f"model.language.num_query_groups (2) {wanted}" in text and "num_attention_heads" not in text
    assert "layouts near it that work on 4 processes: parallel.tensor=1 parallel.pipeline=1 parallel.context=2" in text
    assert "parallel.context=4" not in text
    assert compose([*TINY, "parallel.context_exchange=a2a", "parallel.context=2"]).parallel.te_exchange == "a2a"
    window = ["model.language.family=mistral", "model.language.sliding_window=64", "parallel.context=2"]
    assert "p2p knows no sliding window (model.language.sliding_window=64); use ring" in refused(
        *window, "parallel.context_exchange=p2p"
    )
    assert compose([*TINY, *window, "parallel.context_exchange=a2a"]).parallel.te_exchange == "a2a"


def test_pipeline_split_by_hand_must_fit():
    assert "has 3 entries; pipeline x virtual_pipeline needs 2" in refused(
        "parallel.pipeline=2", "parallel.pipeline_split=[1,1,2]"
    )
    assert "holds 5 layers, model.language.num_layers is 4" in refused("parallel.pipeline=2", "parallel.pipeline_split=[1,4]")
    assert compose([*TINY, "parallel.pipeline=2", "parallel.pipeline_split=[0,4]"]).parallel.pipeline_split == [0, 4]
    assert "virtual_pipeline 2 needs pipeline > 1" in refused("parallel.virtual_pipeline=2")
    assert "parallel.pipeline=2 x parallel.virtual_pipeline=3" in refused("parallel.pipeline=2", "parallel.virtual_pipeline=3")


def test_pipeline_size_must_divide_layers():
    assert "model.language.num_layers (4) is not divisible by parallel.pipeline=3; use one of 1, 2, 4" in refused(
        "parallel.pipeline=3"
    )
    assert compose([*TINY, "parallel.pipeline=4"]).parallel.pipeline == 4


def test_sequence_parallelism_needs_divisible_streams():
    odd = ["data.sequence_length=255", "train.micro_batch_size=1"]
    assert "(255) is not divisible by 2" in refused("parallel=tp2", *odd)
    assert "(255) is not divisible by 2" in refused("parallel.context=2", *odd)
    assert compose([*TINY, "parallel=tp2", *odd, "parallel.sequence=false"]).parallel.tensor == 2
    assert compose([*TINY, "parallel=tp2", *odd, "train.micro_batch_size=2"]).parallel.sequence_parallel


def test_world_size_must_hold_whole_models():
    settings = compose([*TINY, "parallel=tp2_pp2"])
    assert layout_problems(settings) == layout_problems(settings, 8) == []
    problem, near = layout_problems(settings, 6)
    assert near.startswith("layouts near it that work on 6 processes: ")
    assert "6 processes" in problem and "start a multiple of 4 processes" in problem


def test_streams_must_hold_a_picture_and_fit_the_decoder():
    assert "has no room for one picture of 16 embeddings" in refused("data.sequence_length=16")
    assert "exceeds model.language.max_position_embeddings 512" in refused("data.sequence_length=1024")


def test_overlap_needs_what_it_builds_on():
    assert "overlap_param_gather needs overlap_grad_reduce=true" in refused("parallel.overlap_param_gather=true")
    for layout in (["parallel.tensor=1"], ["parallel=tp2", "parallel.sequence=false"]):
        assert "it needs tensor > 1 and sequence=true" in refused("parallel.tp_comm_overlap=true", *layout)
    padded = ["parallel=tp2", "parallel.context=2", "parallel.context_exchange=p2p"]
    assert "context_exchange=p2p pads streams to others" in refused("parallel.tp_comm_overlap=true", *padded)


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
    assert len(caught.value.problems) == 3 and "nothing to train on" in caught.value.problems[2]
