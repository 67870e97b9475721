"""The command line's front."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mcore.settings import cli
from llava_mcore.settings.compose import group_options, setting_paths

ROOT = Path(__file__).resolve().parents[2]


def parse(*argv):
    return cli.parse(list(argv), "python -m llava_mcore.train", "Train a model.")


def test_help_imports_nothing_heavy_and_names_everything():
    code = (
        "import sys, json\nfrom llava_mcore.settings import cli\n"
        "try:\n    cli.parse(['--help'], 'prog', 'Does it.')\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, [m for m in ('torch', 'megatron', 'hydra', 'numpy') if m in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    *text, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []]
    text = "\n".join(text)
    assert "usage: prog" in text and "Does it." in text
    for path in setting_paths():
        assert f"  {'.'.join(path)}  <" in text
    for group, names in group_options().items():
        assert f"  {group}: {names[0]}" in text and all(name in text for name in names)
    assert "train.lr  <float > 0>  required" in text
    assert "train.steps  <int > 0 or null>  default null" in text
    assert "peak learning rate" in text


def test_help_lists_the_users_tree(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("{}")
    with pytest.raises(SystemExit) as end:
        parse("--config-dir", str(tmp_path), "-h")
    assert end.value.code == 0 and "mine" in capsys.readouterr().out


def test_options_and_overrides_in_any_order():
    command = parse("experiment=quickstart", "--dry-run", "train.lr=1e-4", "--print-config", "parallel=tp2")
    assert command.dry_run and command.print_config and command.config_dir is None
    assert command.overrides == ["experiment=quickstart", "train.lr=1e-4", "parallel=tp2"]
    assert (command.settings.train.lr, command.settings.parallel.tensor) == (1e-4, 2)
    plain = parse("experiment=quickstart")
    assert not plain.dry_run and not plain.print_config


def test_bad_settings_leave_with_every_problem_and_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse("experiment=quickstart", "train.lrr=1", "train.lr=x")
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert "2 problems in the settings" in text and "did you mean train.lr?" in text and "train.lr=x" in text


def test_other_ranks_leave_the_word_to_the_first(capsys, monkeypatch):
    """They speak only after a wait, which torchrun does not leave them where the first rank has the same to say."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as end:
        parse("experiment=quickstart", "train.lrr=1")
    assert end.value.code == 2
    assert waited == [(cli.SPEAKERS_HEAD_START, "")]  # nothing was said before the wait
    assert "rank 1: 1 problem in the settings" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--dry", "experiment=quickstart")
    assert end.value.code == 2 and "--dry" in capsys.readouterr().err


def test_a_closed_pipe_ends_help_quietly():
    """As in `--help | head`: whoever reads has gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    code = "from llava_mcore.settings import cli; cli.parse(['--help'], 'prog', 'Does it.')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
