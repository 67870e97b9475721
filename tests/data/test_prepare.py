from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_mcore.data import prepare
from llava_mcore.data.errors import DatasetError
from llava_mcore.data.image import open_rgb
from llava_mcore.data.index import build_index
from llava_mcore.data.quarantine import BadSample, QuarantineList
from llava_mcore.data.shards import ShardDataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
Picture = Callable[..., bytes]


def turns(question: str, answer: str = "It is a seven.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def source(tmp_path: Path, picture: Picture) -> Path:
    """A LLaVA JSON with six good samples."""
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    (media / "a.png").write_bytes(picture(seed=1))
    (media / "sub" / "b.jpg").write_bytes(picture(kind="JPEG", seed=2))
    (media / "c.bmp").write_bytes(picture(kind="BMP", seed=3))
    (media / "misnamed.png").write_bytes(picture(kind="JPEG", seed=4))
    records = [
        {"id": "a.1", "image": "a.png", "conversations": turns("<image>\nq")},
        {"id": "b/2", "image": "sub/b.jpg", "conversations": turns("q\n<image>")},
        {"id": "c", "image": ["c.bmp", "a.png"], "conversations": turns("<image> and <image>")},
        {"id": "text", "conversations": turns("q")},
        {"image": "misnamed.png", "conversations": turns("<image>"), "extra": 7},
        {"id": "text", "conversations": turns("again\u2028")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n")
    return tmp_path / "data.json"


BAD: list[tuple[dict[str, Any] | str, str]] = [
    ({"id": "m", "image": "gone.png", "conversations": turns("<image>")}, "missing picture"),
    ({"id": "c", "image": "cut.png", "conversations": turns("<image>")}, "corrupt or truncated"),
    ({"id": "n", "image": "note.txt", "conversations": turns("<image>")}, "not a readable picture"),
    ({"id": "x", "image": "a.png"}, "no `conversations`"),
    ({"id": "e", "conversations": []}, "empty"),
    ({"id": "r", "conversations": [{"from": "user", "value": "q"}]}, "unknown role 'user'"),
    ({"id": "i", "conversations": turns("<image>")}, "1 `<image>` in the text, but 0 pictures"),
    ({"id": "p", "image": "a.png", "conversations": turns("q")}, "0 `<image>` in the text, but 1 pictures"),
    ({"id": "h", "conversations": turns("q")[:1]}, "ends with a human turn"),
    ({"id": "w", "image": 5, "conversations": turns("q")}, "neither a file name nor a list"),
    ("text", "not an object"),
]


@pytest.fixture
def bad(source: Path, picture: Picture) -> Path:
    media = source.parent / "media"
    (media / "cut.png").write_bytes(picture(64, 64)[:-300])
    (media / "note.txt").write_text("no picture")
    records = json.loads(source.read_text())
    path = source.parent / "bad.json"
    path.write_text(json.dumps([*records, *(record for record, _ in BAD)]))
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_shard(source: Path, name: str, picture: Picture) -> None:
    output = source.parent / "shards"
    done: list[int] = []
    report = prepare.shard(source.with_name(name), source.parent / "media", output, samples_per_shard=4, progress=done.append)
    assert (report.samples, report.media, report.problems, sum(done)) == (6, 5, [], 6)
    dataset = ShardDataset(output)
    assert dataset.shards == ["shard-00000.tar", "shard-00001.tar"]
    assert [dataset.key(index) for index in range(6)] == ["a_1", "b_2", "c", "text", "000000004", "text-2"]
    assert [dataset.read_record(index) for index in range(6)] == json.loads(source.read_text())
    assert dataset.read(0).pictures == [picture(seed=1)] and dataset.read(1).pictures == [picture(kind="JPEG", seed=2)]
    first, second = dataset.read(2).pictures
    assert second == picture(seed=1) and first[:4] == b"\x89PNG"  # a BMP has no place in a shard: same pixels, as PNG
    assert open_rgb(first).tobytes() == open_rgb(picture(kind="BMP", seed=3)).tobytes()
    assert dataset.read(4).pictures == [picture(kind="JPEG", seed=4)]
    assert sorted(path.name for path in source.parent.iterdir() if path.name.startswith(".")) == []


def test_bad_samples_are_all_named_and_nothing_is_written(bad: Path) -> None:
    output = bad.parent / "shards"
    with pytest.raises(prepare.BadSamplesError) as caught:
        prepare.shard(bad, bad.parent / "media", output)
    assert len(caught.value.problems) == len(BAD)
    for number, (problem, (_, reason)) in enumerate(zip(caught.value.problems, BAD, strict=True), 6):
        assert reason in problem.reason and f"sample {number}" in problem.where
        assert str(problem) in str(caught.value)
    assert not output.exists() and not list(bad.parent.glob(".*"))


def test_skip_bad(bad: Path) -> None:
    output = bad.parent / "shards"
    report = prepare.shard(bad, bad.parent / "media", output, skip_bad=True)
    assert (report.samples, len(report.problems)) == (6, len(BAD)) and len(ShardDataset(output)) == 6


def test_nothing_but_bad_samples(bad: Path) -> None:
    path = bad.with_name("only.json")
    path.write_text(json.dumps([BAD[0][0]]))
    with pytest.raises(prepare.BadSamplesError, match="missing picture"):
        prepare.shard(path, bad.parent / "media", bad.parent / "shards", skip_bad=True)


def test_overwrite(source: Path) -> None:
    output = source.parent / "shards"
    media = source.parent / "media"
    prepare.shard(source, media, output)
    digest = ShardDataset(output).digest
    with pytest.raises(DatasetError, match="--overwrite"):
        prepare.shard(source, media, output)
    fewer = source.with_name("fewer.json")
    fewer.write_text(json.dumps(json.loads(source.read_text())[:3]))
    prepare.shard(fewer, media, output, overwrite=True)
    assert len(ShardDataset(output)) == 3
    prepare.shard(source, media, output, overwrite=True)
    assert ShardDataset(output).digest == digest
    broken = source.with_name("broken.json")
    broken.write_text(json.dumps([BAD[0][0]]))
    with pytest.raises(DatasetError):  # what was there survives a failure
        prepare.shard(broken, media, output, overwrite=True)
    assert ShardDataset(output).digest == digest and not list(source.parent.glob(".*"))


def test_leftovers_of_a_killed_run_and_a_second_writer(source: Path) -> None:
    left = source.parent / ".shards.partial"
    (left / "index").mkdir(parents=True)
    (left / "shard-00099.tar").write_bytes(b"half")
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DatasetError, match="another process is writing"):
        prepare.shard(source, source.parent / "media", source.parent / "shards")
    assert (left / "shard-00099.tar").exists()
    os.close(handle)
    prepare.shard(source, source.parent / "media", source.parent / "shards")
    assert ShardDataset(source.parent / "shards").shards == ["shard-00000.tar"]


def test_killed_run_leaves_no_half_dataset(source: Path) -> None:
    many = source.with_name("many.json")
    many.write_text(json.dumps(json.loads(source.read_text())[:3] * 3000))
    output, aside = source.parent / "shards", source.parent / ".shards.partial"
    command = ["shard", "--input", many, "--media", source.parent / "media", "--output", output, "--samples-per-shard", 5]
    running = subprocess.Popen([sys.executable, TOOL, *map(str, command)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(aside.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert aside.exists() and not output.exists()
    prepare.shard(source, source.parent / "media", output)
    assert len(ShardDataset(output)) == 6 and not aside.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", "{broken", "x.json is not JSON"),
        ("x.json", '{"id": 1}', "no list"),
        ("x.json", "[]", "holds no sample"),
        ("x.jsonl", '{"id": 1}\n\n{broken', "line 3"),
        ("x.json", '{"a": 1}\n{"a": 2}', "jsonl"),
    ],
)
def test_broken_input(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=reason):
        prepare.shard(tmp_path / name, tmp_path, tmp_path / "out")
    with pytest.raises(DatasetError, match="cannot read"):
        prepare.read_records(tmp_path / "missing.json")


def test_missing_media(source: Path) -> None:
    with pytest.raises(DatasetError, match="no media folder"):
        prepare.shard(source, source.parent / "gone", source.parent / "out")


def test_command_line_shard_index_lint(source: Path, sp_file: Path) -> None:
    output = source.parent / "shards"
    made = tool("shard", "--input", source, "--media", source.parent / "media", "--output", output)
    assert made.returncode == 0 and "6 samples, 5 media" in made.stdout and "6/6" in made.stderr, made.stderr
    again = tool("shard", "--input", source, "--media", source.parent / "media", "--output", output)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    digest = ShardDataset(output).digest
    indexed = tool("index", output)
    assert indexed.returncode == 0 and "6 samples in 1 shards" in indexed.stdout and ShardDataset(output).digest == digest
    linted = tool("lint", output)
    assert linted.returncode == 0 and "0 problems" in linted.stdout
    long = tool("lint", output, "--tokenizer", sp_file, "--sequence-length", 100, "--image-tokens", 16)
    assert long.returncode == 1 and "too long" in long.stdout
    assert tool("lint", output, "--tokenizer", sp_file, "--sequence-length", 600, "--image-tokens", 16).returncode == 0
    shard = output / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    for command in ("lint", "index"):
        damaged = tool(command, output)
        assert damaged.returncode == 1 and "shard-00000.tar" in damaged.stderr and "Traceback" not in damaged.stderr


def test_command_line_lint_of_a_json(bad: Path) -> None:
    linted = tool("lint", bad, "--media", bad.parent / "media")
    assert linted.returncode == 1
    for (_, reason), line in zip(BAD, linted.stdout.splitlines(), strict=False):
        assert reason in line
    assert f"17 samples, 5 media, {len(BAD)} problems" in linted.stdout
    shown = tool("shard", "--input", bad, "--media", bad.parent / "media", "--output", bad.parent / "out")
    assert shown.returncode == 1 and "--skip-bad" in shown.stderr and "missing picture" in shown.stderr
    left = tool("shard", "--input", bad, "--media", bad.parent / "media", "--output", bad.parent / "out", "--skip-bad")
    assert left.returncode == 0 and left.stdout.count("left out:") == len(BAD)
    assert tool("lint", bad).returncode == 2


def test_lint_shards_names_bad_samples(tmp_path: Path, picture: Picture) -> None:
    import io
    import tarfile

    members = {
        "a.png": picture()[:-200],
        "a.json": json.dumps({"conversations": turns("<image>")}).encode(),
        "b.json": json.dumps({"id": 2}).encode(),
        "c.png": picture(),
        "d.json": json.dumps({"conversations": turns("q")}).encode(),
    }
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    build_index(tmp_path)
    report = prepare.lint_shards(tmp_path)
    assert [problem.where for problem in report.problems] == ["x.tar: a", "x.tar: b", "x.tar: c"]
    for problem, reason in zip(report.problems, ["corrupt", "no `conv", "no .json"], strict=True):
        assert reason in problem.reason
    assert sum(report.counts().values()) == 3


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['prepare_data', '--help']\ntry:\n runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit:\n pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "lint" in done.stdout, done.stderr
    parts = "llava_mcore.data.prepare, llava_mcore.data.shards, llava_mcore.data.conversation, llava_mcore.data.tokenizer"
    done = subprocess.run([sys.executable, "-c", f"import {parts}, sys; assert 'torch' not in sys.modules"], cwd=TOOL.parents[1])
    assert done.returncode == 0


def test_command_line_info_preview_quarantine(source: Path, sp_file: Path) -> None:
    output = source.parent / "shards"
    prepare.shard(source, source.parent / "media", output)
    indexed = tool("index", output, "--tokenizer", sp_file, "--template", "vicuna_v1")
    assert (
        indexed.returncode == 0 and "text of 6 samples" in indexed.stdout and "0 samples make no conversation" in indexed.stdout
    )
    said = tool("info", output)
    assert said.returncode == 0 and "6 samples in 1 shards" in said.stdout and ".png: 3" in said.stdout
    assert "template vicuna_v1" in said.stdout
    page = source.parent / "page.html"
    shown = tool(
        "preview", output, "--tokenizer", sp_file, "--output", page, "--samples", 3, "--settings", "experiment=quickstart"
    )
    assert shown.returncode == 0, shown.stderr
    text = page.read_text()
    assert text.count("<section>") == 3 and "16 picture embeddings" in text and "data:image/png;base64," in text
    learned = re.findall(r'<span class="token learned">(.*?)</span>', text.split("<section>")[1])
    assert "".join(learned).replace("&lt;2&gt;", "").strip() == "It is a seven."
    wrong = tool("preview", output, "--tokenizer", sp_file, "--output", page, "--settings", "data.tempalte=plain")
    assert wrong.returncode == 1 and "data.template" in wrong.stderr
    log, listed = source.parent / "quarantine.jsonl", source.parent / "list.json"
    log.write_text(BadSample(str(output), "shard-00000.tar", "c", 0, "broken").line(3) + "\n")
    made = tool("quarantine", log, "--list", listed, "--from-sample", 64)
    assert made.returncode == 0 and "1 samples more, from sample 64" in made.stdout
    assert [name[1:] for name in QuarantineList(listed).at(64)] == [("shard-00000.tar", "c")]
    missing = tool("quarantine", source.parent / "nowhere", "--list", listed)
    assert missing.returncode == 1 and "no quarantine log" in missing.stderr
