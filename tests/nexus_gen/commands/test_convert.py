"""Between layouts on disk: what `models inspect` says of a checkpoint and what `models convert` makes of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import FLUXES, PROJECTOR, VAES, randomised
from tiny_language import tiny
from weights_on_disk import Malicious, assert_same_state, read_raw

from launch.cli import main
from nexus_gen.artifacts.artifact import Manifest, seal
from nexus_gen.commands.convert import convert
from nexus_gen.decoders.checkpoint import load_decoder, load_flux, load_vae, save_decoder, save_flux, save_vae
from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.flux.text_shapes import clip_shapes, t5_shapes
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.flux.vae import FluxVae
from nexus_gen.language.checkpoint import load_autoregressive, save_autoregressive
from nexus_gen.parts.inspection import inspect
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.tensor_shapes import (
    editing_decoder_shapes,
    flux_shapes,
    generation_decoder_shapes,
    vae_shapes,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


# ---- the shapes that headers are held against are those of the modules


@pytest.mark.parametrize("geometry", FLUXES)
def test_shapes_of_flux_and_the_decoders_are_the_modules(geometry) -> None:
    with torch.device("meta"):
        assert flux_shapes(geometry) == shapes_of(FluxTransformer(geometry))
        assert generation_decoder_shapes(geometry, 20) == shapes_of(build_generation_decoder(geometry, 20))
        assert editing_decoder_shapes(geometry, PROJECTOR) == shapes_of(build_editing_decoder(geometry, PROJECTOR))


@pytest.mark.parametrize("geometry", VAES)
def test_shapes_of_the_autoencoder_are_the_modules(geometry) -> None:
    with torch.device("meta"):
        assert vae_shapes(geometry) == shapes_of(FluxVae(geometry))


# ---- there and back, at three widths; every other layout is reached from each


@pytest.mark.parametrize("layout", ["bfl", "diffusers", "nexus-gen"])
@pytest.mark.parametrize("index", range(3))
def test_flux_and_autoencoder_reach_every_layout(tmp_path: Path, index: int, layout: str) -> None:
    flux, vae = randomised(FluxTransformer(FLUXES[index])), randomised(FluxVae(VAES[index]))
    save_flux(flux, tmp_path / "flux.safetensors", layout)
    save_vae(vae, tmp_path / "vae.bin", layout)
    for to in ("released", "diffusers", "nexus-gen"):
        convert(tmp_path / "flux.safetensors", tmp_path / f"flux-{to}.bin", to)
        convert(tmp_path / "vae.bin", tmp_path / f"vae-{to}.safetensors", to)
        assert_same_state(load_flux(tmp_path / f"flux-{to}.bin", FLUXES[index], torch.float32), flux)
        assert_same_state(load_vae(tmp_path / f"vae-{to}.safetensors", VAES[index], torch.float32), vae)
        direct = tmp_path / f"direct-{to}.safetensors"
        save_flux(flux, direct, "bfl" if to == "released" else to)
        assert_equal_files(direct, tmp_path / f"flux-{to}.bin")


def assert_equal_files(first: Path, second: Path) -> None:
    ours, theirs = read_raw(first), read_raw(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("kind", ["generation", "editing"])
@pytest.mark.parametrize("flux", FLUXES)
def test_decoders_reach_both_layouts(tmp_path: Path, flux, kind: str) -> None:
    model = build_generation_decoder(flux, 20) if kind == "generation" else build_editing_decoder(flux, PROJECTOR)
    save_decoder(randomised(model.bfloat16()), tmp_path / "released.bin")
    convert(tmp_path / "released.bin", tmp_path / "ours.safetensors", "nexus-gen")
    convert(tmp_path / "ours.safetensors", tmp_path / "again.bin", "released")
    assert_equal_files(tmp_path / "released.bin", tmp_path / "again.bin")
    other = build_generation_decoder(flux, 20) if kind == "generation" else build_editing_decoder(flux, PROJECTOR)
    load_decoder(other, tmp_path / "ours.safetensors", torch.bfloat16)
    assert_same_state(other, model)
    with pytest.raises(UserError, match=f"diffusers has no layout for a {kind}_decoder"):
        convert(tmp_path / "released.bin", tmp_path / "no.safetensors", "diffusers")


@pytest.mark.parametrize("width", [32, 48, 80])
@pytest.mark.parametrize("as_qwen", [False, True])
def test_the_autoregressive_model_reaches_both_layouts(tmp_path: Path, width: int, as_qwen: bool) -> None:
    model = tiny(width)
    save_autoregressive(model, tmp_path / "released", as_qwen=as_qwen)
    (tmp_path / "released" / "tokenizer.json").write_text("{}")
    (tmp_path / "released" / "generation_decoder.bin").write_bytes(b"of something else")
    said = convert(tmp_path / "released", tmp_path / "ours", "nexus-gen", shard_bytes=40_000)
    assert any("generation_decoder.bin" in sentence for sentence in said)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "ours" / "generation_config.json").is_file()
    loaded = load_autoregressive(tmp_path / "ours", dtype=torch.float32)
    assert_same_state(loaded, model if not as_qwen else load_autoregressive(tmp_path / "released", dtype=torch.float32))
    convert(tmp_path / "ours", tmp_path / "again", "released")
    assert_equal_files(tmp_path / "released" / "model.safetensors", tmp_path / "again" / "model.safetensors")
    assert (tmp_path / "released" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    report = inspect(tmp_path / "ours")
    assert report.layout == "nexus-gen"
    assert report.geometry["language"]["hidden_size"] == width
    assert ("plain Qwen2.5-VL" in report.what) == as_qwen


TEXT_ENCODERS = {
    "text_encoder": {
        "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10,
        "max_position_embeddings": 7,
    },
    "text_encoder_2": {
        "d_model": 6, "d_kv": 2, "d_ff": 8, "num_layers": 1, "num_heads": 3, "vocab_size": 10,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def flux_directory(path: Path) -> Path:
    save_flux(randomised(FluxTransformer(FLUXES[0])), path / "flux1-dev.safetensors")
    save_vae(randomised(FluxVae(VAES[0])), path / "ae.safetensors")
    for name, config in TEXT_ENCODERS.items():
        shapes = clip_shapes(config) if name == "text_encoder" else t5_shapes(config)
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(config))
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path / name / "model.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        (path / name).mkdir()
        (path / name / "config.json").write_text("{}")
    (path / "model_index.json").write_text("{}")
    return path


def test_a_whole_flux_directory(tmp_path: Path) -> None:
    source = flux_directory(tmp_path / "FLUX.1-dev")
    report = inspect(source)
    assert report.whole, report.lines()
    assert [part.layout for part in report.parts] == ["bfl", "bfl", "", ""]
    convert(source, tmp_path / "diffusers", "diffusers", shard_bytes=50_000)
    assert (tmp_path / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert [part.layout for part in inspect(tmp_path / "diffusers").parts[:2]] == ["diffusers", "diffusers"]
    assert inspect(tmp_path / "diffusers").whole
    for geometry, load in ((FLUXES[0], load_flux), (VAES[0], load_vae)):
        assert_same_state(load(tmp_path / "diffusers", geometry, torch.float32), load(source, geometry, torch.float32))
    convert(tmp_path / "diffusers", tmp_path / "again", "released")
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        assert_equal_files(source / name, tmp_path / "again" / name)
    assert sorted(child.name for child in (tmp_path / "again").iterdir()) == sorted(
        child.name for child in source.iterdir()
    )
    (source / "ae.safetensors").unlink()
    shutil.rmtree(source / "tokenizer_2")
    shutil.rmtree(source / "text_encoder")
    assert inspect(source).problems == [
        "no autoencoder: neither ae.safetensors nor vae/",
        "no CLIP text encoder: text_encoder/config.json",
        "no T5's tokenizer: tokenizer_2/",
    ]
    with pytest.raises(UserError, match=r"has no autoencoder: neither ae\.safetensors nor vae/"):
        convert(source, tmp_path / "third", "diffusers")


def test_a_decoder_artifact_is_converted_by_its_directory(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    model = randomised(build_generation_decoder(FLUXES[1], 20))
    save_decoder(model, artifact / "generation_decoder.safetensors")
    seal(artifact, Manifest("generation_decoder", "generation_decoder", {}, {}, {}))
    report = inspect(artifact)
    assert report.whole and report.what.endswith("kind generation_decoder: generation decoder")
    convert(artifact, tmp_path / "generation_decoder.bin", "released")
    assert_equal_files(artifact / "generation_decoder.safetensors", tmp_path / "generation_decoder.bin")
    (artifact / "generation_decoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"generation_decoder.safetensors"):
        inspect(artifact)


def test_an_artifact_of_several_models_is_inspected_whole(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    save_autoregressive(tiny(32), artifact / "Qwen2.5-VL-Instruct", as_qwen=True)
    flux_directory(artifact / "FLUX.1-dev")
    seal(artifact, Manifest("base_models", "standins", {}, {}, {}))
    report = inspect(artifact)
    assert [part.what.split(",")[0] for part in report.parts] == ["FLUX.1 directory", "plain Qwen2.5-VL"]
    assert not report.whole, "the language model has no tokenizer"
    assert any("tokenizer_config.json" in line for line in report.lines())
    with pytest.raises(UserError, match="an artifact of kind base_models; give the model's own path inside it"):
        convert(artifact, tmp_path / "new", "diffusers")


# ---- what inspection says


@pytest.mark.parametrize("geometry", FLUXES)
@pytest.mark.parametrize("layout", ["bfl", "diffusers", "nexus-gen"])
def test_geometry_is_read_from_headers(tmp_path: Path, geometry, layout: str) -> None:
    with torch.device("meta"):
        model = FluxTransformer(geometry)
    save_flux(model.to_empty(device="cpu").bfloat16(), tmp_path / "flux.safetensors", layout)
    report = inspect(tmp_path / "flux.safetensors")
    expected = {name: value for name, value in vars(geometry).items() if name != "rope_axes_dim"}
    assert report.geometry == {"transformer": expected}
    assert report.dtypes == {"BF16": len(read_raw(tmp_path / "flux.safetensors"))}
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert f"hidden_size {geometry.hidden_size} (released: 3072)" in report.unlike_released[0]


@pytest.mark.parametrize("geometry", VAES)
@pytest.mark.parametrize("layout", ["bfl", "diffusers", "nexus-gen"])
def test_the_autoencoders_geometry_is_read_from_headers(tmp_path: Path, geometry, layout: str) -> None:
    save_vae(FluxVae(geometry), tmp_path / "ae.safetensors", layout)
    report = inspect(tmp_path / "ae.safetensors")
    assert report.whole
    assert report.geometry["vae"] == {
        "channels": geometry.channels, "num_res_blocks": geometry.num_res_blocks, "latent_channels": 16
    }  # fmt: skip


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    path = tmp_path / "edit_decoder.safetensors"
    save_decoder(build_editing_decoder(FLUXES[0], PROJECTOR), path)
    return path


def spoil(path: Path) -> list[str]:
    """Take keys away, add one, narrow one; the keys that are gone."""
    tensors = load_file(path)
    gone = [key for key in tensors if "blocks.0.attn" in key]
    for key in gone:
        del tensors[key]
    kept = {"pipe.dit.blocks.0.attn.norm_q_a.weight": torch.zeros(16)}
    save_file(tensors | kept | {"surplus": torch.zeros(1), "pipe.dit.context_embedder.bias": torch.zeros(31)}, path)
    return [key for key in gone if key not in kept]


def test_keys_that_do_not_fit_are_counted_and_named(decoder: Path, capsys) -> None:
    gone = spoil(decoder)
    assert main(["models", "inspect", str(decoder)]) == 1
    said = capsys.readouterr().out
    assert f"{len(gone)} missing keys (" in said and said.count("attn") == 4, "the first four are named"
    assert "1 unexpected key (surplus)" in said
    assert "1 misshapen key (pipe.dit.context_embedder.bias is (31,) instead of (32,))" in said
    assert main(["models", "inspect", str(decoder), "--json", "--verbose"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["whole"] and all(key in report["problems"][0] for key in gone)
    assert main(["models", "convert", str(decoder), str(decoder.with_suffix(".bin")), "--to", "released"]) == 2
    assert f"{len(gone)} missing keys" in capsys.readouterr().err
    assert not decoder.with_suffix(".bin").exists()


def test_a_file_of_two_widths_names_what_does_not_fit(tmp_path: Path) -> None:
    save_flux(FluxTransformer(FLUXES[0]), tmp_path / "flux.safetensors", "diffusers")
    other = tmp_path / "other.safetensors"
    save_flux(FluxTransformer(FLUXES[1]), other, "diffusers")
    mixed = load_file(other) | {
        key: tensor
        for key, tensor in load_file(tmp_path / "flux.safetensors").items()
        if key.startswith("transformer_blocks.0.")
    }
    save_file(mixed, other)
    (problem,) = inspect(other).problems
    assert "misshapen keys" in problem and "instead of" in problem


def one_sentence(arguments: list[str], capsys) -> str:
    assert main(["models", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_and_malicious_files_get_one_sentence(decoder: Path, tmp_path: Path, capsys, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    save_decoder(build_editing_decoder(FLUXES[0], PROJECTOR), path)
    path.write_bytes(path.read_bytes()[:-100])
    for command in (["inspect", str(path)], ["convert", str(path), str(tmp_path / "new.bin"), "--to", "released"]):
        assert "is not a whole" in one_sentence(command, capsys)
    trace = tmp_path / "executed"
    torch.save({"adapter.0.weight": Malicious(trace)}, tmp_path / "evil.bin")
    for command in (["inspect"], ["convert", "--to", "released"]):
        target = [] if command[0] == "inspect" else [str(tmp_path / "new.bin")]
        said = one_sentence([command[0], str(tmp_path / "evil.bin"), *target, *command[1:]], capsys)
        assert "holds more than tensors, which could run code" in said
    assert not trace.exists() and not (tmp_path / "new.bin").exists()


def test_unknown_and_absent_things_get_one_sentence(tmp_path: Path, capsys) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "some.safetensors")
    assert "holds no model known here; its first keys are weight" in one_sentence(
        ["inspect", str(tmp_path / "some.safetensors")], capsys
    )
    assert "does not exist" in one_sentence(["inspect", str(tmp_path / "nowhere")], capsys)
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a .safetensors nor a .bin" in one_sentence(["inspect", str(tmp_path / "notes.txt")], capsys)
    copy = Path(shutil.copytree(GOLDEN / "ar", tmp_path / "ar"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    report = inspect(copy)
    assert any("misshapen keys" in problem for problem in report.problems)
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "lacks the config field or key 'hidden_size'" in one_sentence(["inspect", str(copy)], capsys)


def test_nothing_that_exists_is_overwritten(decoder: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "target.safetensors"
    target.write_text("mine")
    said = one_sentence(["convert", str(decoder), str(target), "--to", "nexus-gen"], capsys)
    assert "exists and is left alone" in said and target.read_text() == "mine"
    assert "end it in .safetensors or .bin" in one_sentence(
        ["convert", str(decoder), str(tmp_path / "folder"), "--to", "nexus-gen"], capsys
    )


def test_a_failed_conversion_leaves_nothing(decoder: Path, tmp_path: Path, monkeypatch) -> None:
    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        convert(decoder, tmp_path / "new.safetensors", "nexus-gen")
    assert sorted(tmp_path.iterdir()) == before


def test_inspection_of_safetensors_needs_no_torch(decoder: Path) -> None:
    code = (
        "import sys; from launch.cli import main; status = main(['models', 'inspect', sys.argv[1]]); "
        "assert 'torch' not in sys.modules; raise SystemExit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(decoder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "editing decoder, layout released" in done.stdout
