"""The schedule, to the bit, and the arithmetic around it."""

import math
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_gen.flux.flow_match import (
    NUM_TRAIN_TIMESTEPS,
    PUBLISHED,
    TimestepDensity,
    add_noise,
    euler_sample,
    flow_match_loss,
    sample_timesteps,
    sampling_sigmas,
    training_schedule,
)

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flow_match_schedule.safetensors")


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


def shifted(level: Tensor, shift: float) -> Tensor:
    return shift * level / (1 + (shift - 1) * level)


def upper_edges() -> Tensor:
    """Where the cells of the schedule's 1000 levels end, from the noisiest down: halfway, before the shift by 3."""
    line = torch.linspace(1, 0.003 / 1.002, 1000, dtype=torch.float64)
    return shifted(torch.cat([torch.tensor([2.0]), (line[:-1] + line[1:]) / 2]).double(), 3.0)


def level_of(uniform: float, kind: str) -> float:
    """The noise level before the shift: the number itself, or the logistic of the normal at that quantile."""
    return uniform if kind == "uniform" else 1 / (1 + math.exp(-NormalDist().inv_cdf(uniform)))


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 6.0])
def test_a_density_takes_the_level_nearest_to_its_quantile(kind: str, shift: float) -> None:
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    levels = torch.tensor([level_of(float(number), kind) for number in uniform], dtype=torch.float64)
    expected = torch.searchsorted(-upper_edges()[1:], -shifted(levels, shift))
    assert torch.equal(TimestepDensity(kind, shift).index(uniform), expected)
    if (kind, shift) != ("uniform", 3.0):  # what was published draws the index itself
        drawn = sample_timesteps(500, torch.Generator().manual_seed(5), density=TimestepDensity(kind, shift))
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 6.0])
def test_a_larger_shift_trains_on_more_noise(shift: float) -> None:
    """s / (s - 1) - s ln s / (s - 1)^2 of numbers from 0 to 1; those below the lowest level are raised to it."""
    exact = 0.5 if shift == 1 else shift / (shift - 1) - shift * math.log(shift) / (shift - 1) ** 2
    index = sample_timesteps(40_000, torch.Generator().manual_seed(1), density=TimestepDensity("uniform", shift))
    found = float(training_schedule().sigmas[index].mean())
    assert abs(found - exact) < 0.006  # 4 standard errors; 0.5, 0.61, 0.68, 0.77


def test_only_what_was_published_counts_as_published() -> None:
    assert TimestepDensity().is_published and TimestepDensity("uniform", 3.0, "published") == PUBLISHED
    assert TimestepDensity(weighting="none").is_published
    for other in (TimestepDensity(shift=1.0), TimestepDensity(shift=6.0), TimestepDensity("logit_normal")):
        assert not other.is_published
    published = sample_timesteps(5, torch.Generator().manual_seed(3))
    assert torch.equal(published, torch.randint(1000, (5,), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_weights_have_mean_one_under_every_density(kind: str, shift: float) -> None:
    """The table of weights over its mean, in which each level counts as often as the density draws it."""
    edges = torch.cat([upper_edges(), torch.tensor([-1.0])])
    level = edges / (shift - (shift - 1) * edges)  # before the density's own shift
    if kind == "uniform":
        below = level.clamp(0, 1)
    else:
        below = torch.tensor([NormalDist().cdf(math.log(x / (1 - x))) if 0 < x < 1 else float(x >= 1) for x in level])
    below[0], below[-1] = 1.0, 0.0
    table = GOLDEN["train_weights"].double()
    mean = float(((below[:-1] - below[1:]) * table).sum())
    expected = table if (kind, shift) == ("uniform", 3.0) else table / mean
    found = TimestepDensity(kind, shift).weights(torch.arange(1000))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert bool((TimestepDensity(kind, shift, "none").weights(torch.arange(1000)) == 1).all())


def test_a_loss_is_weighed_by_the_density_that_it_was_drawn_from() -> None:
    x0, noise, index = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0), torch.tensor([400, 900])
    for density in (TimestepDensity(), TimestepDensity(shift=6.0), TimestepDensity(weighting="none")):
        found = flow_match_loss(lambda noisy, timestep: torch.ones_like(noisy), x0, noise, index, density)
        torch.testing.assert_close(found, 4 * density.weights(index))  # (1 - 3)^2, the mean over a sample's values
