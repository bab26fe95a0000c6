"""What a command would load is checked before: which decoder is meant, and whether all parts belong together."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_on_disk import Malicious

from launch.cli import main
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.commands.convert import convert
from nexus_gen.parts.inspection import inspect
from nexus_gen.parts.models import DECODER_FILES, DECODER_KINDS, RELEASED, SHIPPED_RUN, ModelPaths, find_decoder
from nexus_gen.parts.preflight import require_loadable
from nexus_gen.specs.errors import UserError

GENERATION, EDITING = DECODER_KINDS


def weights_of(kind: str, run: Path = SHIPPED_RUN) -> Path:
    return run / kind / "artifact" / DECODER_FILES[kind]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The shipped run; its files are links, so a test replaces them instead of writing to them."""
    return Path(shutil.copytree(SHIPPED_RUN, tmp_path / "run", copy_function=os.link))


def replaced(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors, or the JSON, of a file that others share."""
    weights = path.suffix == ".safetensors"
    values = load_file(path) if weights else json.loads(path.read_text())
    change(values)
    path.unlink()
    if weights:
        save_file(values, path)
    else:
        path.write_text(json.dumps(values))


# ---- which decoder is meant


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_a_file_of_an_artifact_is_what_its_manifest_says(tmp_path: Path, kind: str) -> None:
    file = weights_of(kind)
    details = Manifest.load(file.parent).details
    (tmp_path / "linked.safetensors").symlink_to(file)
    for where in (file.parent, file, tmp_path / "linked.safetensors"):
        assert find_decoder(where, [kind], "--decoder").details == details
        found = ModelPaths.find(SHIPPED_RUN, decoder=kind, decoder_path=where)
        assert found.details == details
        require_loadable(found, cfg_scale=None)
        report = inspect(where)
        assert report.whole and f"artifact of stage {kind}" in report.what
        assert report.details["cfg_scale"] == details["sampling"]["cfg_scale"]
    other = next(other for other in DECODER_KINDS if other != kind)
    with pytest.raises(UserError, match=f"holds a {kind} artifact where a {other} artifact is needed"):
        ModelPaths.find(SHIPPED_RUN, decoder=other, decoder_path=file)


def test_a_bare_file_is_the_released_decoder_or_none(tmp_path: Path) -> None:
    bare = Path(shutil.copyfile(weights_of(GENERATION), tmp_path / "generation_decoder.safetensors"))
    found = find_decoder(bare, [GENERATION], "--decoder")
    assert found.details is RELEASED[GENERATION] and found.manifest is None
    paths = replace(ModelPaths.find(SHIPPED_RUN, decoder=GENERATION), decoder=bare, details=found.details)
    with pytest.raises(UserError, match=r"misshapen keys.*no manifest beside it .*give the artifact"):
        require_loadable(paths)


def test_a_directory_of_several_decoders_does_not_choose(tmp_path: Path) -> None:
    for name in ("generation_decoder.bin", "edit_decoder.bin", "model.safetensors"):
        (tmp_path / name).touch()
    assert find_decoder(tmp_path, [EDITING], "--decoder").file == tmp_path / "edit_decoder.bin"
    with pytest.raises(UserError, match=r"init.transformer: .* holds generation_decoder.bin and edit_decoder.bin"):
        find_decoder(tmp_path, DECODER_KINDS, "init.transformer")
    (tmp_path / "edit_decoder.safetensors").touch()
    with pytest.raises(UserError, match=r"holds edit_decoder.safetensors and edit_decoder.bin; give the path of one"):
        find_decoder(tmp_path, [EDITING], "--decoder")


def test_a_decoder_converts_with_its_manifest(tmp_path: Path) -> None:
    file = weights_of(EDITING)
    said = convert(file, tmp_path / "bare.safetensors", "nexus-gen")
    assert "its manifest, which says how it is sampled, stays behind" in said[1]
    convert(file, tmp_path / "artifact", "nexus-gen")
    found = find_decoder(tmp_path / "artifact", [EDITING], "--decoder")
    was = Manifest.load(file.parent).details
    assert {name: found.details[name] for name in was} == was
    assert load_file(found.file).keys() == load_file(tmp_path / "bare.safetensors").keys()


# ---- whether all parts belong together


def add(name: str, like: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensors[like].clone()})


FLUX = "standins/artifact/FLUX.1-dev"


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("pretrain/artifact/tokenizer_config.json", None, "holds no tokenizer_config.json"),
        (
            "pretrain/artifact/preprocessor_config.json",
            lambda p: p.update(patch_size=14),
            "do not fit its model: preprocessor_config.json has patch_size 14 and config.json patch_size 4",
        ),
        (
            "pretrain/artifact/preprocessor_config.json",
            lambda p: p.update(merge_size=4),
            "merge_size 4 and config.json spatial_merge_size 2",
        ),
        (
            "pretrain/artifact/tokenizer.json",
            lambda t: next(a for a in t["added_tokens"] if a["content"] == "<|image_pad|>").update(id=77),
            r"tokenizer\.json has <.image_pad.> at 77 and config.json image_token_id 947",
        ),
        (
            "pretrain/artifact/tokenizer.json",
            lambda t: t["model"]["vocab"].update(word=151_000),
            "ids up to 151000 and the model 1024 embeddings",
        ),
        ("pretrain/artifact/tokenizer.json", lambda t: t.clear(), "tokenizer.json cannot be read .KeyError"),
        ("pretrain/artifact/model.safetensors", lambda t: t.pop("model.norm.weight"), r"1 missing key \(model\.norm"),
        (
            "generation_decoder/artifact/manifest.json",
            lambda m: m["details"]["transformer"].update(num_single_blocks=9),
            "missing keys .*not the decoder of its manifest",
        ),
        (
            "generation_decoder/artifact/manifest.json",
            lambda m: m["details"].update(embed_dim=7),
            "is .160, 160. instead of .160, 7.",
        ),
        (f"{FLUX}/ae.safetensors", add("encoder.norm", "encoder.conv_in.bias"), "unexpected key .encoder.norm"),
        (f"{FLUX}/text_encoder", None, "text_encoder does not exist"),
        (
            f"{FLUX}/text_encoder/model.safetensors",
            add("text_projection.weight", "final_layer_norm.weight"),
            "unexpected key .text_projection.weight",
        ),
        (
            f"{FLUX}/text_encoder/config.json",
            lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
            r"config\.json says that the weights are quantised \(bitsandbytes\)",
        ),
        (
            f"{FLUX}/text_encoder_2/model.safetensors",
            lambda t: t.update({"shared.weight": t["shared.weight"].to(torch.int8)}),
            "is quantised .shared.weight is I8",
        ),
    ],
)
def test_what_does_not_belong_together_is_said_before_anything_loads(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str, change: Any, message: str
) -> None:
    if change is not None:
        replaced(run / path, change)
    elif (run / path).is_dir():
        shutil.rmtree(run / path)
    else:
        (run / path).unlink()

    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nexus_gen.inference.load_autoregressive", loaded)
    with pytest.raises(UserError, match=message):
        require_loadable(ModelPaths.find(run, decoder=GENERATION), cfg_scale=None)
    assert main(["generate", "--run", str(run), "--prompt", "a red circle", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_the_error_knows_whether_the_checkpoint_was_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finish stage=pretrain of .*, or give --autoregressive"):
        ModelPaths.find(tmp_path, decoder=None)
    with pytest.raises(UserError, match=r"holds no checkpoint with its config\.json; give the directory of a Qwen2"):
        ModelPaths.find(tmp_path, decoder=None, autoregressive=tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is a LoRA .* merge it into the model that it was trained on"):
        ModelPaths.find(tmp_path, decoder=None, autoregressive=tmp_path)


def test_a_decoder_that_would_run_code_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    torch.save({"adapter.0.weight": Malicious(tmp_path / "trace")}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="holds more than tensors, which could run code"):
        require_loadable(replace(ModelPaths.find(run, decoder=GENERATION), decoder=tmp_path / "evil.bin"))
    assert not (tmp_path / "trace").exists()
