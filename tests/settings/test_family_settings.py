"""What a family brings with it, what it cannot express, and what experts ask of a layout."""

from __future__ import annotations

import pytest

from llava_mcore.settings.compose import SettingsError, compose, from_stored, to_dict
from llava_mcore.settings.families import DECODERS, TOWERS
from llava_mcore.settings.layouts import layout_problems
from llava_mcore.training.observe.flops import parameter_counts

TINY = ["experiment=quickstart"]
LONGROPE = "model.language.rope_scaling={type:longrope,short_factor:[1,2],long_factor:[1],original_max_position_embeddings:12}"


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_brings_what_follows_from_it(family: str) -> None:
    experts = ["model.language.num_experts=4"] if "num_experts" in DECODERS[family].entries else []
    language = compose([*TINY, f"model.language.family={family}", *experts]).model.language
    assert (language.qkv_bias, language.qk_norm) == (family == "qwen2", family.startswith("qwen3"))


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_brings_what_follows_from_it(family: str) -> None:
    run = compose([*TINY, f"model.vision.family={family}"])
    vision = run.model.vision
    assert vision.class_token == vision.pre_norm == (not vision.patch_bias) == (family == "clip")
    assert vision.positions == 16 + (family == "clip") and vision.features_per_image == 16
    assert from_stored(to_dict(run), []) == run


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.language.family=qwen9"], "family 'qwen9' is unknown; known: llama, mistral, qwen2"),
        (["model.language.qkv_bias=true"], "qkv_bias=true: family llama has false"),
        (["model.language.family=qwen2", "model.language.qkv_bias=false"], "qkv_bias=false: family qwen2 has true"),
        (["model.language.sliding_window=4"], "sliding_window=4: family llama has null"),
        (["model.language.rope_scaling.type=llama3"], "original_max_position_embeddings is required for type=llama3"),
        (
            ["model.language.rope_scaling={type:linear,factor:2,beta_fast:3}"],
            "beta_fast has no meaning for type=linear",
        ),
        (
            ["model.language.family=phi3", "model.language.rope_scaling={type:linear,factor:2}"],
            "rope_scaling.type=linear: family phi3 knows longrope",
        ),
        (["model.language.family=phi3", LONGROPE], "rope_scaling.long_factor has 1 numbers, 16 frequencies need one each"),
        (["model.language.family=phi3", "model.language.rotary_percent=0.9"], "of which 28 turn"),
        (["model.vision.activation=gelu"], "activation=gelu: family clip has quick_gelu"),
        (["model.vision.family=siglip", "model.vision.select_feature=cls_patch"], "this tower has no class token"),
        (["model.vision.patch_size=29"], "image_size 28 is smaller than patch_size 29"),
        (["model.language.family=mixtral"], "family mixtral has experts; set how many"),
        (
            ["model.language.family=mixtral", "model.language.num_experts=2", "model.language.experts_per_token=3"],
            "experts_per_token 3 is more than num_experts 2",
        ),
        (["parallel.expert=2"], "this model has no experts; set parallel.expert=1"),
        (
            ["model.language.family=mixtral", "model.language.num_experts=3", "parallel.expert=2"],
            "model.language.num_experts (3) is not divisible by parallel.expert=2; use one of 1, 3",
        ),
        (
            ["model.language.family=mixtral", "model.language.num_experts=4", "parallel.tensor=2", "parallel.sequence=false"],
            "need parallel.sequence=true",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    if "rotary_percent=0.9" in overrides[-1]:
        overrides = [*overrides, "model.language.kv_channels=30", "model.language.num_query_groups=4"]
        says = "of which 27 turn"
    with pytest.raises(SettingsError) as caught:
        compose([*TINY, *overrides])
    assert says in str(caught.value)


def test_experts_need_ranks_to_stand_on() -> None:
    run = compose([*TINY, "model.language.family=mixtral", "model.language.num_experts=4", "parallel.expert=4"])
    assert layout_problems(run, 4) == [] and layout_problems(run, 8) == []
    (says, *near) = layout_problems(run, 2)
    assert "parallel.expert=4 does not divide the 2 data- and context-parallel ranks of 2 processes" in says and not near
    assert run.parallel.least_ranks == 4


def test_parameters_of_the_published_decoders() -> None:
    def count(model: str) -> int:
        return parameter_counts(compose(["experiment=pretrain_llava_7b", f"model={model}"]).model)["language_model"]

    assert count("llava_mistral_7b") == 7_241_732_096 + 2 * 64 * 4096  # llava-hf adds 64 rows to the embedding and the head
    assert count("llava_qwen2_7b") == 7_615_616_512
