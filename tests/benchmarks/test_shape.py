"""The benchmarks' shape, and that the two sides of a comparison do the same work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _common  # noqa: E402
import _step  # noqa: E402
import data  # noqa: E402
import train_step  # noqa: E402

from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.platform import device  # noqa: E402

TINY = _step.settings_of(64, 96, 2, 2, 200, (64, 2, 3), train_step.PHASE_2)


@pytest.fixture
def groups():
    device.start()
    yield process_groups.build(TINY.parallel)
    process_groups.destroy()
    train_step.one_process.cache_clear()


@pytest.fixture
def samples() -> list[_step.Sample]:
    random = np.random.default_rng(0)
    return [_step.make_sample(TINY.model, text, text % 3 != 0, random) for text in (5, 9, 14, 2, 20)]


def test_ratio_above_one_is_in_our_favour():
    assert _common.Measure(30.0, 20.0, "tokens/s", 1.0).ratio == pytest.approx(1.5)
    assert _common.Measure(20.0, 30.0, "MiB", 3.0, "lower").ratio == pytest.approx(1.5)


def test_alternate_takes_turns_and_medians():
    order: list[str] = []

    def take(name: str, figures: list[float]):
        def figure(number: int) -> float:
            order.append(name)
            return figures[number]

        return figure

    found = _common.alternate(take("ours", [5.0, 1.0, 9.0]), take("peer", [2.0, 4.0, 3.0]), rounds=3)
    assert found == (5.0, 3.0)
    assert "".join(name[0] for name in order) == "oppooppo"


def test_record_has_the_agreed_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "results" / "record.json"
    measures = {"one": lambda quick: _common.Measure(2.0 if quick else 1.0, 1.0, "x/s", 1.5, note="what it was")}
    _common.run("name", "about", measures, ["--quick", "--json", str(file)])
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written) == {"benchmark", "commit", "machine", "measures"} and written["benchmark"] == "name"
    assert written["machine"]["cores"] >= 1 and written["machine"]["torch"]
    assert written["measures"] == {
        "one": {"ours": 2.0, "peer": 1.0, "ratio": 2.0, "unit": "x/s", "at_least": 1.5, "better": "higher", "note": "what it was"}
    }
    assert "2.00 x" in capsys.readouterr().out


def test_both_sides_train_alike(groups, samples):
    """Same loss at every step from the same weights: padded or packed, neither side skips any work."""
    ours, peer = _step.pair(TINY, groups)
    size = TINY.model.vision.image_size
    steps = [
        ([_step.padded(samples, size)], [_step.rows(samples)]),
        (_step.packed(samples, 32, size), [_step.rows(samples[:2]), _step.rows(samples[2:])]),
        (_step.packed(samples, 64, size), [_step.rows(samples)]),
    ]
    losses = [(ours.step(own), peer.step(other)) for own, other in steps]
    for own, other in losses:
        assert own == pytest.approx(other, rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-4), "nothing was learned"


def test_mixed_lengths_are_as_stated():
    each = TINY.model.embeddings_per_image
    drawn = train_step.mix_samples(TINY.model, 3000, np.random.default_rng(0))
    shown = np.array([len(sample.pixels) for sample in drawn])
    assert 1 - shown.mean() == pytest.approx(train_step.TEXT_ONLY_SHARE, abs=0.02)
    assert max(map(len, drawn)) <= round(train_step.LONGEST_SAMPLE * each / train_step.PICTURE_TOKENS)
    text = np.median([len(sample) - 1 - each for sample in drawn if len(sample.pixels)])
    assert text == pytest.approx(train_step.WITH_PICTURE[0] * each / train_step.PICTURE_TOKENS, abs=1)


def test_text_only_run_refuses_pictures(groups, samples):
    settings = train_step._text_only(TINY)
    ours = _step.Ours(settings, groups, text_only=True)
    size = TINY.model.vision.image_size
    assert np.isfinite(ours.step([_step.padded([sample for sample in samples if not len(sample.pixels)], size)]))
    with pytest.raises(ValueError, match="pictures in a text-only run"):
        ours.step([_step.padded(samples, size)])


def test_frozen_parts_keep_less(groups, samples):
    size = TINY.model.vision.image_size
    kept = []
    for phase in (train_step.PHASE_1, train_step.PHASE_2):
        settings = _step.settings_of(64, 96, 2, 2, 200, (64, 2, 3), phase)
        kept.append(train_step._kept(_step.Ours(settings, groups), samples, size))
    projector = 64 * 65 + 64 * 65
    (activations_1, gradients_1, state_1), (activations_2, gradients_2, state_2) = kept
    assert 4 * projector <= gradients_1 < 1.1 * 4 * projector and state_1 >= 2 * 4 * projector
    assert 0 < activations_1 < activations_2 and gradients_1 < gradients_2 and state_1 < state_2


def test_lengths_of_the_data_benchmark_are_as_stated():
    lengths = data.mixed_lengths(100_000, np.random.default_rng(0))
    found = [lengths.mean(), *np.percentile(lengths, [50, 90, 99])]
    assert found == pytest.approx([1224, 832, 2536, 4758], rel=0.02)
    streams = data.first_fit_decreasing(np.minimum(lengths[:2000], 4096).tolist(), 4096)
    assert sorted(number for stream in streams for number in stream) == list(range(2000))
