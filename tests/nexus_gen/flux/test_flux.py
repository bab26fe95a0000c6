"""The sized transformer: FLUX.1-dev's keys and shapes, and a forward that treats every sample alone."""

from dataclasses import replace

import pytest
import torch
from diffsynth.models.flux_dit import FluxDiT
from tiny_decoders import FLUX_1_DEV, FLUXES, flux_inputs, randomised

from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.specs.errors import UserError


def test_full_size_has_the_keys_and_shapes_of_diffsynths_own():
    with torch.device("meta"):
        ours, theirs = FluxTransformer(FLUX_1_DEV).state_dict(), FluxDiT().state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert sum(value.numel() for value in ours.values()) == 11_901_408_320


@pytest.mark.parametrize("geometry", FLUXES)
@torch.no_grad()
def test_each_sample_of_a_batch_is_computed_alone(geometry):
    model = randomised(FluxTransformer(geometry))
    inputs = flux_inputs(geometry, batch_size=3, size=(6, 10))
    together = model(**inputs)
    assert together.shape == inputs["latents"].shape
    for sample in range(3):
        alone = model(**{name: value[sample : sample + 1] for name, value in inputs.items()})
        torch.testing.assert_close(
            alone[0], together[sample], rtol=1e-4, atol=1e-5
        )  # worst: 5.7e-6 beside values of 9.7


@torch.no_grad()
def test_every_input_reaches_the_output():
    geometry = FLUXES[0]
    model = randomised(FluxTransformer(geometry))
    inputs = flux_inputs(geometry, batch_size=1)
    inputs["text_ids"] = torch.zeros(1, 5, 3)
    reference = model(**inputs)
    for name, value in inputs.items():
        moved = model(**{**inputs, name: value + torch.arange(value.numel()).reshape(value.shape) * 0.3 + 0.3})
        assert (moved - reference).abs().max() > 1e-4, name


@torch.no_grad()
def test_text_ids_default_to_zeros_and_one_pooled_row_serves_a_batch():
    model = randomised(FluxTransformer(FLUXES[1]))
    inputs = flux_inputs(FLUXES[1], batch_size=2)
    inputs["pooled"] = inputs["pooled"][:1]
    explicit = model(**{**inputs, "pooled": inputs["pooled"].expand(2, -1), "text_ids": torch.zeros(2, 5, 3)})
    torch.testing.assert_close(model(**inputs), explicit, rtol=1e-4, atol=1e-4)  # worst: 1.9e-6


def test_gradient_checkpointing_changes_no_gradient():
    model = randomised(FluxTransformer(FLUXES[0]))
    inputs = flux_inputs(FLUXES[0], batch_size=2)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model(**inputs, gradient_checkpointing=checkpointing).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
def test_timesteps_keep_float32_beside_bfloat16_latents():
    """bfloat16 cannot tell 999 from 1000, so the transformer must not take the timestep in the latents' dtype."""
    model = randomised(FluxTransformer(FLUXES[0])).bfloat16()
    inputs = {name: value.bfloat16() for name, value in flux_inputs(FLUXES[0], batch_size=1).items()}
    outputs = [model(**{**inputs, "timestep": torch.tensor([timestep])}) for timestep in (997.0, 1000.0)]
    assert outputs[0].dtype == torch.bfloat16
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "32 is not a multiple of flux.num_heads 5"),
        ({"rope_axes_dim": [4, 4, 4]}, r"\[4, 4, 4\] must be three numbers that sum to hidden_size / num_heads = 16"),
        ({"patch_size": 4}, "flux.patch_size is 4; FLUX's blocks take 2"),
    ],
)
def test_a_geometry_that_does_not_fit_together_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        FluxTransformer(replace(FLUXES[0], **change))
