"""Which files are a checkpoint: one answer for all who read it, and a sentence where there would be two."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny

from nexus_gen.commands.convert import convert
from nexus_gen.language.checkpoint import load_autoregressive, load_vision_tower, save_autoregressive
from nexus_gen.language.processor_files import image_processor_config, missing_processor_files
from nexus_gen.parts.inspection import inspect
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.headers import read_checkpoint
from nexus_gen.tensors.weight_files import weight_files

GOLDEN = Path(__file__).parents[2] / "golden" / "ar"


def write(directory: Path, *names: str) -> None:
    """Files of those names; an index lists the shards that are named with it by `INDEX: SHARD ...`."""
    for name in names:
        index, _, shards = name.partition(": ")
        if shards:
            (directory / index).write_text(json.dumps({"weight_map": {f"{s} t": s for s in shards.split()}}))
        else:
            save_file({f"{name} t": torch.zeros(2)}, directory / name)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = f"model.safetensors.index.json: {ONE} {TWO}"
USUAL, OTHER = "model.safetensors", "generation_decoder.safetensors"


@pytest.mark.parametrize(
    ("names", "read", "unread"),
    [
        ([USUAL], [USUAL], []),
        ([OTHER], [OTHER], []),
        ([USUAL, OTHER], [USUAL], [OTHER]),
        ([USUAL, "model.fp16.safetensors"], [USUAL], ["model.fp16.safetensors"]),
        ([USUAL, "._model.safetensors", ".model.safetensors.1.tmp"], [USUAL], []),
        ([INDEX, ONE, TWO, OTHER], [ONE, TWO], [OTHER]),
        ([INDEX, ONE, TWO, "model-00003-of-00003.safetensors"], [ONE, TWO], ["model-00003-of-00003.safetensors"]),
        ([INDEX, ONE, TWO, "model.fp16.safetensors.index.json: x.safetensors"], [ONE, TWO], []),
        (["model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"], []),
    ],
)
def test_what_is_read_and_what_is_left_alone(tmp_path: Path, names: list[str], read: list[str], unread: list[str]):
    write(tmp_path, *names)
    found = weight_files(tmp_path)
    assert [file.name for file in found.files] == read and found.unread == unread
    assert set(read_checkpoint(tmp_path).shapes) == set(TensorFiles(tmp_path)) == {f"{name} t" for name in read}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([INDEX, ONE, TWO, USUAL], "two sets of weights, model.safetensors and the files that model.safetensors.index"),
        ([INDEX, ONE, TWO, "diffusion_pytorch_model.safetensors"], "two sets of weights, diffusion_pytorch_model"),
        ([USUAL, ONE], "two sets of weights, model.safetensors and model-00001-of-00002.safetensors without an index"),
        ([ONE, TWO], r"2 of the files .* and no model\.safetensors\.index\.json"),
        ([ONE], r"1 of the files .* and no model\.safetensors\.index\.json"),
        ([INDEX, ONE], "model-00002-of-00002.safetensors is listed in model.safetensors.index.json but does not exist"),
        (["a.safetensors.index.json: x.safetensors", "b.safetensors.index.json: y.safetensors"], "holds 2 indices"),
        (["model.safetensors.index.json: ../model.safetensors", USUAL], "not a readable index"),
        (["a.safetensors", "b.safetensors"], "holds 2 .safetensors files and no index"),
        ([USUAL, "diffusion_pytorch_model.safetensors"], "holds 2 .safetensors files and no index"),
    ],
)
def test_two_sets_and_parts_of_one_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write(tmp_path, *names)
    for read in (weight_files, TensorFiles, inspect):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "GGUF, quantised weights of llama.cpp"),
        ("consolidated.00.pth", "a torch pickle.*safetensors.torch.save_file"),
        ("pytorch_model.bin", "a torch pickle.*safetensors.torch.save_file"),
        ("model.onnx", "for another framework"),
    ],
)
def test_other_formats_are_named_with_the_remedy(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"holds 0 .safetensors files.*; {name} is {message}"):
        weight_files(tmp_path)
    if not name.endswith(".bin"):
        with pytest.raises(UserError, match=f"{name} is neither a .safetensors nor a .bin file but {message}"):
            inspect(tmp_path / name)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The golden model in two files and their index."""
    directory = Path(shutil.copytree(GOLDEN, tmp_path / "shards"))
    weights = load_file(directory / USUAL)
    (directory / USUAL).unlink()
    keys = sorted(weights)
    index = {key: ONE if place < len(keys) // 2 else TWO for place, key in enumerate(keys)}
    for name in (ONE, TWO):
        save_file({key: weights[key] for key in keys if index[key] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def test_nothing_that_lies_beside_reaches_the_model(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load_autoregressive(GOLDEN, dtype=torch.float32).state_dict()
    wrong = {key: torch.zeros_like(tensor) for key, tensor in load_file(shards / ONE).items()}
    for name in ("model-00003-of-00003.safetensors", "adapter_model.safetensors", "other.safetensors"):
        save_file(wrong, shards / name)
    (shards / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    config = json.loads((shards / "config.json").read_text())
    (shards / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with caplog.at_level(logging.WARNING):
        loaded = load_autoregressive(shards, dtype=torch.float32).state_dict()
        tower = load_vision_tower(shards, dtype=torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())
    assert all(torch.equal(tensor, expected[f"model.visual.{key}"]) for key, tensor in tower.items())
    assert caplog.text.count("model-00003-of-00003.safetensors is not read") == 1
    assert {"adapter_model.safetensors", "model-00003-of-00003.safetensors"} < set(inspect(shards).unread)


def test_a_tensor_in_two_files_or_in_the_wrong_one_is_refused(shards: Path) -> None:
    first, second = load_file(shards / ONE), load_file(shards / TWO)
    key = next(iter(first))
    save_file({**second, key: torch.zeros_like(first[key])}, shards / TWO)
    for read in (load_autoregressive, load_vision_tower, inspect):
        with pytest.raises(UserError, match=f"both hold {key}"):
            read(shards)
    save_file({other: tensor for other, tensor in first.items() if other != key}, shards / ONE)
    with pytest.raises(UserError, match=f"{ONE} lacks {key}, which its index lists"):
        load_autoregressive(shards)


def test_a_model_read_from_the_other_layout_is_saved_as_released(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "ours", "nexus-gen")
    model = load_autoregressive(tmp_path / "ours", dtype=torch.float32)
    save_autoregressive(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / USUAL).keys() == load_file(GOLDEN / USUAL).keys()


def test_how_to_generate_comes_from_the_directory(tmp_path: Path) -> None:
    save_autoregressive(tiny(32), tmp_path / "out")
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.25}))
    assert load_autoregressive(tmp_path / "out").generation_config.repetition_penalty == 1.25
    path.unlink()
    assert load_autoregressive(tmp_path / "out").generation_config.eos_token_id == 94
    path.write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not readable"):
        load_autoregressive(tmp_path / "out")


def test_what_reads_pictures_is_looked_up_where_it_is_loaded(tmp_path: Path) -> None:
    inside = tmp_path / "processor"
    inside.mkdir()
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 3}')
    assert image_processor_config(tmp_path) is None
    (inside / "preprocessor_config.json").write_text('{"patch_size": 4}')
    (inside / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    assert image_processor_config(tmp_path) == (inside / "preprocessor_config.json", {"patch_size": 4})
    (inside / "processor_config.json").write_text('{"image_processor": {"patch_size": 5}}')
    assert image_processor_config(tmp_path) == (inside / "processor_config.json", {"patch_size": 5})
    assert missing_processor_files(tmp_path) == [
        "no tokenizer.json or vocab.json, tokenizer_config.json: text and pictures cannot be read"
    ]
