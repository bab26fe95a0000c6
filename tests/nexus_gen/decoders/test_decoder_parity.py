"""Both decoders against vectors that the published code computed, in float32 on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus_gen.decoders.checkpoint import load_decoder
from nexus_gen.decoders.conditioning import REFERENCE, TARGET, editing_text_ids, projector_position_ids
from nexus_gen.decoders.decoders import (
    EditingDecoder,
    GenerationDecoder,
    build_editing_decoder,
    build_generation_decoder,
)
from nexus_gen.flux.flow_match import add_noise, euler_sample, flow_match_loss, training_schedule, velocity_target
from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry
from nexus_gen.tensors.files import save_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "decoder"
TOLERANCE = 1e-4  # relative to the largest value; the worst measured is 2.5e-7, an editing context


def relative_error(ours: Tensor, published: Tensor) -> float:
    assert ours.shape == published.shape
    return ((ours - published).abs().max() / published.abs().max()).item()


def grad_norm(module: nn.Module) -> Tensor:
    return torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm()[None]


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(GOLDEN / "case.safetensors")


@pytest.fixture(scope="module")
def flux() -> FluxGeometry:
    config = json.loads((GOLDEN / "config.json").read_text())["dit"]
    return FluxGeometry(
        num_heads=config["num_attention_heads"],
        **{name: config[name] for name in FluxGeometry.__dataclass_fields__ if name != "num_heads"},
    )


@pytest.fixture(scope="module")
def generation(flux: FluxGeometry, case: dict[str, Tensor]) -> GenerationDecoder:
    with torch.device("meta"):
        model = build_generation_decoder(flux, embed_dim=case["target_embeds"].shape[-1])
    load_decoder(model, GOLDEN / "generation_decoder.safetensors")
    return model


@pytest.fixture(scope="module")
def editing(flux: FluxGeometry, tmp_path_factory: pytest.TempPathFactory) -> EditingDecoder:
    """The golden files hold the merger apart from the transformer, which both decoders share; join them as released."""
    config = json.loads((GOLDEN / "config.json").read_text())["projector"]
    projector = ProjectorGeometry(
        num_heads=config["num_attention_heads"],
        **{name: config[name] for name in ProjectorGeometry.__dataclass_fields__ if name != "num_heads"},
    )
    released = load_file(GOLDEN / "edit_decoder_merger_only.safetensors")
    transformer = load_file(GOLDEN / "generation_decoder.safetensors")
    released.update({key: value for key, value in transformer.items() if key.startswith("pipe.dit.")})
    path = tmp_path_factory.mktemp("released") / "edit_decoder.safetensors"
    save_tensors(released, path)
    with torch.device("meta"):
        model = build_editing_decoder(flux, projector)
    load_decoder(model, path)
    return model


@pytest.fixture(params=["generation", "editing"])
def decoder(request: pytest.FixtureRequest, case: dict[str, Tensor]) -> tuple[str, nn.Module, Callable[..., Tensor]]:
    """(name in the golden file, the decoder, its velocity under the golden conditions)."""
    model = request.getfixturevalue(request.param)
    source = case["reference_embeds"] if request.param == "editing" else None

    def velocity(latents: Tensor, timestep: Tensor, guidance: Tensor = case["guidance"]) -> Tensor:
        return model(latents, timestep, guidance, case["pooled_prompt_embeds"], case["target_embeds"], source)

    return request.param, model, velocity


def test_position_and_text_ids_are_equal(case):
    size = tuple(case["latents"].shape[-2:])
    assert torch.equal(projector_position_ids(TARGET), case["editing.position_ids_target"])
    assert torch.equal(projector_position_ids(REFERENCE), case["editing.position_ids_reference"])
    assert torch.equal(editing_text_ids(size, with_reference=True), case["editing.text_ids"])
    assert torch.equal(editing_text_ids(size, with_reference=False), case["editing.text_ids_without_reference"])


def test_contexts(case, generation, editing):
    merger = editing.embedding_merger
    target, reference = case["target_embeds"], case["reference_embeds"]
    contexts = {
        "generation.context": generation.adapter(target),  # equal
        "editing.context": merger(target, reference),  # 2.5e-7
        "editing.context_without_reference": merger(target),  # 1.8e-7
    }
    for name, context in contexts.items():
        assert relative_error(context, case[name]) < TOLERANCE, name


def test_noise_and_target(case):
    step = training_schedule().at(case["timestep_index"])
    assert torch.equal(step.timesteps, case["timestep"])
    assert torch.equal(step.weights, case["timestep_weight"])
    assert torch.equal(add_noise(case["latents"], case["noise"], step.sigmas), case["noisy_latents"])
    assert torch.equal(velocity_target(case["latents"], case["noise"]), case["velocity_target"])


def test_velocities(case, decoder):
    name, _, velocity = decoder
    prediction = velocity(case["noisy_latents"], case["timestep"])
    assert relative_error(prediction, case[f"{name}.prediction"]) < TOLERANCE  # 2.0e-7


def test_losses_and_gradient_norms(case, decoder):
    name, model, velocity = decoder
    model.zero_grad()
    loss = flow_match_loss(velocity, case["latents"], case["noise"], case["timestep_index"])
    loss.sum().backward()
    assert relative_error(loss, case[f"{name}.loss"]) < TOLERANCE  # 8.1e-8
    conditioning = model.adapter if name == "generation" else model.embedding_merger
    published = "adapter" if name == "generation" else "merger"
    assert relative_error(grad_norm(model.transformer), case[f"{name}.grad_norm.dit"]) < TOLERANCE  # equal
    assert relative_error(grad_norm(conditioning), case[f"{name}.grad_norm.{published}"]) < TOLERANCE  # 1.1e-7


def test_six_euler_steps(case, decoder):
    name, _, velocity = decoder
    latents = euler_sample(velocity, case["noise"], num_steps=6)
    assert relative_error(latents, case[f"{name}.sampled_latents_6_steps"]) < TOLERANCE  # 5.6e-8


@torch.no_grad()
def test_batches_and_wide_latents_are_each_sample_alone(case, decoder):
    _, model, _ = decoder
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, 10, generator=generator)
    target = torch.randn(2, 81, 64, generator=generator)
    source = torch.randn(2, 324, 64, generator=generator) if isinstance(model, EditingDecoder) else None
    timestep, guidance = torch.tensor([900.0, 100.0]), torch.tensor([3.5, 2.0])
    pooled = case["pooled_prompt_embeds"]
    together = model(latents, timestep, guidance, pooled, target, source)
    for i in range(2):
        one = slice(i, i + 1)
        alone = model(
            latents[one], timestep[one], guidance[one], pooled, target[one], None if source is None else source[one]
        )
        assert relative_error(together[one], alone) < 1e-5  # worst: 4.2e-7


@torch.no_grad()
def test_rounded_positions_move_bfloat16_alone(case, flux):
    """As published, ids follow the latents' dtype: no effect in float32, a visible one in bfloat16."""
    config = ProjectorGeometry(64, 128, 4, 2, [2, 3, 3], 1e6, 1e-6)
    outputs = {}
    for round_positions in (True, False):
        torch.manual_seed(0)
        model = build_editing_decoder(flux, config, round_positions)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [
                case[name].to(dtype) for name in ("noisy_latents", "timestep", "guidance", "pooled_prompt_embeds")
            ]
            embeds = [case[name].to(dtype) for name in ("target_embeds", "reference_embeds")]
            outputs[round_positions, dtype] = model.to(dtype)(*inputs, *embeds)
    assert torch.equal(outputs[True, torch.float32], outputs[False, torch.float32])
    assert outputs[True, torch.bfloat16].dtype == torch.bfloat16
    assert not torch.equal(outputs[True, torch.bfloat16], outputs[False, torch.bfloat16])
    assert relative_error(outputs[False, torch.bfloat16].float(), outputs[False, torch.float32]) < 0.1  # 0.045
