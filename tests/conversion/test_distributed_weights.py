"""What lies in weights/: keys, order of rows, padding, and that any layout can read it."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conversion_material import VARIANTS, assert_same, export_hf, import_hf, rewrite, tensors

from llava_mcore.conversion import transfer, views
from llava_mcore.conversion.convert import compare_paths, load_hf_into
from llava_mcore.conversion.families import ConversionError
from llava_mcore.training import checkpoint_folder as folder

pytestmark = pytest.mark.usefixtures("process")


@pytest.fixture(scope="module")
def checkpoints(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant, imported."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, source in saved.items():
        import_hf(source, root / name, verify=False)
    return {name: root / name for name in saved}


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of weights/, by Megatron-Core alone."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(checkpoint / "weights"))
    return {key: tensor for key, tensor in loaded.items() if key != "content_metadata"}


def interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Row by row: the queries of a group, its key, its value."""
    each = q.shape[0] // groups // width
    rows = []
    for group in range(groups):
        for head in range(each):
            rows += [q[(group * each + head) * width + i] for i in range(width)]
        rows += [k[group * width + i] for i in range(width)]
        rows += [v[group * width + i] for i in range(width)]
    return torch.stack(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor(saved: dict[str, Path], checkpoints: dict[str, Path], name: str) -> None:
    theirs, ours = tensors(saved[name]), read(checkpoints[name])
    model = folder.read_model_settings(checkpoints[name])
    expected = {}
    tower, out = "vision_tower.", "vision_tower."
    expected[out + "patch_embedding.weight"] = theirs[tower + "embeddings.patch_embedding.weight"].reshape(24, 3 * 7 * 7)
    expected[out + "class_embedding"] = theirs[tower + "embeddings.class_embedding"]
    expected[out + "position_embedding"] = theirs[tower + "embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        expected[f"{out}pre_layernorm.{kind}"] = theirs[f"{tower}pre_layrnorm.{kind}"]
        for n in "12":
            expected[f"projector.encoder.linear_fc{n}.{kind}"] = theirs[f"multi_modal_projector.linear_{n}.{kind}"]
        for i in range(model.vision.used_layers):
            a, b = f"{out}encoder.layers.{i}.", f"{tower}encoder.layers.{i}."
            qkv = (theirs[f"{b}self_attn.{x}_proj.{kind}"] for x in "qkv")
            expected[f"{a}self_attention.linear_qkv.{kind}"] = interleaved(*qkv, groups=3, width=8)
            expected[f"{a}self_attention.linear_qkv.layer_norm_{kind}"] = theirs[f"{b}layer_norm1.{kind}"]
            expected[f"{a}self_attention.linear_proj.{kind}"] = theirs[f"{b}self_attn.out_proj.{kind}"]
            expected[f"{a}mlp.linear_fc1.layer_norm_{kind}"] = theirs[f"{b}layer_norm2.{kind}"]
            for n in "12":
                expected[f"{a}mlp.linear_fc{n}.{kind}"] = theirs[f"{b}mlp.fc{n}.{kind}"]
    decoder, out, language = "language_model.model.", "language_model.", model.language
    rows = {"embedding.word_embeddings.weight": theirs[decoder + "embed_tokens.weight"]}
    if not language.tie_word_embeddings:
        rows["output_layer.weight"] = theirs["language_model.lm_head.weight"]
    for key, tensor in rows.items():
        expected[out + key] = torch.cat([tensor, tensor.new_zeros(128 - 101, tensor.shape[1])])
    expected[out + "decoder.final_layernorm.weight"] = theirs[decoder + "norm.weight"]
    for i in range(language.num_layers):
        a, b = f"{out}decoder.layers.{i}.", f"{decoder}layers.{i}."
        qkv = (theirs[f"{b}self_attn.{x}_proj.weight"] for x in "qkv")
        grouped = interleaved(*qkv, groups=language.query_groups, width=language.head_dim)
        expected[f"{a}self_attention.linear_qkv.weight"] = grouped
        expected[f"{a}self_attention.linear_qkv.layer_norm_weight"] = theirs[f"{b}input_layernorm.weight"]
        expected[f"{a}self_attention.linear_proj.weight"] = theirs[f"{b}self_attn.o_proj.weight"]
        expected[f"{a}mlp.linear_fc1.layer_norm_weight"] = theirs[f"{b}post_attention_layernorm.weight"]
        gate, up = theirs[f"{b}mlp.gate_proj.weight"], theirs[f"{b}mlp.up_proj.weight"]
        expected[f"{a}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        expected[f"{a}mlp.linear_fc2.weight"] = theirs[f"{b}mlp.down_proj.weight"]
    assert_same(ours, expected)


FC1 = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
PROJ = "language_model.decoder.layers.1.self_attention.linear_proj.weight"


def rank_state(rank: int, dtype: torch.dtype = torch.float32) -> dict:
    """What rank ``rank`` of two tensor-parallel ranks holds: gate and up in chunks of their own under one key."""
    from megatron.core.dist_checkpointing import ShardedTensor

    def shard(key: str, shape: tuple[int, ...], *offsets: tuple[int, int, int]) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.full(shape, float("nan"), dtype=dtype), *offsets, replica_id=0)

    return {
        "gate": shard(FC1, (36, 48), (0, rank, 4)),
        "up": shard(FC1, (36, 48), (0, rank + 2, 4)),
        "qkv": shard(QKV, (40, 48), (0, rank, 2)),
        "proj": shard(PROJ, (48, 24), (1, rank, 2)),
        "embedding": shard("language_model.embedding.word_embeddings.weight", (64, 48), (0, rank, 2)),
    }


def expected_state(source: Path, rank: int) -> dict[str, torch.Tensor]:
    """The same, cut from the published tensors."""
    theirs = tensors(source)
    layer = "language_model.model.layers.1."
    q, k, v = (theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
    embedding = theirs["language_model.model.embed_tokens.weight"]
    return {
        "gate": theirs[layer + "mlp.gate_proj.weight"].chunk(2)[rank],
        "up": theirs[layer + "mlp.up_proj.weight"].chunk(2)[rank],
        "qkv": torch.cat([q.chunk(2)[rank], k.chunk(2)[rank], v.chunk(2)[rank]]),  # two groups, one a rank
        "proj": theirs[layer + "self_attn.o_proj.weight"].chunk(2, dim=1)[rank],
        "embedding": torch.cat([embedding, embedding.new_zeros(27, 48)]).chunk(2)[rank],
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_two_ranks(saved: dict[str, Path], checkpoints: dict[str, Path], rank: int) -> None:
    """A tensor-parallel rank finds its own heads, its half of gate and of up, its rows of the vocabulary."""
    from megatron.core import dist_checkpointing

    weights = str(checkpoints["groups2"] / "weights")
    # The other rank's slices are nobody's here, so access is not validated.
    loaded = dist_checkpointing.load(rank_state(rank), weights, validate_access_integrity=False)
    assert_same({key: loaded[key].contiguous() for key in rank_state(rank)}, cut(saved["groups2"], rank))
    other = dist_checkpointing.load(rank_state(rank, torch.bfloat16), weights, validate_access_integrity=False)
    assert_same(
        {key: other[key].contiguous() for key in rank_state(rank)},
        {key: tensor.bfloat16() for key, tensor in cut(saved["groups2"], rank).items()},
    )


def cut(source: Path, rank: int) -> dict[str, torch.Tensor]:
    """``expected_state``, contiguous."""
    return {key: tensor.contiguous() for key, tensor in expected_state(source, rank).items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_straight_from_hugging_face(saved: dict[str, Path], rank: int) -> None:
    state = rank_state(rank)
    load_hf_into(state, saved["groups2"])
    assert_same({key: shard.data for key, shard in state.items()}, cut(saved["groups2"], rank))
    from megatron.core.dist_checkpointing import ShardedTensor

    state = {"other": ShardedTensor.from_rank_offsets("language_model.strange", torch.zeros(3), replica_id=0)}
    with pytest.raises(ConversionError, match="holds no language_model.strange"):
        load_hf_into(state, saved["groups2"])
    state = {"short": ShardedTensor.from_rank_offsets(PROJ, torch.zeros(40, 48), replica_id=0)}
    with pytest.raises(ConversionError, match=r"\[48, 48\], the model's has \[40, 48\]"):
        load_hf_into(state, saved["groups2"])


def test_optimizer_is_never_read(saved: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Beside the model lie optimizer tensors whose bytes are rubbish: export neither reads nor names them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    trained = shutil.copytree(checkpoints["groups2"], tmp_path / "trained")
    shutil.rmtree(trained / "weights")
    (trained / "weights").mkdir()
    state: dict = {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=0) for key, tensor in read(checkpoints["groups2"]).items()
    }
    # As four tensor-parallel ranks of a trainer would have saved them: in parts, by rows and by columns.
    for key, axis, count in ((FC1, 0, 4), (PROJ, 1, 3), ("language_model.embedding.word_embeddings.weight", 0, 2)):
        parts = state.pop(key).data.chunk(count, dim=axis)
        for i, part in enumerate(parts):
            state[f"{key}/{i}"] = ShardedTensor.from_rank_offsets(key, part.contiguous(), (axis, i, count), replica_id=0)
    state["moment"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg", torch.ones(5000), replica_id=0)
    state["step"] = 12
    dist_checkpointing.save(state, str(trained / "weights"))
    with (trained / "weights/.metadata").open("rb") as file:
        storage = pickle.load(file).storage_data
    for index, place in storage.items():
        if index.fqn.startswith("optimizer."):
            with (trained / "weights" / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(b"\xff" * place.length)
    folder.write_meta(trained, step=12, contents=["model", "optimizer"])
    export_hf(trained, tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(saved["groups2"]))


def test_differences_are_named(saved: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "language_model.model.layers.2.self_attn.k_proj.weight"

    def flip(content: dict[str, torch.Tensor]) -> None:
        content[name].view(torch.int32)[3, 5] ^= 1  # the last bit of one value

    other = rewrite(shutil.copytree(saved["groups2"], tmp_path / "other"), flip)
    report = compare_paths(checkpoints["groups2"], other)
    assert not report.ok and report.differing == [f"{name}: 1 of 768 values differ"]
    assert "NO, 1 differ" in report.table() and report.table().count("yes, bit for bit") == 3
    with pytest.raises(ConversionError, match=name):
        report.require()
    with pytest.raises(ConversionError, match="different models"):
        compare_paths(checkpoints["groups2"], saved["groups3_tied_full"])


def test_verification_stops_an_import(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back: a wrong row of padding and a wrong bit of one published tensor are both seen."""
    honest = transfer.write_part

    def spoil(path: Path, number: int, given) -> list:
        changed = []
        for key, tensor in given:
            if key.endswith("word_embeddings.weight"):
                tensor[-1, -1] = 1.0
            if key == QKV:
                tensor.view(torch.int32)[-1, -1] ^= 1
            changed.append((key, tensor))
        return honest(path, number, changed)

    monkeypatch.setattr(transfer, "write_part", spoil)
    with pytest.raises(ConversionError) as error:
        import_hf(saved["groups2"], tmp_path / "checkpoint")
    assert "2 of " in str(error.value) and "(padding): rows that are not zero" in str(error.value)
    assert "layers.1.self_attn.v_proj.weight: another checksum than the source's" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(checkpoints["groups2"], tmp_path / "other")
    model = folder.read_model_settings(other)
    model.language.num_layers, model.language.ffn_hidden_size = 4, 80
    folder.write_model_settings(other, model)
    with pytest.raises(ConversionError) as error:
        views.CheckpointView(other)
    assert "missing language_model.decoder.layers.3." in str(error.value)
    assert "layers.0.mlp.linear_fc1.weight has shape [144, 48], settings.yaml says [160, 48]" in str(error.value)


def test_damaged_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(checkpoints["groups2"], tmp_path / "damaged")
    file = damaged / "weights/__0_0.distcp"
    whole = file.read_bytes()
    with (damaged / "weights/.metadata").open("rb") as opened:
        place = {index.fqn: place for index, place in pickle.load(opened).storage_data.items()}[QKV]
    flipped = bytearray(whole)
    flipped[place.offset + place.length // 2] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(ConversionError, match=rf"__0_0.distcp: {QKV}: its bytes do not have the checksum"):
        export_hf(damaged, tmp_path / "back")
    file.write_bytes(whole[:1000])
    with pytest.raises(ConversionError, match="__0_0.distcp: cut short: language_model"):
        export_hf(damaged, tmp_path / "back")
    file.unlink()
    with pytest.raises(ConversionError, match="__0_0.distcp: missing"):
        export_hf(damaged, tmp_path / "back")
    (damaged / "weights/.metadata").write_bytes(b"")
    with pytest.raises(ConversionError, match="weights/.metadata: not readable"):
        export_hf(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


class Trap:
    """Runs a command when it is unpickled by one who trusts it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_pickles_are_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    trapped = shutil.copytree(checkpoints["groups2"], tmp_path / "trapped")
    (trapped / "weights/.metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConversionError, match="posix.system.*was not run"):
        export_hf(trapped, tmp_path / "back")
    assert not (tmp_path / "sprung").exists()
