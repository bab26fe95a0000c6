"""The sized autoencoder: FLUX's keys and shapes, its shift and scale, and its sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from tiny_decoders import FLUX_1_VAE, VAES, randomised

from nexus_gen.decoders.checkpoint import load_vae, save_vae
from nexus_gen.flux.vae import FluxVae
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.fit import require_vae
from nexus_gen.tensors.headers import read_checkpoint


def test_full_size_has_the_keys_and_shapes_of_diffsynths_own():
    with torch.device("meta"):
        vae, encoder, decoder = FluxVae(FLUX_1_VAE), FluxVAEEncoder(), FluxVAEDecoder()
    for ours, theirs in ((vae.encoder, encoder), (vae.decoder, decoder)):
        shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert [type(block) for block in ours.blocks] == [type(block) for block in theirs.blocks]


@pytest.mark.parametrize("geometry", VAES)
@torch.no_grad()
def test_sizes_follow_the_number_of_resolutions(geometry):
    vae = randomised(FluxVae(geometry))
    assert geometry.downscale == 2 ** (len(geometry.channels) - 1)
    latents = vae.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert latents.shape == (2, 16, 16 // geometry.downscale, 24 // geometry.downscale)
    assert vae.decode(latents).shape == (2, 3, 16, 24)


@torch.no_grad()
def test_latents_are_the_shifted_and_scaled_mean_and_decoding_undoes_it():
    vae = randomised(FluxVae(VAES[0]))
    seen = {}
    vae.encoder.conv_out.register_forward_hook(lambda module, inputs, output: seen.update(moments=output))
    vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.update(entered=inputs[0]))
    latents = vae.encode(torch.rand(1, 3, 8, 8) * 2 - 1)
    mean = seen["moments"][:, :16]
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    vae.decode(latents)
    torch.testing.assert_close(seen["entered"], mean)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"\(10, 16\) pixels do not divide by 4"):
        FluxVae(VAES[1]).encode(torch.zeros(1, 3, 10, 16))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_groups": 5}, "vae.channels has 8, not a multiple of vae.norm_groups 5"),
        ({"latent_channels": 4}, "vae.latent_channels is 4; FLUX's autoencoder has 16"),
    ],
)
def test_a_geometry_that_does_not_fit_together_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        FluxVae(replace(VAES[0], **change))


@pytest.mark.parametrize(("key", "value"), [("scaling_factor", 1.5305), ("shift_factor", 0.0609)])
def test_an_autoencoder_of_the_same_shapes_and_another_scale_is_refused(key: str, value: float, tmp_path: Path) -> None:
    """SD3's has FLUX's shapes; only its config.json tells them apart."""
    save_vae(randomised(FluxVae(VAES[0])), tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "diffusers")
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    load_vae(tmp_path / "vae", VAES[0], torch.float32)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {key: value}))
    headers = read_checkpoint(tmp_path / "vae").shapes
    for use in (
        lambda: load_vae(tmp_path / "vae", VAES[0], torch.float32),
        lambda: require_vae(tmp_path / "vae", headers, VAES[0]),
    ):
        with pytest.raises(UserError, match=rf"config.json says {key} {value} where FLUX has .* another model"):
            use()
