"""What other programs put around a model's tensors is taken off or named, for every kind of model and every reader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import FLUXES, VAES, randomised
from torch import Tensor
from weights_on_disk import assert_same_state

from nexus_gen.commands.convert import convert
from nexus_gen.decoders.checkpoint import load_decoder, load_flux, load_vae, save_decoder, save_flux, save_vae
from nexus_gen.decoders.decoders import GenerationDecoder, build_generation_decoder
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.flux.vae import FluxVae
from nexus_gen.language.checkpoint import load_autoregressive, load_vision_tower
from nexus_gen.parts.inspection import inspect
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.names import is_lora, plain_names

GOLDEN = Path(__file__).parents[2] / "golden" / "ar"


def renamed(tensors: dict[str, Tensor], wrapped: str) -> dict[str, Tensor]:
    """wrapped: a prefix, or `PART>PART WRAPPER` for a wrapper inside."""
    if ">" not in wrapped:
        return {wrapped + key: tensor for key, tensor in tensors.items()}
    before, after = wrapped.split(">")
    return {key.replace(before, after): tensor for key, tensor in tensors.items()}


@pytest.fixture
def decoder() -> GenerationDecoder:
    return randomised(build_generation_decoder(FLUXES[0], 20))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "module.module.",
        "_fsdp_wrapped_module.",
        "adapter.>adapter._orig_mod.",
        "pipe.dit.single_blocks.1.>pipe.dit.single_blocks.1._checkpoint_wrapped_module._orig_mod.",
    ],
)
def test_a_wrapped_decoder_is_the_decoder(
    tmp_path: Path, decoder: GenerationDecoder, wrapped: str, suffix: str
) -> None:
    save_decoder(decoder, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    path = tmp_path / f"wrapped{suffix}"
    (torch.save if suffix == ".bin" else save_file)(renamed(plain, wrapped), path)
    report = inspect(path)
    assert report.whole and report.what == "generation decoder"
    assert all(wrapper in wrapped for wrapper in report.wrappers) and report.wrappers
    assert any("taken off" in line for line in report.lines())
    loaded = build_generation_decoder(FLUXES[0], 20)
    load_decoder(loaded, path)
    assert_same_state(loaded, decoder)
    convert(path, tmp_path / "again.safetensors", "released")
    assert load_file(tmp_path / "again.safetensors").keys() == plain.keys()


@pytest.mark.parametrize("wrapped", ["model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod."])
@pytest.mark.parametrize("layout", ["bfl", "diffusers", "nexus-gen"])
def test_a_wrapped_transformer_is_the_transformer(tmp_path: Path, layout, wrapped: str) -> None:
    model = randomised(FluxTransformer(FLUXES[1]))
    save_flux(model, tmp_path / "plain.safetensors", layout)
    save_file(renamed(load_file(tmp_path / "plain.safetensors"), wrapped), tmp_path / "wrapped.safetensors")
    assert inspect(tmp_path / "wrapped.safetensors").layout == layout
    assert_same_state(load_flux(tmp_path / "wrapped.safetensors", FLUXES[1], torch.float32), model)


@pytest.mark.parametrize("wrapped", ["first_stage_model.", "module.", "encoder.>encoder._orig_mod."])
def test_a_wrapped_autoencoder_is_the_autoencoder(tmp_path: Path, wrapped: str) -> None:
    model = randomised(FluxVae(VAES[0]))
    save_vae(model, tmp_path / "plain.safetensors")
    save_file(renamed(load_file(tmp_path / "plain.safetensors"), wrapped), tmp_path / "wrapped.safetensors")
    assert_same_state(load_vae(tmp_path / "wrapped.safetensors", VAES[0], torch.float32), model)


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "model.layers.>model.layers._orig_mod."])
def test_a_wrapped_language_model_is_the_language_model(tmp_path: Path, wrapped: str) -> None:
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "copy"))
    save_file(renamed(load_file(copy / "model.safetensors"), wrapped), copy / "model.safetensors")
    expected = load_autoregressive(GOLDEN, dtype=torch.float32)
    assert_same_state(load_autoregressive(copy, dtype=torch.float32), expected)
    assert_same_state(load_vision_tower(copy, dtype=torch.float32), expected.model.visual)


def test_names_of_models_are_left_alone() -> None:
    tied = ["model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"]
    assert plain_names(tied) == ({name: name for name in tied}, [])
    some = ["module.adapter.0.weight", "epoch"]
    assert plain_names(some)[1] == []


def test_two_state_dicts_in_one_file_are_refused(tmp_path: Path, decoder: GenerationDecoder) -> None:
    save_decoder(decoder, tmp_path / "both.safetensors")
    tensors = load_file(tmp_path / "both.safetensors")
    again = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | renamed(again, "_orig_mod."), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"both\.safetensors holds both _orig_mod\."):
        inspect(tmp_path / "both.safetensors")


LORAS = {
    "kohya": ["lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "lora_unet_double_blocks_0_img_mlp_0.alpha"],
    "peft": ["base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight"],
    "diffusers": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "BFL": ["double_blocks.0.img_attn.proj.lora_A.weight", "double_blocks.0.img_attn.proj.lora_B.weight"],
    "XLabs": ["double_blocks.0.processor.proj_lora1.down.weight"],
    "ComfyUI": ["diffusion_model.double_blocks.0.img_attn.proj.lora_up.weight"],
    "LyCORIS": ["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"],
    "differences": ["diffusion_model.double_blocks.0.img_attn.proj.diff", "diffusion_model.img_in.diff_b"],
    "orthogonal": ["oft_unet_double_blocks_0_img_attn_proj.oft_diag"],
    "of a language model": ["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
}


@pytest.mark.parametrize("writer", LORAS)
def test_a_lora_is_called_one(tmp_path: Path, writer: str) -> None:
    save_file({name: torch.zeros(4, 8) for name in LORAS[writer]}, tmp_path / "lora.safetensors")
    path = tmp_path / "lora.safetensors"
    for read in (
        inspect,
        lambda path: convert(path, tmp_path / "new.safetensors", "released"),
        lambda path: load_flux(path, FLUXES[0], torch.float32),
        lambda path: load_vae(path, VAES[0], torch.float32),
        lambda path: load_decoder(build_generation_decoder(FLUXES[0], 20), path),
    ):
        with pytest.raises(UserError, match=r"lora\.safetensors is a LoRA .*cannot be loaded as a model; merge it"):
            read(path)


def test_a_model_with_stray_lora_keys_is_no_lora() -> None:
    assert not is_lora(["pipe.dit.lora.weight", "adapter.0.weight", "adapter.0.bias"])
    assert not is_lora([])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.double_blocks.0.x", "vae.encoder.x"], "holds several models in one file"),
        (["net.double_blocks.0.x", "net.img_in.weight"], "begin with `net.`, and without it .* FLUX transformer"),
        (["state.ema.encoder.down.0.x"], "begin with `state.ema.`, and without it .* FLUX autoencoder"),
        (["double_blocks.0.img_attn.qkv.bias"], r"keys of a FLUX transformer and lacks the key 'img_in\.weight'"),
        (["model.language_model.norm.weight"], "keys of an autoregressive model and lacks the .* 'config.json'"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=message):
        inspect(tmp_path / "some.safetensors")


@pytest.mark.parametrize(
    ("extra", "how"),
    [
        ({"double_blocks.0.img_attn.proj.scale_weight": torch.ones(1)}, "ComfyUI's scaled float8"),
        ({"scaled_fp8": torch.zeros(2)}, "ComfyUI's scaled float8"),
        ({"double_blocks.0.img_attn.proj.weight_scale_inv": torch.ones(1)}, "weights with scales"),
        ({"double_blocks.0.img_attn.proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(3)}, "bitsandbytes"),
        ({"double_blocks.0.img_attn.proj.qweight": torch.zeros(2, dtype=torch.int32)}, "GPTQ, AWQ or SVDQuant"),
        ({"double_blocks.0.img_attn.proj.weight": torch.zeros(32, 32, dtype=torch.int8)}, "proj.weight is I8"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_quantised_weights_are_refused(tmp_path: Path, extra: dict[str, Tensor], how: str, suffix: str) -> None:
    save_flux(randomised(FluxTransformer(FLUXES[0])), tmp_path / "flux.safetensors")
    path = tmp_path / f"quantised{suffix}"
    (torch.save if suffix == ".bin" else save_file)(load_file(tmp_path / "flux.safetensors") | extra, path)
    for read in (inspect, lambda path: load_flux(path, FLUXES[0], torch.float32)):
        with pytest.raises(UserError, match=f"is quantised .*{how}.*give the publisher's bfloat16"):
            read(path)


def test_plain_float8_is_read(tmp_path: Path) -> None:
    model = randomised(FluxTransformer(FLUXES[0])).to(torch.float8_e4m3fn)
    save_flux(model, tmp_path / "flux.safetensors")
    assert inspect(tmp_path / "flux.safetensors").whole
    assert_same_state(load_flux(tmp_path / "flux.safetensors", FLUXES[0], torch.float32), model.float())


def test_a_dtype_that_torch_packs_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "packed.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match=r"holds x\.weight as F4, which is not read here; give the publisher's"):
        inspect(tmp_path / "packed.safetensors")


def test_a_config_that_speaks_of_quantisation_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    for read in (inspect, load_autoregressive, load_vision_tower):
        with pytest.raises(UserError, match=r"says that the weights are quantised \(awq\)"):
            read(copy)
