"""The released layout: what is written equals what was read, and every flaw of a checkpoint is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny
from transformers import Qwen2_5_VLForConditionalGeneration

from nexus_gen.language.checkpoint import (
    load_autoregressive,
    load_processor,
    load_vision_tower,
    save_autoregressive,
)
from nexus_gen.parts.inspection import inspect
from nexus_gen.parts.models import SHIPPED_RUN, target_tokens_of
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.layouts import ADDED_KEYS

GOLDEN = Path(__file__).parents[2] / "golden" / "ar"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


@pytest.mark.parametrize("width", [32, 48, 80])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_export_and_import_are_bit_identical(tmp_path: Path, width: int, max_shard_size: str) -> None:
    model = tiny(width)
    save_autoregressive(model, tmp_path / "out", max_shard_size=max_shard_size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or max_shard_size == "20KB"
    loaded = load_autoregressive(tmp_path / "out", dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.config.text_config.rope_parameters["mrope_section"] == [width // 4 - 4, 2, 2]
    assert (loaded.config.image_token_id, loaded.generation_config.eos_token_id) == (90, 94)


def test_the_released_files_are_reproduced(tmp_path: Path) -> None:
    model = load_autoregressive(GOLDEN, dtype=torch.float32)
    save_autoregressive(model, tmp_path / "out", state_dict=model.state_dict())
    released, written = (load_file(path / "model.safetensors") for path in (GOLDEN, tmp_path / "out"))
    assert released.keys() == written.keys()
    assert all(torch.equal(released[key], written[key]) for key in released)
    old = json.loads((GOLDEN / "config.json").read_text())
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in new.items() if key in old and old[key] != value} == {
        "torch_dtype": "float32",  # the golden file states none
        # 4.49 stores "mrope" as "default" in memory and reads both; Qwen's own files say "mrope".
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {key: old["vision_config"][key] for key in new["vision_config"]},
    }


def test_a_plain_qwen_reads_an_export(tmp_path: Path) -> None:
    model = tiny(32)
    save_autoregressive(model, tmp_path / "out")
    plain, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info["unexpected_keys"] == set(ADDED_KEYS) and not info["missing_keys"]
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_a_plain_qwen_checkpoint_gets_the_two_tensors(tmp_path: Path) -> None:
    save_autoregressive(tiny(80), tmp_path / "plain", as_qwen=True)
    assert not set(ADDED_KEYS) & load_file(tmp_path / "plain" / "model.safetensors").keys()
    first, again, other = (
        load_autoregressive(tmp_path / "plain", dtype=torch.float32, init_seed=seed).state_dict() for seed in (1, 1, 2)
    )
    for key in ADDED_KEYS:
        assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])
        assert first[key].std().item() == pytest.approx(0.02, rel=0.05)  # 6400 draws: sigma of the estimate is 0.9%


def test_the_number_of_target_tokens_is_the_checkpoints_own(tmp_path: Path) -> None:
    model = tiny(32, num_target_tokens=25)
    save_autoregressive(model, tmp_path / "own")
    save_autoregressive(model, tmp_path / "plain", as_qwen=True)
    assert target_tokens_of(tmp_path / "own") == 25 and target_tokens_of(tmp_path / "plain") is None
    own = load_autoregressive(tmp_path / "own", dtype=torch.float32, num_target_tokens=49)
    assert own.num_target_tokens == 25
    assert torch.equal(own.image_prefill_embeds.weight, model.image_prefill_embeds.weight)
    assert load_autoregressive(tmp_path / "plain", num_target_tokens=49).num_target_tokens == 49
    assert load_autoregressive(tmp_path / "plain").num_target_tokens == 81
    assert "target.tokens 25 (released: 81)" in inspect(tmp_path / "own").unlike_released


def test_prefill_embeddings_that_make_no_square_are_named(copy: Path) -> None:
    edit_weights(copy, cut="image_prefill_embeds.weight")
    with pytest.raises(UserError, match=r"image_prefill_embeds.weight is \(80, 64\) instead of \(81, 64\)"):
        load_autoregressive(copy)


def test_what_a_model_takes_at_targets_is_in_its_config(tmp_path: Path) -> None:
    model = tiny(32)
    model.config.target_inputs = "embeddings"
    save_autoregressive(model, tmp_path / "out")
    assert load_autoregressive(tmp_path / "out").target_inputs == "embeddings"
    model.config.target_inputs = "prefill"
    save_autoregressive(model, tmp_path / "out")
    assert load_autoregressive(tmp_path / "out").target_inputs == "prefill"
    assert "target_inputs" not in json.loads((tmp_path / "out" / "config.json").read_text())  # as published


def test_building_is_seeded_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = tiny(32, 1), tiny(32, 1), tiny(32, 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_dtype_is_applied_and_written(tmp_path: Path) -> None:
    model = load_autoregressive(GOLDEN, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_autoregressive(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("place", ["", "processor"])
def test_processor_files_are_copied(tmp_path: Path, copy: Path, place: str) -> None:
    (copy / place).mkdir(exist_ok=True)
    (copy / place / "preprocessor_config.json").write_text('{"patch_size": 4}')
    save_autoregressive(tiny(32), tmp_path / "out", processor_from=copy)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 4}'


def edit_weights(directory: Path, drop: str = "", add: str = "", cut: str = "") -> None:
    weights = load_file(directory / "model.safetensors")
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.zeros(2)
    if cut:
        weights[cut] = weights[cut][:-1].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"drop": "model.layers.1.mlp.down_proj.weight"}, r"1 missing key \(model.layers.1.mlp.down_proj.weight\)"),
        ({"drop": "vision_head.weight"}, r"1 missing key \(vision_head.weight\)"),
        ({"add": "model.layers.0.surplus"}, r"1 unexpected key \(model.layers.0.surplus\)"),
        ({"cut": "lm_head.weight"}, r"lm_head.weight is \(319, 64\) instead of \(320, 64\)"),
    ],
)
def test_keys_that_do_not_fit_are_named(copy: Path, edit: dict[str, str], message: str) -> None:
    edit_weights(copy, **edit)
    with pytest.raises(UserError, match=message):
        load_autoregressive(copy)


@pytest.mark.parametrize("load", [load_autoregressive, load_vision_tower])
def test_damaged_directories_are_named(copy: Path, load) -> None:
    weights = copy / "model.safetensors"
    with pytest.raises(UserError, match=r"no config\.json"):
        load(copy / "nowhere")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        load(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"model-1\.safetensors is listed in .*index\.json but does not exist"):
        load(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is not a readable index"):
        load(copy)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="describes a llama model where qwen2_5_vl is needed"):
        load(copy)
    (copy / "config.json").write_text("not json")
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        load(copy)


def test_a_tower_that_does_not_fit_is_named(copy: Path) -> None:
    edit_weights(copy, drop="visual.merger.ln_q.weight", cut="visual.blocks.0.attn.proj.bias")
    with pytest.raises(
        UserError,
        match=r"missing key \(visual\.merger\.ln_q\.weight\), 1 misshapen .*\.0\.attn\.proj\.bias is \(47,\)",
    ):
        load_vision_tower(copy)


def test_a_missing_processor_is_named(copy: Path) -> None:
    with pytest.raises(UserError, match="holds no readable tokenizer and processor"):
        load_processor(copy)


@pytest.mark.parametrize("text", ["{}", '{"added_tokens": [], "model": {"type": "of a later version"}}', "{"])
def test_a_tokenizer_that_the_library_cannot_read_is_named(tmp_path: Path, text: str) -> None:
    shutil.copytree(SHIPPED_RUN / "pretrain" / "artifact", tmp_path / "qwen")
    (tmp_path / "qwen" / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="qwen holds no readable tokenizer and processor"):
        load_processor(tmp_path / "qwen")
