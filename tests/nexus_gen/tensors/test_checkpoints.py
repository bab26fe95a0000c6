"""Every layout there and back to the bit, the modulation's order by what it computes, and files that must be refused.

diffsynth's converters, which read each layout into the same names as ours, are the independent witnesses.
"""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from diffsynth.models.general_modules import AdaLayerNorm
from diffsynth.utils.state_dict_converters.flux_dit import (
    FluxDiTStateDictConverter,
    FluxDiTStateDictConverterFromDiffusers,
)
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEDecoderStateDictConverterDiffusers,
    FluxVAEEncoderStateDictConverter,
    FluxVAEEncoderStateDictConverterDiffusers,
)
from safetensors.torch import load_file, save_file
from tiny_decoders import FLUX_1_DEV, FLUXES, PROJECTOR, VAES, flux_inputs, randomised
from torch import Tensor, nn
from weights_on_disk import Malicious, assert_same_state, read_raw

from nexus_gen.decoders.checkpoint import load_decoder, load_flux, load_vae, save_decoder, save_flux, save_vae
from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.flux.vae import FluxVae
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.layouts import Layout, decoder_sources, flux_sources
from nexus_gen.tensors.translation import translate

LAYOUTS: list[Layout] = ["bfl", "diffusers", "nexus-gen"]


# ---- round trips


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("geometry", FLUXES)
def test_flux_there_and_back(tmp_path, geometry, layout, suffix):
    model = randomised(FluxTransformer(geometry))
    path = tmp_path / f"flux{suffix}"
    save_flux(model, path, layout)
    assert_same_state(load_flux(path, geometry, torch.float32), model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", VAES)
def test_vae_there_and_back(tmp_path, geometry, layout):
    model = randomised(FluxVae(geometry))
    save_vae(model, tmp_path / "ae.safetensors", layout)
    assert_same_state(load_vae(tmp_path / "ae.safetensors", geometry, torch.float32), model)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("flux", FLUXES)
@pytest.mark.parametrize("kind", ["generation", "editing"])
def test_decoders_there_and_back(tmp_path, flux, kind, suffix):
    def build() -> nn.Module:
        return build_generation_decoder(flux, 20) if kind == "generation" else build_editing_decoder(flux, PROJECTOR)

    model = randomised(build())
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    save_decoder(model, first)
    with torch.device("meta"):
        loaded = build()
    load_decoder(loaded, first)
    assert_same_state(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    save_decoder(loaded, second)
    assert read_raw(first).keys() == read_raw(second).keys()
    for key, value in read_raw(first).items():
        assert torch.equal(value, read_raw(second)[key]), key


# ---- names and contents as others read them


def test_bfl_names_at_full_size_are_those_that_diffsynth_reads():
    with torch.device("meta"):
        keys = list(FluxTransformer(FLUX_1_DEV).state_dict())
    names = {source.keys[0]: key for key, source in flux_sources(keys, "bfl").items()}
    assert len(names) == len(keys) == 780
    assert {"double_blocks.18.img_attn.norm.query_norm.scale", "single_blocks.37.linear1.bias"} < names.keys()
    assert FluxDiTStateDictConverter(names) == {key: key for key in keys}


@pytest.mark.parametrize("geometry", FLUXES)
def test_bfl_and_diffusers_contents_are_those_that_diffsynth_reads(geometry):
    state = randomised(FluxTransformer(geometry)).state_dict()
    bfl = FluxDiTStateDictConverter(translate(state, flux_sources(state, "bfl")))
    # Its converter swaps the modulation at width 3072 only; at these widths it shows what the file holds.
    diffusers = FluxDiTStateDictConverterFromDiffusers(translate(state, flux_sources(state, "diffusers")))
    for read in (bfl, diffusers):
        assert read.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(bfl[key], value), key
        in_file = torch.cat(value.chunk(2)[::-1]) if key.startswith("final_norm_out.") else value
        assert torch.equal(diffusers[key], in_file), key


def test_modulation_at_full_width_is_what_diffsynth_reads():
    ours = {"final_norm_out.linear.bias": torch.arange(2 * 3072.0)}
    diffusers = translate(ours, flux_sources(ours, "diffusers"))
    assert torch.equal(
        FluxDiTStateDictConverterFromDiffusers(diffusers)["final_norm_out.linear.bias"], next(iter(ours.values()))
    )
    released = translate(
        {f"transformer.{key}": value for key, value in ours.items()},
        decoder_sources(["transformer.final_norm_out.linear.bias"]),
    )
    assert torch.equal(FluxDiTStateDictConverter(released)["final_norm_out.linear.bias"], next(iter(ours.values())))


def test_vae_contents_are_those_that_diffsynth_reads(tmp_path):
    """Its converters know four resolutions and two residual blocks, of any width."""
    geometry = VAES[2]
    model = randomised(FluxVae(geometry))
    for layout, encoder_reader, decoder_reader in (
        ("bfl", FluxVAEEncoderStateDictConverter, FluxVAEDecoderStateDictConverter),
        ("diffusers", FluxVAEEncoderStateDictConverterDiffusers, FluxVAEDecoderStateDictConverterDiffusers),
    ):
        save_vae(model, tmp_path / "ae.safetensors", layout)
        raw = load_file(tmp_path / "ae.safetensors")
        assert len(raw) == len(model.state_dict())
        for half, reader in ((model.encoder, encoder_reader), (model.decoder, decoder_reader)):
            read = reader(raw)
            assert read.keys() == half.state_dict().keys()
            for key, value in half.state_dict().items():
                assert torch.equal(read[key].reshape(value.shape), value), (layout, key)


def test_diffusers_attention_of_the_vae_is_a_matrix(tmp_path):
    save_vae(FluxVae(VAES[0]), tmp_path / "ae.safetensors", "diffusers")
    raw = load_file(tmp_path / "ae.safetensors")
    assert raw["encoder.mid_block.attentions.0.to_q.weight"].shape == (16, 16)
    assert raw["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (16, 16)


# ---- the modulation's order, by output: what wrote the released files computes (scale, shift), as diffusers does


class ScaleShiftNorm(AdaLayerNorm):
    """The final norm as the readers of (scale, shift) compute it; same keys as ours."""

    def __init__(self, width: int) -> None:
        super().__init__(width, single=True)


def as_scale_shift_reader(geometry, state: dict[str, Tensor]) -> FluxTransformer:
    model = FluxTransformer(geometry)
    model.final_norm_out = ScaleShiftNorm(geometry.hidden_size)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("geometry", FLUXES)
@torch.no_grad()
def test_exported_decoder_computes_the_same_where_scale_comes_first(tmp_path, geometry):
    model = randomised(build_generation_decoder(geometry, 20))
    save_decoder(model, tmp_path / "generation_decoder.bin")
    raw = read_raw(tmp_path / "generation_decoder.bin")
    released = {key.removeprefix("pipe.dit."): value for key, value in raw.items() if key.startswith("pipe.dit.")}
    inputs = flux_inputs(geometry, batch_size=2)
    expected = model.transformer(**inputs)
    theirs = as_scale_shift_reader(geometry, released)(**inputs)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)  # worst seen: equal
    unswapped = FluxTransformer(geometry)
    unswapped.load_state_dict(released)
    assert (unswapped(**inputs) - expected).abs().max() > 0.1, "the file holds the order that our model computes with"


@pytest.mark.parametrize("geometry", FLUXES)
@torch.no_grad()
def test_imported_decoder_computes_what_a_scale_first_model_did(tmp_path, geometry):
    theirs = FluxTransformer(geometry)
    theirs.final_norm_out = ScaleShiftNorm(geometry.hidden_size)
    randomised(theirs)
    model = randomised(build_generation_decoder(geometry, 20), seed=1)
    released = {f"pipe.dit.{key}": value for key, value in theirs.state_dict().items()}
    released |= {f"adapter.{key}": value for key, value in model.adapter.state_dict().items()}
    save_file(released, tmp_path / "generation_decoder.safetensors")
    load_decoder(model, tmp_path / "generation_decoder.safetensors")
    inputs = flux_inputs(geometry, batch_size=2)
    torch.testing.assert_close(model.transformer(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)  # worst seen: equal


@torch.no_grad()
def test_all_layouts_of_one_transformer_compute_alike(tmp_path):
    geometry = FLUXES[0]
    model = randomised(FluxTransformer(geometry))
    inputs = flux_inputs(geometry, batch_size=2)
    for layout in LAYOUTS:
        save_flux(model, tmp_path / "flux.safetensors", layout)
        assert torch.equal(load_flux(tmp_path / "flux.safetensors", geometry, torch.float32)(**inputs), model(**inputs))


# ---- directories, dtypes


def test_flux_directory_with_bfl_files_or_with_diffusers_folders(tmp_path):
    flux, vae = randomised(FluxTransformer(FLUXES[0])), randomised(FluxVae(VAES[0]))
    save_flux(flux, tmp_path / "bfl" / "flux1-dev.safetensors", "bfl")
    save_vae(vae, tmp_path / "bfl" / "ae.safetensors", "bfl")
    state = flux.state_dict()
    tensors = translate(state, flux_sources(state, "diffusers"))
    shards = {"a.safetensors": dict(list(tensors.items())[::2]), "b.safetensors": dict(list(tensors.items())[1::2])}
    folder = tmp_path / "diffusers" / "transformer"
    folder.mkdir(parents=True)
    for name, shard in shards.items():
        save_file(shard, folder / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_vae(vae, tmp_path / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors", "diffusers")
    for directory in (tmp_path / "bfl", tmp_path / "diffusers"):
        assert_same_state(load_flux(directory, FLUXES[0], torch.float32), flux)
        assert_same_state(load_vae(directory, VAES[0], torch.float32), vae)
    assert_same_state(load_flux(folder, FLUXES[0], torch.float32), flux)


def test_weights_arrive_in_the_dtype_asked_for(tmp_path):
    save_flux(FluxTransformer(FLUXES[0]), tmp_path / "flux.safetensors")
    loaded = load_flux(tmp_path / "flux.safetensors", FLUXES[0], torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    model = build_generation_decoder(FLUXES[0], 20)
    save_decoder(model, tmp_path / "decoder.safetensors")
    load_decoder(model, tmp_path / "decoder.safetensors", dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_an_export_holds_the_tensors_and_not_what_they_are_views_of(tmp_path):
    model = build_generation_decoder(FLUXES[0], 20)
    save_decoder(model, tmp_path / "plain.bin")
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    offset = 0
    for parameter in model.parameters():  # as sharding engines hold them: views of one buffer
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    save_decoder(model, tmp_path / "views.bin")
    assert os.path.getsize(tmp_path / "views.bin") == os.path.getsize(tmp_path / "plain.bin")


# ---- files that do not fit


@pytest.fixture
def decoder_file(tmp_path) -> tuple[nn.Module, Path, dict[str, Tensor]]:
    model = build_generation_decoder(FLUXES[0], 20)
    path = tmp_path / "generation_decoder.safetensors"
    save_decoder(model, path)
    return model, path, load_file(path)


def test_missing_unexpected_and_misshapen_keys_are_named_together(decoder_file):
    model, path, tensors = decoder_file
    for key in [key for key in tensors if key.startswith("pipe.dit.blocks.0.attn.")]:
        del tensors[key]
    tensors["pipe.dit.lora.weight"] = torch.zeros(1)
    tensors["adapter.0.weight"] = torch.zeros(24, 21)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        load_decoder(model, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "12 missing keys (" in message
    assert "pipe.dit.blocks.0.attn.a_to_qkv.weight" in message
    assert message.count("attn.") == 4
    assert "1 unexpected key (pipe.dit.lora.weight)" in message
    assert "1 misshapen key (adapter.0.weight is (24, 21) instead of (24, 20))" in message


def test_an_editing_file_is_not_a_generation_file(decoder_file, tmp_path):
    model, _, _ = decoder_file
    save_decoder(build_editing_decoder(FLUXES[0], PROJECTOR), tmp_path / "edit_decoder.safetensors")
    with pytest.raises(UserError, match=r"missing keys \(adapter.0.weight.*unexpected keys \(embedding_merger"):
        load_decoder(model, tmp_path / "edit_decoder.safetensors")


def test_flux_of_another_width_is_refused(tmp_path):
    save_flux(FluxTransformer(FLUXES[0]), tmp_path / "flux.safetensors", "diffusers")
    with pytest.raises(UserError, match=r"misshapen keys \(.*\(32, 32\) instead of \(48, 48\)"):
        load_flux(tmp_path / "flux.safetensors", FLUXES[1], torch.float32)


def test_a_file_of_no_known_layout_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="holds no model known here; its first keys are weight"):
        load_flux(tmp_path / "flux.safetensors", FLUXES[0], torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_truncated_file_is_refused(decoder_file, tmp_path, suffix, keep):
    model, _, _ = decoder_file
    path = tmp_path / f"truncated{suffix}"
    save_decoder(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"truncated.* is not a whole") as caught:
        load_decoder(model, path)
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_about_its_length_is_refused(decoder_file, tmp_path):
    model, _, _ = decoder_file
    (tmp_path / "lying.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_decoder(model, tmp_path / "lying.safetensors")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(decoder_file, tmp_path, writer):
    model, _, _ = decoder_file
    path, trace = tmp_path / "edit_decoder.bin", tmp_path / "executed"
    payload = {"adapter.0.weight": Malicious(trace)}
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match=r"edit_decoder.bin (holds more than tensors|is not a whole torch file)"):
        load_decoder(model, path)
    assert not trace.exists()


def test_a_torch_file_of_something_else_is_refused(decoder_file, tmp_path):
    model, _, _ = decoder_file
    torch.save({"state_dict": {"adapter.0.weight": torch.zeros(1)}}, tmp_path / "nested.bin")
    with pytest.raises(UserError, match=r"nested.bin does not map names to tensors.*safetensors.torch.save_file"):
        load_decoder(model, tmp_path / "nested.bin")


def test_absent_and_misnamed_files_are_refused(decoder_file, tmp_path):
    model, path, _ = decoder_file
    with pytest.raises(UserError, match=r"absent.safetensors does not exist"):
        load_decoder(model, tmp_path / "absent.safetensors")
    path.rename(tmp_path / "decoder.ckpt")
    with pytest.raises(UserError, match=r"decoder.ckpt is neither a .safetensors nor a .bin file"):
        load_decoder(model, tmp_path / "decoder.ckpt")
    with pytest.raises(UserError, match=r"name it .safetensors or .bin"):
        save_decoder(model, tmp_path / "decoder.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds 0 .safetensors files and no index"):
        load_flux(tmp_path / "empty", FLUXES[0], torch.float32)


def test_an_index_that_promises_too_much_is_refused(decoder_file, tmp_path):
    model, _, tensors = decoder_file
    directory = tmp_path / "sharded"
    directory.mkdir()
    first = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != first}, directory / "a.safetensors")
    index = directory / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    with pytest.raises(UserError, match=f"a.safetensors lacks {first}, which its index lists"):
        load_decoder(model, directory)
    index.write_text("{")
    with pytest.raises(UserError, match="is not a readable index"):
        load_decoder(model, directory)


def test_a_failed_save_leaves_the_old_file(decoder_file, monkeypatch):
    model, path, _ = decoder_file
    before = path.read_bytes()

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_decoder(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
