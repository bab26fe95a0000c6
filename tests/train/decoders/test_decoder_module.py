"""Noise per sample, losses over micro batches, and the learning rate."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_gen.decoders.decoders import build_generation_decoder
from nexus_gen.flux.flow_match import flow_match_loss, training_schedule
from nexus_gen.specs.geometry import FluxGeometry
from train.decoders.module import DecoderModule, learning_rate_factor, sample_noise
from train.schemas.common import OptimConfig
from train.schemas.decoders import DecoderObjective

FLUX = FluxGeometry(32, 2, 1, 2, 24, 16, [4, 6, 6], 16, 2)
EMBED_DIM = 20
SHAPE = (16, 4, 6)


def module(timesteps: str = "per_sample", seed: int = 7, **objective: Any) -> DecoderModule:
    torch.manual_seed(0)
    options = {"density": "uniform", "shift": 3.0, "weighting": "published", "condition_dropout": 0.0, **objective}
    return DecoderModule(
        build_generation_decoder(FLUX, EMBED_DIM),
        pooled=torch.randn(1, FLUX.pooled_dim),
        objective=DecoderObjective(timesteps, guidance=3.5, **options),
        optim=OptimConfig("adamw", 1e-3, 0.01, [0.9, 0.95], warmup_steps=2, schedule="cosine", max_grad_norm=1.0),
        seed=seed,
        max_steps=10,
        gradient_checkpointing=False,
        null_context=torch.randn(1, 5, FLUX.context_dim),
    )


def batch_of(*indices: int, epoch: int = 0) -> dict[str, Tensor]:
    """Samples as the loader stacks them: the tensors of a sample follow from its index."""
    generators = [torch.Generator().manual_seed(index) for index in indices]
    return {
        "latents": torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators]),
        "target_embeds": torch.stack([torch.randn(81, EMBED_DIM, generator=generator) for generator in generators]),
        "epoch": torch.full((len(indices),), epoch),
        "index": torch.tensor(indices),
    }


def test_noise_follows_from_seed_epoch_and_index_alone():
    timestep, noise, draw = sample_noise(7, 2, 5, SHAPE)
    sample_noise(7, 2, 6, SHAPE)
    again, same, same_draw = sample_noise(7, 2, 5, SHAPE)
    assert torch.equal(noise, same)
    assert (timestep, draw) == (again, same_draw)
    for other in ((8, 2, 5), (7, 3, 5), (7, 2, 6), (7, 5, 2)):
        assert not torch.equal(noise, sample_noise(*other, SHAPE)[1])


def drawn_by_hand(seed: int, epoch: int, index: int) -> tuple[int, Tensor, float]:
    """A generator of each sample and epoch: first the timestep, then the noise, then the number for its condition."""
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0]))
    timestep = int(torch.randint(1000, (1,), generator=generator))
    noise = torch.randn(*SHAPE, generator=generator)
    return timestep, noise, float(torch.rand(1, generator=generator))


def test_a_batch_draws_for_each_sample_in_the_order_of_the_first_version() -> None:
    drawn = module().draws(batch_of(4, 0, 9, epoch=2))
    for place, index in enumerate((4, 0, 9)):
        timestep, noise, _ = drawn_by_hand(7, 2, index)
        assert int(drawn["timestep_index"][place]) == timestep
        assert torch.equal(drawn["noise"][place], noise)
    shifted = module(shift=6.0).draws(batch_of(4, 0, 9, epoch=2))["timestep_index"]
    assert (shifted != drawn["timestep_index"]).any()  # of the density that was configured


def test_noise_is_normal_and_timesteps_cover_the_schedule():
    draws = [sample_noise(0, 0, index, SHAPE) for index in range(1500)]
    noise = torch.cat([noise for _, noise, _ in draws])
    timesteps = torch.cat([timestep for timestep, _, _ in draws]).float()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert 0 <= timesteps.min() < 20
    assert 980 <= timesteps.max() < 1000
    assert abs(timesteps.mean() - 500) < 25  # 3 standard errors are 22


def test_a_sample_meets_the_same_noise_in_whatever_batch():
    together = module().draws(batch_of(3, 1, 4, 2, epoch=1))
    apart = module().draws(batch_of(4, 9, epoch=1))
    for name in ("noise", "timestep_index"):
        assert torch.equal(together[name][2], apart[name][0])
    assert len(set(together["timestep_index"].tolist())) == 4


def test_per_batch_gives_all_samples_the_first_ones_timestep():
    shared = module("per_batch").draws(batch_of(3, 1, 4))
    own = module().draws(batch_of(3, 1, 4))
    assert shared["timestep_index"].tolist() == own["timestep_index"][:1].tolist() * 3
    assert torch.equal(shared["noise"], own["noise"])


def gradients(*batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean over equally large micro batches."""
    trained = module()
    for batch in batches:
        (trained.training_step(trained.draws(batch), 0) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in trained.decoder.named_parameters()}


def test_two_micro_batches_give_the_gradient_of_one():
    whole, halves = gradients(batch_of(0, 1, 2, 3)), gradients(batch_of(0, 1), batch_of(2, 3))
    for name, gradient in whole.items():
        # Measured: 2e-7 absolute, where the largest gradients are 1e-1.
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in whole.values()), "a parameter that nothing trains"


def test_training_step_is_the_flow_matching_loss_and_adds_up():
    trained = module()
    batch = trained.draws(batch_of(0, 1, 2))
    loss = trained.training_step(batch, 0)

    def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
        return trained.decoder(noisy, timestep, torch.full((3,), 3.5), trained._pooled, batch["target_embeds"])

    expected = flow_match_loss(velocity, batch["latents"], batch["noise"], batch["timestep_index"])
    torch.testing.assert_close(loss, expected.mean())
    schedule = training_schedule()
    by_hand = []
    for place, index in enumerate(batch["timestep_index"].tolist()):
        sigma, own = float(schedule.sigmas[index]), batch["latents"][place]
        noisy = (1 - sigma) * own + sigma * batch["noise"][place]
        predicted = trained.decoder(
            noisy[None],
            torch.tensor([1000 * sigma]),
            torch.tensor([3.5]),
            trained._pooled,
            batch["target_embeds"][place : place + 1],
        )[0]
        error = ((predicted - (batch["noise"][place] - own)) ** 2).mean()
        by_hand.append(float(schedule.weights[index] * error.detach()))
    assert float(loss) == pytest.approx(sum(by_hand) / 3, rel=1e-4)
    trained.training_step(batch, 1)
    torch.testing.assert_close(trained.loss_sum, 2 * loss.detach())


@torch.no_grad()
def test_the_configured_weighting_is_that_of_the_loss() -> None:
    batch = module().draws(batch_of(0, 1, 2))
    plain, published, shifted = (
        module(**options).loss_per_sample(batch) for options in ({"weighting": "none"}, {}, {"shift": 6.0})
    )
    weights = training_schedule().weights[batch["timestep_index"]]
    torch.testing.assert_close(published, plain * weights)
    ratio = shifted / published  # of the means of the weights: noisier levels, which weigh less, are drawn more often
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert float(ratio[0]) > 1.05


@pytest.mark.parametrize("schedule, values", [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
])  # fmt: skip
def test_schedules_at_their_corners(schedule, values):
    steps = (0, 1, 2, 6, 10)
    assert [learning_rate_factor(step, 2, 10, schedule) for step in steps] == pytest.approx(values)


def test_cosine_falls_slowly_first_and_no_warmup_starts_at_the_top():
    assert learning_rate_factor(4, 2, 10, "cosine") == pytest.approx(0.853553, abs=1e-6)
    assert learning_rate_factor(4, 2, 10, "linear") == pytest.approx(0.75)
    assert learning_rate_factor(0, 0, 10, "cosine") == 1.0


def test_optimizer_holds_every_parameter_and_the_configured_rates():
    trained = module()
    configured = trained.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trained.parameters()))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3 * (1 + math.cos(math.pi / 8)) / 2])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.95), 0.01, 1e-8)
    assert isinstance(optimizer, torch.optim.AdamW) and configured["lr_scheduler"]["interval"] == "step"


def test_conditions_are_dropped_by_sample_at_the_configured_rate() -> None:
    numbers = [drawn_by_hand(7, 0, index)[2] for index in range(64)]
    for rate, count in ((0.0, 0), (0.25, 14), (0.5, 36), (1.0, 64)):
        dropped = module(condition_dropout=rate).draws(batch_of(*range(64)))["dropped"]
        assert dropped == [index for index, number in enumerate(numbers) if number < rate] and len(dropped) == count
    first = next(index for index, number in enumerate(numbers) if number < 0.25)
    assert module(condition_dropout=0.25).draws(batch_of(first))["dropped"] == [0]


@torch.no_grad()
def test_a_dropped_condition_is_the_text_of_the_empty_prompt() -> None:
    trained = module()
    batch = {**trained.draws(batch_of(0, 1, 2)), "dropped": [1]}
    losses = trained.loss_per_sample(batch)
    other = {**batch, "target_embeds": batch["target_embeds"] + 1}
    assert trained.loss_per_sample(other)[1] == pytest.approx(float(losses[1]), rel=1e-5)
    assert trained.loss_per_sample({**batch, "dropped": []})[0] == pytest.approx(float(losses[0]), rel=1e-5)

    def negative(noisy: Tensor, timestep: Tensor) -> Tensor:  # as sampling asks with guidance
        context = trained._null_context.expand(3, -1, -1)
        return trained.decoder.transformer(noisy, timestep, context, trained._pooled, torch.full((3,), 3.5))

    expected = flow_match_loss(negative, batch["latents"], batch["noise"], batch["timestep_index"])
    assert losses[1] == pytest.approx(float(expected[1]), rel=1e-5)


def test_the_conditioner_gets_gradients_where_all_conditions_are_dropped() -> None:
    trained = module()
    batch = {**trained.draws(batch_of(0, 1)), "dropped": [0, 1]}
    trained.training_step(batch, 0).backward()
    assert all(parameter.grad is not None for parameter in trained.decoder.adapter.parameters())


class Recording(torch.nn.Module):
    """A decoder that keeps what it is conditioned on."""

    def forward(self, noisy: Tensor, timestep: Tensor, guidance: Tensor, pooled: Tensor, *embeds: Tensor, **_: Any):
        self.called_with = (timestep, guidance, embeds)
        return noisy


@pytest.mark.parametrize("reference", [True, False, None])
def test_an_editing_decoder_sees_its_source_unless_it_is_to_edit_blindly(reference: bool | None) -> None:
    trained = module()
    trained.decoder = recording = Recording()
    transformer = SimpleNamespace(x_embedder=torch.nn.Linear(1, 1))
    object.__setattr__(recording, "transformer", transformer)
    if reference is not None:
        trained.objective = SimpleNamespace(reference=reference, guidance=2.5, condition_dropout=0.0)
    batch = {**batch_of(0, 1), "source_embeds": torch.randn(2, 324, EMBED_DIM)}
    noisy, timestep = torch.randn(2, *SHAPE), torch.tensor([900.0, 30.0])
    assert torch.equal(trained.velocity(batch)(noisy, timestep), noisy)
    found, guidance, embeds = recording.called_with
    assert torch.equal(found, timestep) and guidance.tolist() == [3.5 if reference is None else 2.5] * 2
    expected = [batch["target_embeds"], *([] if reference is False else [batch["source_embeds"]])]
    assert len(embeds) == len(expected) and all(map(torch.equal, embeds, expected))
