"""A tower for pictures of another size than it was published for: what transformers interpolates on the fly, taken over once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from ranks import ranks
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))

import family_models  # noqa: E402
import ours  # noqa: E402

from llava_mcore.conversion.convert import export_hf, import_hf, load_hf_into  # noqa: E402
from llava_mcore.parallel import groups as process_groups  # noqa: E402
from llava_mcore.training import checkpoint_folder as folder  # noqa: E402
from llava_mcore.training.checkpoint import CheckpointError, load_model, model_state, require_same_model  # noqa: E402

SIZE = 32


def features(checkpoint: Path, hf: Path, pixels: torch.Tensor, saved: Path) -> list[torch.Tensor]:
    """On a rank: what the tower says of larger pictures, its weights from either source; the model is saved, too."""
    model = folder.read_model_settings(checkpoint)
    model = replace(model, vision=replace(model.vision, image_size=SIZE))
    found = []
    for from_hf in (False, True):
        parts, _, groups = ours.build(model, {})
        if from_hf:
            load_hf_into(model_state(parts, groups), hf)
        else:
            load_model(checkpoint, parts, groups)
            (saved / folder.WEIGHTS).mkdir(parents=True)
            dist_checkpointing.save(model_state(parts, groups), str(saved / folder.WEIGHTS))
        (part,) = parts
        with torch.no_grad():
            found.append(part.vision_tower(pixels)[0])
        process_groups.destroy()
    folder.write_model_settings(saved, model)
    with pytest.raises(CheckpointError, match="model.vision.image_size: 20 in the checkpoint, 32 here"):
        require_same_model(checkpoint, model)  # as resuming asks, whose optimizer state has no other size
    return found


@pytest.mark.parametrize("name", ["vicuna", "siglip qwen2"])
def test_another_picture_size(name: str, tmp_path: Path) -> None:
    hf, checkpoint, saved = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "saved"
    theirs = family_models.build(name).eval()
    theirs.save_pretrained(hf)
    (hf / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 20}, "crop_size": 20, "resample": 3}))
    import_hf(hf, checkpoint, compare_logits=False)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    from_checkpoint, from_hf = ranks(1).run(features, checkpoint, hf, pixels, saved)[0]
    assert torch.equal(from_checkpoint, from_hf)

    with torch.no_grad():
        tower = theirs.model.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    expected = tower.hidden_states[-2][:, 0 if "siglip" in name else 1 :]
    difference = float((from_hf - expected).abs().max() / expected.abs().max())
    print(f"\n{name}: {difference:.1e}")
    assert from_hf.shape == expected.shape and difference < 1e-5

    # An export is a model of the new size, which transformers needs not be told to interpolate.
    folder.copy_sidecars(checkpoint, saved)
    shutil.copy(checkpoint / folder.META, saved / folder.META)
    export_hf(saved, tmp_path / "back", compare_logits=False)
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert back.config.vision_config.image_size == SIZE
    with torch.no_grad():
        again = back.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(again, tower.hidden_states[-2], atol=1e-5)
    processor = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert processor == {"size": {"shortest_edge": SIZE}, "crop_size": SIZE, "resample": 3}
