"""The quickstart's data, its comparison with transformers and its report."""

from __future__ import annotations

import collections
import filecmp
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from llava_mcore.data.conversation import IMAGE, encode_conversation, encode_prompt
from llava_mcore.data.prepare import shard
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.tokenizer import load_tokenizer
from llava_mcore.settings.compose import compose

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    script("make_data").make(folder)
    return folder


def records(data: Path, name: str) -> list[dict]:
    return json.loads((data / f"{name}.json").read_text())


def test_data_is_the_same_every_time(data: Path, tmp_path: Path) -> None:
    script("make_data").make(tmp_path)
    names = [str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()]
    assert len(names) == 1797 + 2 * 60 + 3
    assert filecmp.cmpfiles(data, tmp_path, names, shallow=False) == (names, [], [])


def test_held_out_pictures_are_never_trained_on(data: Path) -> None:
    train, held_out = ({record["image"] for record in records(data, name)} for name in ("train", "heldout"))
    assert not train & held_out
    assert len([image for image in held_out if image.startswith("digits/")]) == 297
    assert len([image for image in train if image.startswith("digits/")]) == 1500
    answers = collections.Counter(
        r["conversations"][1]["value"] for r in records(data, "heldout") if r["id"].startswith("digit-")
    )
    assert set(answers) == set("0123456789") and max(answers.values()) - min(answers.values()) <= 3


def test_answers_are_true(data: Path) -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for record in records(data, "train") + records(data, "heldout"):
        kind, answer = record["id"].split("-")[0], record["conversations"][1]["value"]
        stem = Path(record["image"]).stem
        if kind == "digit":
            expected = str(target[int(stem)])
        elif kind == "parity":
            expected = "odd" if target[int(stem)] % 2 else "even"
        elif kind == "kind":
            expected = "a digit" if stem.isdigit() else "a photograph"
        else:
            expected = "the temple" if stem.startswith("china") else "the flower"
        assert answer == expected


def test_pictures_are_the_towers_size_and_the_scan(data: Path) -> None:
    from sklearn.datasets import load_digits

    vision = compose(["experiment=quickstart"]).model.vision
    for path in (data / "media").rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("RGB", (vision.image_size, vision.image_size))
    with Image.open(data / "media/digits/0007.png") as picture:
        small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), load_digits().images[7].ravel())[0, 1] > 0.95


def test_tokenizer_fits_the_model(data: Path) -> None:
    model = compose(["experiment=quickstart"]).model
    tokenizer = load_tokenizer(data / "tokenizer")
    assert tokenizer.token_id(IMAGE) == model.image_token_id
    assert tokenizer.vocab_size <= model.language.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for record in records(data, "train") + records(data, "heldout"):
        sample = encode_conversation(
            record["conversations"],
            tokenizer,
            "vicuna_v1",
            num_images=1,
            image_tokens_each=model.embeddings_per_image,
            image_token_id=model.image_token_id,
        )
        supervised = sample.labels[sample.labels >= 0].tolist()
        assert tokenizer.decode(supervised).strip() == record["conversations"][1]["value"]
        assert supervised[-1] == tokenizer.eos_id
        assert 0 not in sample.input_ids  # nothing unknown
        assert len(sample.input_ids) <= 85  # so that several fit a stream of 256


@pytest.fixture(scope="module")
def exported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as an export leaves it: weights, preprocessor and tokenizer in one folder."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("huggingface")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=7, **sizes),
        text_config=LlamaConfig(vocab_size=512, **sizes),
        image_token_index=3,
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that answers depend on the picture
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    load_tokenizer(data / "tokenizer").save(folder)
    return folder


def test_compare_with_transformers(
    data: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    from llava_mcore.data.image import open_rgb, preprocess

    (tmp_path / "some.json").write_text(json.dumps(records(data, "heldout")[::20]))
    shard(tmp_path / "some.json", data / "media", tmp_path / "shards")
    dataset = ShardDataset(tmp_path / "shards")
    settings, tokenizer = compose(["experiment=quickstart"]).data, load_tokenizer(exported)
    model = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    answers = []
    for index in range(len(dataset)):  # the same by another way: one by one, our own preprocessing, the whole prompt every time
        sample = dataset.read(index)
        turns = sample.record["conversations"]
        ids = encode_prompt(turns, tokenizer, "vicuna_v1", num_images=1, image_tokens_each=16, image_token_id=3).tolist()
        pixels = preprocess(open_rgb(sample.pictures[0]), "square", 28, settings.image_mean, settings.image_std)
        new: list[int] = []
        while len(new) < 4 and tokenizer.eos_id not in new:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids + new]), pixel_values=torch.from_numpy(pixels)[None]).logits
            new.append(int(logits[0, -1].argmax()))
        answer = tokenizer.decode([token for token in new if token != tokenizer.eos_id])
        answers.append({"key": sample.key, "question": turns[0]["value"], "expected": turns[1]["value"], "answer": answer})
    assert len({entry["answer"] for entry in answers}) > 3

    def compare(entries: list[dict]) -> int:
        (tmp_path / "answers.json").write_text(json.dumps({"answers": entries}))
        arguments = [str(exported), str(tmp_path / "shards"), str(tmp_path / "answers.json"), "--max-new-tokens", "4"]
        monkeypatch.setattr(sys, "argv", ["compare_transformers.py", *arguments, "--output", str(tmp_path / "out.json")])
        return script("compare_transformers").main()

    assert compare(answers) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"count": len(answers), "same": len(answers), "different": []}
    assert compare([{**answers[0], "answer": "something else"}, *answers[1:]]) == 1
    assert json.loads((tmp_path / "out.json").read_text())["different"] == [answers[0]["key"]]
    assert "something else" in capsys.readouterr().out
    assert compare([{**answers[0], "key": "of-another-dataset"}]) == 1
    assert compare([]) == 1


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, right in (("untrained", 0), ("phase1", 2), ("phase2", 3)):
        entries = [
            {"key": f"{kind}-{n}", "question": "?", "expected": "7", "answer": " 7" if n < right else "1"}
            for kind in ("digit", "parity")
            for n in range(4)
        ]
        (tmp_path / f"eval-{name}.json").write_text(json.dumps({"answers": entries}))
    for phase, steps in (("phase1", 30), ("phase2", 10)):
        (tmp_path / phase).mkdir()
        lines = [
            {"step": n, "loss": 3 / n, "tokens_per_second": 1000.0, "padding": 0.04, "step_ms": 500.0}
            for n in range(1, steps + 1)
        ]
        (tmp_path / phase / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "transformers.json").write_text(json.dumps({"count": 8, "same": 8, "different": []}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--seconds", "312"])
    script("report").main()
    out = capsys.readouterr().out
    assert out == (tmp_path / "report.txt").read_text()
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["untrained"].split() == ["untrained", *"0.0% of 4 0.0% of 4 - - 0.0% of 8 0 - - -".split()]
    assert rows["phase 1"].split()[2:] == "50.0% of 4 50.0% of 4 - - 50.0% of 8 30 1,000 4.0% 15 s".split()
    assert rows["phase 2"].split()[2:] == "75.0% of 4 75.0% of 4 - - 75.0% of 8 10 1,000 4.0% 5 s".split()
    assert "8 of 8 answers" in out and "5 min 12 s" in out
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 800
