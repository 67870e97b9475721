"""The dry run: its numbers against the real model's, its page, and its exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mcore.settings.compose import compose
from llava_mcore.training.dry_run import report, stages, world_size_from_environment
from llava_mcore.training.observe.flops import parameter_counts

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=quickstart"]
LAYOUTS = [
    ["parallel=tp2"],
    ["parallel=tp2", "parallel.encoder=tensor_parallel"],
    ["parallel=pp2", "parallel.pipeline_split=[1,3]"],
    ["parallel=pp2"],
    ["parallel=pp2", "model.language.tie_word_embeddings=true"],
    ["parallel=tp2", "model.language.tie_word_embeddings=true"],
    ["parallel=tp2", "model.projector.type=linear", "model.language.vocab_size=500"],
    ["parallel=tp2", "model.language.family=qwen2", "model.vision.family=siglip"],
    ["parallel=pp2", "model.language.family=qwen3_moe", "model.language.num_experts=6"],
    ["parallel.expert=2", "model.language.family=mixtral", "model.language.num_experts=6"],
]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Settings for a small real dataset, made with the project's own writer."""
    pytest.importorskip("sentencepiece")
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from material import make_shards, make_tokenizer
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer(folder / "tokenizer")
    return [f"data.path='{make_shards(folder / 'shards', tokenizer=tokenizer)}'", f"data.tokenizer='{tokenizer}'"]


# ------------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "overrides", [[], ["model=llava_vicuna_7b", "data.sequence_length=2048"], ["model.language.vocab_size=500"]]
)
def test_one_stage_holds_the_whole_model(overrides):
    settings = compose([*TINY, *overrides])
    (stage,) = stages(settings)
    assert stage.parameters == stage.trained == parameter_counts(settings.model, padded=True)


def test_stages_of_a_pipeline_add_up():
    settings = compose(["experiment=finetune_llava_7b", "parallel=pp2"])
    first, last = stages(settings)
    whole = parameter_counts(settings.model)
    assert first.parameters["language_model"] + last.parameters["language_model"] == whole["language_model"]
    assert first.parameters["vision_tower"] == whole["vision_tower"] and "vision_tower" not in last.parameters
    assert "vision_tower" not in first.trained and first.trained["projector"] == whole["projector"]
    assert "16 decoder layers" in first.holds and "16 decoder layers" in last.holds and "head" in last.holds


def test_memory():
    settings = compose(["experiment=pretrain_llava_7b"])
    (stage,) = stages(settings)
    projector = parameter_counts(settings.model)["projector"]
    memory = stage.memory(settings, data_parallel=8)
    assert memory["weights"] == 2 * sum(parameter_counts(settings.model).values())
    assert memory["gradients"] == 4 * projector  # frozen parts have neither gradients nor optimizer state
    assert memory["optimizer"] == -(-12 * projector // 8)
    single = compose([*TINY, "train.dtype=float32"])
    trained = sum(stages(single)[0].trained.values())
    assert stages(single)[0].memory(single, 1) == {"weights": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained}


@pytest.mark.parametrize("processes", [2])
def test_parameters_of_every_rank_are_the_models(processes):
    """Two processes build the real model in every layout and count."""
    pytest.importorskip("megatron.core")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("count ")]
    assert len(counted) == processes * len(LAYOUTS)
    for layout, stage, parameters in counted:
        assert stages(compose([*TINY, *layout]))[stage].parameters == parameters, (layout, stage)


def count_real_parameters() -> None:
    """What one of the processes above does."""
    from llava_mcore.models.llava import LlavaModel
    from llava_mcore.parallel import groups as groups_module
    from llava_mcore.platform import device

    device.start()
    for layout in LAYOUTS:
        settings = compose([*TINY, *layout])
        groups = groups_module.build(settings.parallel)
        counts: dict[str, int] = {}
        for name, parameter in LlavaModel(settings.model, settings.parallel, "float32", groups).named_parameters():
            module = name.split(".")[0]
            counts[module] = counts.get(module, 0) + parameter.numel()
        # One write a line: two processes share the pipe.
        os.write(1, f"\ncount {json.dumps([layout, groups.pp.rank(), counts])}\n".encode())
        groups_module.destroy()
    device.stop()


# ------------------------------------------------------------------------------------------------------------------ the page


def test_all_is_well_with_data(material, capsys):
    settings = compose([*TINY, *material, "train.global_batch_size=8", "train.steps=null", "train.epochs=2"])
    code = report(settings)
    text = capsys.readouterr().out
    assert code == 0, text
    for part in (
        "1 = tensor 1 x context 1 x pipeline 1 x data 1",
        "vision tower (4 layers), projector, embedding, 4 decoder layers, final norm, head",
        "1,410,976",
        "10, of which 1 warm up",
        "80",
        "40 (2 epochs)",
        "8 on all ranks, 0 bad",
        "ASSISTANT:",
        "all is well",
    ):
        assert part in text, part


def test_what_a_sample_predicts_is_shown(material, capsys):
    assert report(compose([*TINY, *material, "data.shuffle=false", "train.global_batch_size=1", "data.packing=false"])) == 0
    text = capsys.readouterr().out
    predicts = next(line for line in text.splitlines() if line.strip().startswith("predicts"))
    reads = next(line for line in text.splitlines() if line.strip().startswith("reads"))
    assert "It is" in predicts and "USER" not in predicts
    assert "USER" in reads and "It is" in reads
    assert "of which 16 of pictures" in text


def test_more_ranks_than_one(material, capsys):
    settings = compose([*TINY, *material, "parallel=tp2_pp2", "train.global_batch_size=8"])
    assert report(settings, 8) == 0
    text = capsys.readouterr().out
    assert (
        "8 = tensor 2 x context 1 x pipeline 2 x data 2" in text
        and "stage 1" in text
        and "spread over 2 data- and context-parallel ranks" in text
    )


def test_padding_for_transformer_engines_exchange_is_shown(material, capsys):
    layout = ["parallel=tp2_cp2", "parallel.tensor=1", "parallel.context_exchange=p2p"]
    report(compose([*TINY, *material, *layout, "train.global_batch_size=8"]), 2)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "exchange padding" in line)
    added, slots = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tokens|slots)", row))
    assert 0 < added < slots / 10 and (added + slots) % 4 == 0


def test_missing_data_is_not_well(capsys):
    assert report(compose(["experiment=finetune_llava_7b"])) == 1
    text = capsys.readouterr().out
    assert "data.path is not set" in text and "data.tokenizer is not set" in text and "unknown until data.path is set" in text
    assert "warning: train.init_from is null, so vision_tower would stay frozen at random weights" in text


def test_every_problem_is_printed_and_the_rest_still_shown(tmp_path, capsys):
    settings = compose(
        [
            *TINY,
            "parallel=tp2_pp2",
            f"data.path='{tmp_path}/none'",
            "data.tokenizer=nowhere",
            "train.init_from=nowhere",
            "train.freeze=[vision_tower,projector,language_model,'(']",
        ]
    )
    assert report(settings, 6) == 1
    text = capsys.readouterr().out
    for part in (
        "6 processes cannot hold",
        "/none",
        "train.init_from: nowhere",
        "'(' is not a regular expression",
        "nothing would be trained",
    ):
        assert part in text, part
    assert "stage 1" in text and text.count("6 processes cannot hold") == 1


def test_a_run_folder_is_no_checkpoint(tmp_path, capsys):
    assert report(compose([*TINY, f"train.init_from='{tmp_path}'"])) == 1
    assert "not a complete checkpoint of this project" in capsys.readouterr().out


def test_a_vocabulary_that_is_too_small(material, capsys):
    assert report(compose([*TINY, *material, "model.language.vocab_size=64"])) == 1
    assert "model.language.vocab_size 64 has no row for every one of the tokenizer's" in capsys.readouterr().out


def test_a_broken_shard(material, tmp_path, capsys):
    import shutil

    source = Path(material[0].split("'")[1])
    shutil.copytree(source, tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    assert report(compose([*TINY, f"data.path='{tmp_path / 'cut'}'", material[1]])) == 1
    text = capsys.readouterr().out
    assert shard.name in text and text.count(shard.name) == 1


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert report(compose(TINY), 2) == 0
    assert capsys.readouterr().out == ""


def test_world_size(monkeypatch):
    settings = compose([*TINY, "parallel=tp2_pp2"])
    assert world_size_from_environment(settings) == 4
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size_from_environment(settings) == 8


def test_without_data_no_torch_is_needed():
    code = (
        "import sys\nfrom llava_mcore.settings.compose import compose\nfrom llava_mcore.training.dry_run import report\n"
        "code = report(compose(['experiment=finetune_llava_13b']), 64)\nsys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1, done.stderr
    assert "64 = tensor 4 x context 1 x pipeline 1 x data 16" in done.stdout


if __name__ == "__main__":
    count_real_parameters()
