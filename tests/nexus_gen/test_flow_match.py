"""The schedule, to the bit, and the arithmetic around it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus_gen.flow_match import (
    NUM_TRAIN_TIMESTEPS,
    TimestepDensity,
    add_noise,
    euler_sample,
    flow_match_loss,
    sample_timesteps,
    sampling_sigmas,
    training_schedule,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "flow_match_schedule.safetensors")


def test_training_tables_equal_the_published_ones():
    schedule = training_schedule()
    assert torch.equal(schedule.sigmas, GOLDEN["train_sigmas"])
    assert torch.equal(schedule.timesteps, GOLDEN["train_timesteps"])
    assert torch.equal(schedule.weights, GOLDEN["train_weights"])


@pytest.mark.parametrize("num_steps", [30, 50])
def test_sampling_tables_equal_the_published_ones(num_steps):
    sigmas = sampling_sigmas(num_steps)
    assert torch.equal(sigmas[:-1], GOLDEN[f"sigmas_{num_steps}"])
    assert sigmas[-1] == 0
    timesteps = []
    euler_sample(lambda x, t, g: timesteps.append(t) or x, torch.zeros(2, 1, 2, 2), num_steps)
    assert torch.equal(torch.stack(timesteps), GOLDEN[f"timesteps_{num_steps}"][:, None].expand(-1, 2))


def test_schedule_is_the_shifted_line():
    line = torch.linspace(1, 0.003 / 1.002, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    schedule = training_schedule()
    torch.testing.assert_close(schedule.sigmas.double(), 3 * line / (1 + 2 * line), rtol=1e-6, atol=0)
    assert schedule.weights.mean().item() == pytest.approx(1)
    assert schedule.weights[0] == 0


def test_timesteps_are_uniform_repeatable_and_one_per_sample():
    draw = sample_timesteps(20_000, torch.Generator().manual_seed(3))
    assert torch.equal(draw, sample_timesteps(20_000, torch.Generator().manual_seed(3)))
    counts = torch.histc(draw.float(), bins=10, min=0, max=NUM_TRAIN_TIMESTEPS)
    assert counts.sum() == 20_000
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations


def test_noise_is_added_to_every_sample_at_its_own_level():
    x0, noise = torch.randn(3, 4, 2, 6), torch.randn(3, 4, 2, 6)
    noisy = add_noise(x0, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(noisy[0], x0[0])
    assert torch.equal(noisy[1], noise[1])
    torch.testing.assert_close(noisy[2], 0.75 * x0[2] + 0.25 * noise[2])
    assert add_noise(x0.bfloat16(), noise.bfloat16(), torch.ones(3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"sigma has shape \(1,\) where a batch of 3 needs \(3,\)"):
        add_noise(x0, noise, torch.ones(1))


def test_loss_is_per_sample_and_weighted_by_its_own_timestep():
    x0, noise = torch.randn(3, 4, 2, 6), torch.randn(3, 4, 2, 6)
    index = torch.tensor([0, 400, 999])
    schedule = training_schedule()

    def velocity(noisy, timestep):
        assert torch.equal(timestep, schedule.timesteps[index])
        assert torch.equal(noisy, add_noise(x0, noise, schedule.sigmas[index]))
        return noise - x0 + torch.tensor([5.0, 1.0, 2.0]).view(3, 1, 1, 1)

    expected = schedule.weights[index] * torch.tensor([25.0, 1.0, 4.0])
    torch.testing.assert_close(flow_match_loss(velocity, x0, noise, index), expected)
    assert expected[0] == 0


@pytest.mark.parametrize("num_steps", [1, 7])
def test_euler_follows_a_straight_path_to_its_end(num_steps):
    noise, data = torch.randn(2, 4, 2, 6), torch.randn(2, 4, 2, 6)
    torch.testing.assert_close(euler_sample(lambda x, t, g: noise - data, noise, num_steps), data, rtol=0, atol=2e-6)


def test_guidance_scale_one_takes_one_forward_and_others_extrapolate():
    calls = []

    def positive(latents, timestep, guidance):
        calls.append(guidance)
        return torch.full_like(latents, 2.0)

    def negative(latents, timestep, guidance):
        calls.append(guidance)
        return torch.full_like(latents, 0.5)

    noise = torch.zeros(3, 1, 2, 2)
    progress = []
    plain = euler_sample(positive, noise, 4, 2.5, 1.0, negative, lambda done, total: progress.append((done, total)))
    assert len(calls) == 4
    assert torch.equal(calls[0], torch.full((3,), 2.5))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    guided = euler_sample(positive, noise, 4, 2.5, 3.0, negative)
    assert len(calls) == 12
    torch.testing.assert_close(plain, torch.full_like(noise, -2.0))
    torch.testing.assert_close(guided, torch.full_like(noise, -(0.5 + 3 * 1.5)))


def test_impossible_sampling_is_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        euler_sample(lambda x, t, g: x, torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match=r"cfg_scale 3.0 needs negative_fn"):
        euler_sample(lambda x, t, g: x, torch.zeros(1, 1, 2, 2), 5, cfg_scale=3.0)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_weights_have_mean_one_under_every_density(kind: str, shift: float) -> None:
    density = TimestepDensity(kind, shift)
    index = sample_timesteps(20_000, torch.Generator().manual_seed(0), density=density)
    assert abs(density.weights(index).mean() - 1) < 0.02  # 3 standard errors
    assert bool((TimestepDensity(kind, shift, "none").weights(index) == 1).all())


def test_a_density_takes_the_nearest_level_of_the_schedule() -> None:
    levels = torch.linspace(1, 0.003 / 1.002, 1000, dtype=torch.float64)
    assert torch.equal(TimestepDensity().index(levels), torch.arange(1000))
    sigmas = training_schedule().sigmas
    for shift in (1.0, 6.0):
        wanted = shift * levels / (1 + (shift - 1) * levels)
        found = sigmas[TimestepDensity("uniform", shift).index(levels)]
        assert (found - wanted).abs().max() < 0.007  # the lowest level is 0.009
    middle = sigmas[
        sample_timesteps(20_000, torch.Generator().manual_seed(0), density=TimestepDensity("logit_normal", 1.0))
    ]
    assert abs(middle.mean() - 0.5) < 0.01
    assert abs(middle.std() - 0.208) < 0.005  # of the logistic of a normal number
