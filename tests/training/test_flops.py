"""FLOPs and parameters against what torch and transformers count on the same tiny model."""

import dataclasses
import sys
from pathlib import Path

import pytest

from llava_mcore.settings.compose import compose
from llava_mcore.training.observe.flops import MODULES, FlopsCounter, parameter_counts, peak_flops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def hf_llava(model):
    """The same model in transformers, less the tower's layers and norm that LLaVA never computes."""
    vision, language = model.vision, model.language
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_hidden_layers=vision.used_layers,
            num_attention_heads=vision.num_attention_heads,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.query_groups,
            head_dim=language.head_dim,
            vocab_size=language.vocab_size,
            max_position_embeddings=language.max_position_embeddings,
            tie_word_embeddings=language.tie_word_embeddings,
        ),
        image_token_index=model.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.tie_word_embeddings,
        attn_implementation="eager",
    )
    return transformers.LlavaForConditionalGeneration(config)


def hf_modules(hf):
    tower = [(name, p) for name, p in hf.model.vision_tower.named_parameters() if "post_layernorm" not in name]
    return {
        "vision_tower": [p for _, p in tower],
        "projector": list(hf.model.multi_modal_projector.parameters()),
        "language_model": [*hf.model.language_model.parameters(), hf.lm_head.weight],
    }


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_transformers(tied):
    model = compose(["experiment=quickstart", f"model.language.tie_word_embeddings={str(tied).lower()}"]).model
    counted = {
        name: sum({id(p): p.numel() for p in parameters}.values()) for name, parameters in hf_modules(hf_llava(model)).items()
    }
    assert parameter_counts(model) == counted


def test_parameters_of_the_published_7b():
    counts = parameter_counts(compose(["experiment=pretrain_llava_7b"]).model)
    assert counts["projector"] * 2 == 41_959_424  # bytes of the published mm_projector.bin payload
    # Llama-2-7B has 6 738 415 616 parameters with 32000 pieces; llava-hf adds 64 rows to the embedding and the head.
    assert counts["language_model"] == 6_738_415_616 + 2 * 64 * 4096


def test_padding_the_vocabulary_adds_rows_to_both_matrices():
    model = compose(["experiment=quickstart", "model.language.vocab_size=500"]).model
    assert parameter_counts(model, padded=True)["language_model"] - parameter_counts(model)["language_model"] == 2 * 12 * 128


@pytest.mark.parametrize(
    "freeze",
    [[], ["vision_tower"], ["vision_tower", "language_model"], ["language_model"], ["projector"], ["vision_tower", "projector"]],
)
def test_flops_are_those_torch_counts(freeze):
    """One sample, eager attention: torch counts the full square of scores, we the causal half, and nothing else differs."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = compose(["experiment=quickstart", f"train.freeze=[{','.join(freeze)}]"])
    model, language, length = settings.model, settings.model.language, 40
    hf = hf_llava(model)
    for name, parameters in hf_modules(hf).items():
        for parameter in parameters:
            parameter.requires_grad_(name not in freeze)
    hf.model.vision_tower.post_layernorm.requires_grad_(False)  # computed by transformers, read by nobody
    ids = torch.full((1, length), 7)
    ids[0, 1 : 1 + model.embeddings_per_image] = model.image_token_id
    pixels = torch.randn(1, 3, model.vision.image_size, model.vision.image_size)
    with FlopCounterMode(display=False) as counter:
        hf(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    torch_says = {
        "vision_tower": counts["LlavaForConditionalGeneration.model.vision_tower"],
        "projector": counts["LlavaForConditionalGeneration.model.multi_modal_projector"],
    }
    torch_says["language_model"] = counter.get_total_flops() - sum(torch_says.values())

    ours = FlopsCounter(settings).breakdown([length], 1)
    masked_pairs = length**2 - length * (length + 1) // 2
    # Something below the decoder's attention is trained in every case here, so forward and backward cross it: 3 times.
    ours["language_model"] += 3 * 4 * language.num_layers * language.num_attention_heads * language.head_dim * masked_pairs
    assert ours == torch_says


@pytest.mark.parametrize("name", ["phi3", "qwen2", "qwen3", "siglip qwen2", "mixtral", "qwen3 moe"])
def test_parameters_of_every_family(name):
    """Counted by transformers on a model of its own, and with the tower's unbuilt layer and norm taken off."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
    import family_models

    from llava_mcore.conversion.hf_config import to_settings

    hf = family_models.build(name)
    modules = hf_modules(hf)
    beyond = {id(p) for module in (hf.model.vision_tower.encoder.layers[-1],) for p in module.parameters()}
    modules["vision_tower"] = [
        parameter
        for key, parameter in hf.model.vision_tower.named_parameters()
        if id(parameter) not in beyond and not key.startswith(("post_layernorm", "head."))
    ]
    counted = {key: sum({id(p): p.numel() for p in parameters}.values()) for key, parameters in modules.items()}
    assert parameter_counts(to_settings(hf.config.to_dict())) == counted


def test_a_window_costs_what_it_shows():
    whole, window = (
        FlopsCounter(
            compose(["experiment=quickstart", "model.language.family=mistral", f"model.language.sliding_window={tokens}"])
        )
        for tokens in ("null", 7)
    )
    # Each token of 30 sees itself and six before it, the first six fewer.
    pairs = sum(min(place, 7) for place in range(1, 31))
    language = compose(["experiment=quickstart"]).model.language
    all_pairs = 30 * 31 // 2
    difference = whole.forward([30], 0)["language_model"] - window.forward([30], 0)["language_model"]
    width = language.num_attention_heads * language.head_dim
    assert difference == 4 * width * language.num_layers * (all_pairs - pairs) > 0


def test_a_token_pays_for_its_experts_only():
    def forward(*overrides):
        counter = FlopsCounter(compose(["experiment=quickstart", "model.language.family=mixtral", *overrides]))
        return counter.forward([30], 0)["language_model"]

    two, four = (forward("model.language.num_experts=8", f"model.language.experts_per_token={k}") for k in (2, 4))
    language = compose(["experiment=quickstart"]).model.language
    assert four - two == 2 * 30 * language.num_layers * 2 * 3 * language.hidden_size * language.ffn_hidden_size
    more = forward("model.language.num_experts=16", "model.language.experts_per_token=2")
    assert more - two == 2 * 30 * language.num_layers * 8 * language.hidden_size  # the router alone


def test_packed_samples_attend_only_within_themselves():
    counter = FlopsCounter(compose(["experiment=quickstart"]))
    assert counter.step([30, 50], 2) == counter.step([30], 1) + counter.step([50], 1)
    assert counter.step([80], 2) > counter.step([30, 50], 2)
    assert counter.step([], 0) == 0


def test_frozen_parts_cost_what_they_need():
    def ratio(freeze):
        settings = compose(["experiment=pretrain_llava_7b", f"train.freeze=[{freeze}]"])
        counter = FlopsCounter(settings)
        step, forward = counter.breakdown([700], 1), counter.forward([700], 1)
        return {name: step[name] / forward[name] for name in MODULES}

    assert ratio("")["language_model"] == 3
    assert ratio("vision_tower")["vision_tower"] == 1
    phase1 = ratio("vision_tower,language_model")
    assert phase1["vision_tower"] == 1 and 2 < phase1["projector"] < 3 and 2 < phase1["language_model"] < 2.1
    assert set(ratio("vision_tower,projector,language_model").values()) == {1}


def test_7b_forward_is_about_two_flops_a_parameter_and_token():
    settings = compose(["experiment=pretrain_llava_7b"])
    counts = parameter_counts(settings.model)
    language = counts["language_model"] - settings.model.language.vocab_size * settings.model.language.hidden_size
    assert FlopsCounter(settings).forward([700], 1)["language_model"] == pytest.approx(2 * 700 * language, rel=0.02)


def test_expressions_over_parameters_do_not_count_as_frozen():
    whole = compose(["experiment=quickstart"])
    partly = dataclasses.replace(whole, train=dataclasses.replace(whole.train, freeze=[r"language_model\.embedding.*"]))
    assert FlopsCounter(partly).step([40], 1) == FlopsCounter(whole).step([40], 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("cpu", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peak(name, peak):
    assert peak_flops(name, "bfloat16") == peak


def test_peak_of_a_type_nobody_measures_is_unknown():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float8") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float8") == 2 * peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") + 1e12


def test_the_head_counts_labelled_tokens():
    counter, language = FlopsCounter(compose(["experiment=quickstart"])), compose(["experiment=quickstart"]).model.language
    each = 3 * 2 * language.hidden_size * language.vocab_size
    assert counter.step([40], 1) - counter.step([40], 1, labelled=7) == 33 * each
