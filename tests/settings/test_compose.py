"""Composition against hydra-core's own, the checks and their words, and the way back to YAML."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from llava_mcore.settings.compose import (
    CONFIG_DIR,
    SECTIONS,
    SettingsError,
    compose,
    compose_dict,
    dump_yaml,
    from_dict,
    group_options,
    setting_paths,
    to_dict,
)

OPTIONS = group_options()
TINY = ["experiment=quickstart"]


def problems_of(overrides, **kwargs):
    with pytest.raises(SettingsError) as caught:
        compose(overrides, **kwargs)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


@pytest.fixture
def tree(tmp_path):
    """A user's tree: write(name, text) puts one YAML file in it."""

    def write(name, text):
        path = tmp_path / "my configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path / "my configs"

    return write


# ------------------------------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("name", OPTIONS["experiment"])
def test_every_experiment_composes_and_round_trips(name):
    settings = compose([f"experiment={name}"])
    assert settings.train.output_dir == f"runs/{name}"
    assert from_dict(yaml.safe_load(dump_yaml(settings))) == settings


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in SECTIONS for name in OPTIONS[group]])
def test_every_group_file_composes(choice):
    group, name = choice.split("=")
    chosen = {"model": "tiny", "data": "digits", "train": "pretrain", group: name}
    # The tiny model refuses the long streams of LLaVA's data, and short ones cannot hold a picture of the large models.
    length = 800 if group == "model" and name.startswith("llava_") else 512
    if group == "parallel":  # eight ranks need the large model's heads
        chosen["model"], length = "llava_vicuna_7b", 600
    settings = compose([f"{key}={value}" for key, value in chosen.items()] + [f"data.sequence_length={length}"])
    written = yaml.load((CONFIG_DIR / group / f"{name}.yaml").read_text(), yaml.SafeLoader)
    composed = to_dict(settings)[group]
    for key, value in written.items():
        if key not in ("sequence_length", "defaults") and not isinstance(value, (dict, str)):
            assert composed[key] == value


def test_every_shipped_group_is_a_section_or_the_experiments():
    assert set(OPTIONS) == {*SECTIONS, "experiment"}


def test_llava_values():
    settings = compose(["experiment=finetune_llava_13b"])
    assert (settings.train.lr, settings.train.global_batch_size, settings.train.freeze) == (2e-5, 128, ["vision_tower"])
    assert settings.model.language.hidden_size == 5120 and settings.model.language.vocab_size == 32064
    assert settings.model.vision.used_layers == 23 and settings.model.embeddings_per_image == 576
    first = compose(["experiment=pretrain_llava_13b"])
    assert (first.train.lr, first.train.global_batch_size) == (1e-3, 256)
    assert first.train.freeze == ["vision_tower", "language_model"] and first.data.template == "plain"


# ---------------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=quickstart"],
        ["experiment=quickstart", "model=llava_vicuna_7b", "data.sequence_length=600"],
        ["model=tiny", "experiment=quickstart_finetune", "parallel=tp2"],
        ["experiment=quickstart", "train.lr=1e-4", "train.lr=3e-5", "train.steps=null"],
        ["experiment=quickstart", "data.image_mean=[1e-1,.5,5]", "train.output_dir='a b=c'"],
        ["experiment=quickstart", "train.freeze=[vision_tower,'language_model\\..*']"],
        ["experiment=quickstart", "+train.module_lr={projector:2e-5}", "~train.save_every", "++train.seed=7"],
        ["experiment=quickstart", "train.output_dir='${train.lr}/x'"],
    ],
)
def test_the_same_tree_as_hydras_own_compose(overrides):
    """Hydra wants ``+`` for a key no file wrote; with it added here, both must compose the same."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        opened = [
            "++" + override if "." in override.split("=")[0] and override[0] not in "+~" else override for override in overrides
        ]
        oracle = OmegaConf.to_container(hydra_compose("config", opened), resolve=True)
    assert compose_dict(overrides) == oracle


def test_command_line_beats_experiment_beats_group():
    assert compose(["experiment=quickstart_finetune"]).train.steps == 100
    assert compose(["experiment=quickstart"]).train.steps == 300
    assert compose(["train.lr=5e-4", "experiment=quickstart_finetune"]).train.lr == 5e-4
    assert compose(["parallel=tp2", "experiment=quickstart"]).parallel.tensor == 2


def test_keys_that_no_file_wrote_need_no_plus():
    settings = compose([*TINY, "train.module_lr.projector=2e-5", "train.wandb=offline", "parallel.timeout_minutes=1"])
    assert settings.train.module_lr == {"projector": 2e-5} and settings.train.wandb == "offline"


def test_floats_without_a_point_are_numbers_everywhere(tree):
    folder = tree("train/mine.yaml", "lr: 1e-4\nadam_eps: 1E-7\nmodule_lr: {projector: 2e-5}\n")
    settings = compose(["model=tiny", "data=digits", "train=mine", "data.image_std=[1e-1,2e-1,3e-1]"], folder)
    assert (settings.train.lr, settings.train.adam_eps, settings.train.module_lr) == (1e-4, 1e-7, {"projector": 2e-5})
    assert settings.data.image_std == (0.1, 0.2, 0.3)
    raw = compose_dict(["model=tiny", "train=mine", "train.lr=1e-5"], folder)
    assert isinstance(raw["train"]["lr"], float) and isinstance(raw["train"]["adam_eps"], float)


def test_null_works():
    assert compose([*TINY, "train.steps=null"]).train.steps is None
    assert compose([*TINY, "experiment=null", "model=tiny", "data=digits", "train=quickstart"]).train.output_dir == "runs/default"
    assert compose(["parallel=null", "model=tiny", "data=digits", "train=quickstart"]).parallel.tensor == 1


def test_hydras_plus_before_a_group_is_the_same_choice():
    assert compose(["+experiment=quickstart"]) == compose(TINY)


def test_everything_by_hand_without_an_experiment():
    by_hand = [f"{'.'.join(path)}=" for path in setting_paths()]
    values = to_dict(compose(TINY))
    overrides = []
    for key in by_hand:
        value = values
        for part in key[:-1].split("."):
            value = None if value is None else value[part]
        if value not in (None, {}, []) and not isinstance(value, list):
            overrides.append(f"{key}{str(value).lower() if isinstance(value, bool) else value}")
    assert compose(overrides) == compose(TINY)


def test_hydra_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(TINY)
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        with pytest.raises(SettingsError):
            compose(["experiment=nope"])
        compose(TINY)
        assert hydra_compose("config", ["parallel=tp2"]).parallel.tensor == 2  # the caller's own is back


# ------------------------------------------------------------------------------------------------------------- the user's tree


def test_a_users_file_adds_an_option(tree):
    folder = tree("parallel/mine.yaml", "tensor: 2\n")
    assert compose([*TINY, "parallel=mine"], folder).parallel.tensor == 2
    assert "mine" in group_options(folder)["parallel"]
    assert "options of parallel: pp2, single," in problems_of([*TINY, "parallel=mine"])[0]


def test_a_users_file_of_the_same_name_wins(tree):
    folder = tree("model/tiny.yaml", (CONFIG_DIR / "model/tiny.yaml").read_text().replace("num_layers: 4", "num_layers: 6"))
    assert compose(TINY, folder).model.language.num_layers == 6
    assert compose(TINY).model.language.num_layers == 4  # and only for that composition


def test_a_users_experiment_builds_on_the_packages_groups(tree):
    folder = tree(
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: digits\n  - override /train: pretrain\n"
        "train:\n  lr: 7e-4\n",
    )
    settings = compose(["experiment=mine"], folder)
    assert settings.train.lr == 7e-4 and settings.train.global_batch_size == 256


def test_a_misspelt_option_inside_a_users_experiment_is_named(tree):
    folder = tree("experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /model: tinny\n")
    (problem,) = problems_of(["experiment=mine"], config_dir=folder)
    assert "experiment/mine" in problem or "config" in problem
    assert "model=tinny: no such option (did you mean tiny?)" in problem


def test_broken_yaml_is_an_error_with_the_file_named(tree):
    folder = tree("train/mine.yaml", "lr: [1, 2\n")
    (problem,) = problems_of(["model=tiny", "train=mine"], config_dir=folder)
    assert problem.startswith("not valid YAML") and "train/mine.yaml" in problem


def test_a_missing_config_dir_is_an_error(tmp_path):
    (problem,) = problems_of(TINY, config_dir=tmp_path / "nowhere")
    assert "no such folder" in problem and "nowhere" in problem


# ------------------------------------------------------------------------------------------------------------------- errors


def test_all_problems_at_once():
    problems = problems_of(
        [*TINY, "train.lrr=1", "train.lr=abc", "modle=tiny", "train.dtype=bf16", "train.steps=0", "train.epochs=-1"]
    )
    assert sorted(problems) == sorted(
        [
            "train.lrr: unknown setting (did you mean train.lr?)",
            "train.lr=abc: should be a valid number, unable to parse string as a number",
            "modle: unknown setting (did you mean model?)",
            "train.dtype=bf16: should be 'float32' or 'bfloat16' (did you mean bfloat16?)",
            "train.steps=0: should be greater than 0",
            "train.epochs=-1: should be greater than 0",
        ]
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lr=3", "lr: unknown setting (did you mean train.lr?)"),
        ("train.tensor=2", "train.tensor: unknown setting (did you mean parallel.tensor?)"),
        ("model.vision.imagesize=3", "model.vision.imagesize: unknown setting (did you mean model.vision.image_size?)"),
        ("train.qqqqqq=1", "train.qqqqqq: unknown setting"),
        ("+train.lrr=1", "train.lrr: unknown setting (did you mean train.lr?)"),
        (
            "train.module_lr.projectr=1",
            "train.module_lr.projectr: unknown name (did you mean projector?); one of vision_tower, projector, language_model",
        ),
        ("train.output_dir=123", """train.output_dir=123: should be a valid string; quote it: train.output_dir='"123"'"""),
        ("train.freeze=vision_tower", "train.freeze=vision_tower: should be a valid list; write train.freeze=[vision_tower]"),
        ("train.steps=true", "train.steps=True: should be int > 0 or null"),
        ("train.epochs=inf", "train.epochs=inf: should be a finite number"),
        ("train.steps=1.5", "train.steps=1.5: should be a valid integer, got a number with a fractional part"),
        ("data.image_mean=[1,2]", "data.image_mean=[1, 2]: needs more values, 2 are not enough"),
        ("train.lr=null", "train.lr=null: should be a valid number"),
        ("train.lr='???'", "train.lr: required, not set"),
        ("foo", "foo: not an override; write key=value"),
        ("train.lr=1,2", "train.lr=1,2: one run takes one value; write [a,b] for a list, or quote a text with commas"),
        ("model={a:1}", "model={a:1}: model is a group; choose model=OPTION or set single values, model.NAME=VALUE"),
    ],
)
def test_words(override, problem):
    assert problem in problems_of([*TINY, override])


def test_the_advised_quoting_works_in_a_shell():
    (problem,) = problems_of([*TINY, "train.output_dir=123"])
    (override,) = shlex.split(problem.partition("quote it: ")[2])
    assert compose([*TINY, override]).train.output_dir == "123"


def test_a_wrong_group_does_not_hide_a_misspelt_key():
    problems = problems_of(
        ["experiment=quikstart", "trian.lr=2", "train.lrr=1", "train.module_lr.projector=1", "train={lr: 1}", "foo"]
    )
    assert problems[0].startswith("experiment=quikstart: no such option (did you mean quickstart?)")
    assert (
        "train.lrr: unknown setting (did you mean train.lr?)" in problems and "foo: not an override; write key=value" in problems
    )
    assert any(line.startswith("trian.lr: unknown setting") for line in problems)
    assert not any(line.startswith("train.module_lr") for line in problems)


def test_an_installed_package_carries_the_groups():
    setuptools = pytest.importorskip("setuptools")
    assert "llava_mcore.configs" in setuptools.find_packages(str(CONFIG_DIR.parents[1]), include=["llava_mcore*"])


def test_unknown_option():
    (problem,) = problems_of(["model=llava_vicuna7b"])
    assert problem == (
        "model=llava_vicuna7b: no such option (did you mean llava_vicuna_7b?); "
        "options of model: llava_mistral_7b, llava_next_mistral_7b, llava_onevision_qwen2_7b, llava_qwen2_7b, "
        "llava_vicuna_13b, llava_vicuna_7b, tiny"
    )


@pytest.mark.parametrize("override", ["hydra.verbose=true", "hydra/job_logging=none", "++hydra.run.dir=x"])
def test_hydras_own_settings_are_refused(override):
    (problem,) = problems_of([*TINY, override])
    assert "Hydra only composes here" in problem


def test_nothing_chosen_lists_every_missing_field_and_the_ways_out():
    problems = problems_of([])
    required = {line.split(":")[0] for line in problems if line.endswith("required, not set")}
    assert {"model.vision.image_size", "model.language.hidden_size", "model.image_token_id", "train.lr"} <= required
    assert any(re.fullmatch(r"model: choose experiment=NAME, or model= one of .*tiny.*", line) for line in problems)
    assert not any(line.startswith(("data", "parallel")) for line in problems)


def test_a_broken_interpolation_names_the_setting():
    (problem,) = problems_of([*TINY, "train.output_dir='${train.nope}'"])
    assert "train.nope" in problem and "train.output_dir" in problem


# --------------------------------------------------------------------------------------------------------- dicts and YAML


@pytest.mark.parametrize("text", ["1e5", "1e-05", "null", "true", "0x1F", "a: b", "#x", "ü/ß", "12:30", ".5", "???x", "", " a "])
def test_strings_survive_yaml(text):
    values = to_dict(compose(TINY))
    values["train"]["wandb_project"] = text
    settings = from_dict(values)
    dumped = dump_yaml(settings)
    assert from_dict(yaml.safe_load(dumped)) == settings
    assert from_dict(OmegaConf.to_container(OmegaConf.create(dumped))) == settings


@pytest.mark.parametrize("number", [1e-05, 1e-8, 5e-324, 1.5e300, 1e16, 0.1, 123456789.125, 1.0])
def test_floats_survive_yaml(number):
    values = to_dict(compose(TINY))
    values["train"]["lr"] = number
    values["train"]["module_lr"] = {"projector": number}
    settings = from_dict(values)
    loaded = yaml.safe_load(dump_yaml(settings))
    assert isinstance(loaded["train"]["lr"], float) and loaded["train"]["module_lr"]["projector"] == number
    assert from_dict(loaded) == settings


def test_to_dict_is_plain():
    def check(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            check(item)

    check(to_dict(compose(TINY)))
    assert from_dict(to_dict(compose(TINY))) == compose(TINY)


def test_from_dict_reports_as_compose_does():
    values = to_dict(compose(TINY))
    values["train"]["lrr"] = 1
    del values["parallel"]
    with pytest.raises(SettingsError) as caught:
        from_dict(values)
    assert set(caught.value.problems) == {"train.lrr: unknown setting (did you mean train.lr?)", "parallel: required, not set"}
    with pytest.raises(SettingsError, match="must be a mapping"):
        from_dict([1])


def test_dump_can_be_used_as_a_users_config(tree):
    settings = compose([*TINY, "train.lr=1e-5", "train.output_dir='1e5'"])
    assert settings.train.output_dir == "1e5"  # a text, which a careless dump would turn into a number
    folder = tree("config.yaml", dump_yaml(settings))
    assert compose([], folder) == settings


def test_mixtures():
    sources = "[{path: a, weight: 1}, {path: b, weight: {0: 1, 500: 2}, sampling_strategy: 'first:10%'}]"
    settings = compose(["experiment=quickstart", f"data.mixture={sources}"])
    assert [source.weight for source in settings.data.mixture] == [1.0, {0: 1.0, 500: 2.0}]
    assert from_dict(yaml.safe_load(dump_yaml(settings))) == settings
    for overrides, problem in [
        (["data.mixture=[{path: a, wieght: 1}]"], "data.mixture[0].wieght: unknown setting"),
        (["data.mixture=[{path: a, weight: 1}, {path: b}]"], "give every dataset a weight, or none"),
        (["data.mixture=[{path: a, weight: 1, epochs: 2}]"], "give every dataset a weight, or none"),
        (["data.path=a", "data.mixture_file=b"], "path and mixture_file exclude each other"),
    ]:
        with pytest.raises(SettingsError) as caught:
            compose(["experiment=quickstart", *overrides])
        assert problem in str(caught.value)
