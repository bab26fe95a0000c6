"""What a decoder is watched by: its loss on held-out samples against a plain loop, and the pictures of both rows."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn

from data.shards.files import ShardSpec, write_shard
from nexus_gen.artifacts.artifact import Manifest, seal
from nexus_gen.flux.flow_match import sampling_sigmas, training_schedule
from train.decoders.monitor import DecoderMonitor, picture_grid
from train.steps.average import WeightAverage
from train.steps.clock import StepClock

LATENTS = (2, 4, 4)
WIDTH = 3


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sample(index: int, predicted: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    names = ("target_embeds", "predicted_embeds") if predicted else ("target_embeds",)
    embeds = {name: torch.randn(4, WIDTH, generator=generator) for name in names}
    return {**embeds, "latents": torch.randn(LATENTS, generator=generator)}


def write_shards(directory: Path, predicted: bool) -> Path:
    """Five samples to train on, numbered from 0, and four held-out ones, from 100, in two shards."""
    files: dict[str, list[dict[str, Any]]] = {}
    for split, shards in {"train": [range(5)], "heldout": [range(100, 103), range(103, 104)]}.items():
        (directory / split).mkdir(parents=True)
        for number, indices in enumerate(shards):
            file = f"{split}/{number:06d}.tar"
            write_shard(directory / file, [(f"{i:09d}", sample(i, predicted), {"index": i}) for i in indices])
            files.setdefault(split, []).append({"file": file, "samples": len(indices)})
    spec = dataclasses.asdict(ShardSpec(4, 0, WIDTH, list(LATENTS), "float32", "encoder")) | {"predicted": predicted}
    seal(directory, Manifest("embedding_shards", "embed_generation", {}, {}, {}, {"spec": spec, "splits": files}))
    return directory


class Module(nn.Module):
    """velocity = scale x (noisy + mean of the embeddings x timestep / 1000)."""

    device = torch.device("cpu")
    schedule = training_schedule()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.passes = 0

    def velocity(self, batch: dict[str, Tensor]) -> Any:
        def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
            self.passes += 1
            assert not torch.is_grad_enabled() and not self.training
            shift = batch["target_embeds"].mean(dim=(1, 2)) * timestep / 1000
            return self.scale * (noisy + shift.view(-1, 1, 1, 1))

        return velocity

    def guided_velocity(self, batch: dict[str, Tensor]) -> Any:
        def velocity(noisy: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
            assert guidance.tolist() == [2.5] * len(noisy)
            return self.velocity(batch)(noisy, timestep)

        return velocity

    def null_velocity(self, noisy: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        return torch.zeros_like(noisy)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.rows.append((step, {name: float("nan")}))


def monitor(
    shards: Path,
    num_samples: int = 3,
    rank: int = 0,
    world_size: int = 1,
    average: WeightAverage | None = None,
    num_pictures: int = 0,
    clock: StepClock | None = None,
    micro: int = 2,
) -> tuple[DecoderMonitor, Recorder]:
    config: Any = SimpleNamespace(
        shards=str(shards),
        run_dir=shards,
        heldout=SimpleNamespace(every_steps=2, num_samples=num_samples),
        samples=SimpleNamespace(every_steps=3, num_pictures=num_pictures),
        trainer=SimpleNamespace(max_steps=7, micro_batch_size=micro),
        sampling=SimpleNamespace(num_inference_steps=2, embedded_guidance=2.5, cfg_scale=3.0),
    )
    recorder: Any = Recorder()
    made = DecoderMonitor(config, recorder, rank, world_size, torch.float32, average, clock or StepClock())
    return made, recorder


def noise_of(level: int, index: int) -> Tensor:
    """Of a sample at a level, in every run: its generator has drawn one timestep before."""
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence((0, level, index)).generate_state(1)[0]))
    torch.randint(1000, (1,), generator=generator)
    return torch.randn(1, *LATENTS, generator=generator)[0]


def losses_by_hand(num_samples: int, scale: float = 0.5, embeds: str = "target_embeds") -> list[float]:
    """At the middles of eight equal parts of the schedule: sample after sample, level after level."""
    line = torch.linspace(1, 0.003 / 1.002, 1000, dtype=torch.float64)
    means = []
    for level, step in enumerate((62, 187, 312, 437, 562, 687, 812, 937)):
        sigma = float(3 * line[step] / (1 + 2 * line[step]))
        errors = []
        for index in range(num_samples):
            own = {name: tensor.double() for name, tensor in sample(100 + index, predicted=True).items()}
            if embeds == "target_embeds only":
                own = {name: tensor.double() for name, tensor in sample(100 + index, predicted=False).items()}
            noise, latents = noise_of(level, index).double(), own["latents"]
            noisy = (1 - sigma) * latents + sigma * noise
            shift = float(own[embeds.split()[0]].mean()) * sigma
            errors.append(float(((scale * (noisy + shift) - (noise - latents)) ** 2).mean()))
        means.append(sum(errors) / num_samples)
    return means


@torch.no_grad()
@pytest.mark.parametrize(("asked", "there"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_the_heldout_loss_is_the_mean_over_heldout_samples_and_levels(tmp_path: Path, asked: int, there: int) -> None:
    made, _ = monitor(write_shards(tmp_path, predicted=False), asked)
    levels = losses_by_hand(there, embeds="target_embeds only")
    found = made.heldout_loss(Module().eval())
    names = ["t978", "t929", "t869", "t795", "t701", "t579", "t412", "t172"]  # 1000 sigma
    assert found == pytest.approx(
        {
            "heldout/loss": sum(levels) / 8,
            **{f"heldout/loss_{name}": loss for name, loss in zip(names, levels, strict=True)},
        },
        rel=1e-5,
    )


@torch.no_grad()
def test_the_loss_of_predicted_embeddings_stands_beside_that_of_true_ones(tmp_path: Path) -> None:
    made, _ = monitor(write_shards(tmp_path, predicted=True), 4)
    found = made.heldout_loss(Module().eval())
    assert found["heldout/loss"] == pytest.approx(sum(losses_by_hand(4)) / 8, rel=1e-5)
    predicted = sum(losses_by_hand(4, embeds="predicted_embeds")) / 8
    assert found["heldout/predicted_loss"] == pytest.approx(predicted, rel=1e-5)
    assert abs(found["heldout/loss"] - predicted) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_samples", "world_size", "micro"), [(3, 3, 2), (4, 3, 2), (4, 2, 1), (1, 2, 2), (3, 2, 1)]
)
def test_processes_share_the_samples_and_an_idle_one_keeps_pace_and_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_samples: int, world_size: int, micro: int
) -> None:
    """Rank after rank in one process: each leaves its sums to the last one's reduction."""
    shards, passes = write_shards(tmp_path, predicted=False), set()
    left: list[Tensor] = []

    def all_reduce(sums: Tensor) -> None:
        left.append(sums.clone())
        sums.copy_(torch.stack(left).sum(0))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    found = {}
    for rank in range(world_size):
        made, _ = monitor(shards, num_samples, rank, world_size, micro=micro)
        module = Module().eval()
        found = made.heldout_loss(module)
        passes.add(module.passes)
    expected = sum(losses_by_hand(num_samples, embeds="target_embeds only")) / 8
    assert found["heldout/loss"] == pytest.approx(expected, rel=1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("export", ["average", "raw"])
def test_the_weights_that_are_exported_are_measured_and_training_goes_on_with_its_own(
    tmp_path: Path, export: str
) -> None:
    module = Module()
    average = WeightAverage(module, 0.9, 0, 1)
    average.start()
    with torch.no_grad():
        module.scale.copy_(torch.tensor(0.7))
    average.update()  # the first: a tenth of the start, nine tenths of the weights
    exported = average if export == "average" else None
    made, recorder = monitor(write_shards(tmp_path, predicted=False), 3, average=exported)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=3, global_step=2)
    for micro in range(3):
        assert recorder.rows == []  # the step is not done
        made.on_train_batch_end(trainer, module, None, None, micro)
    ((step, row),) = recorder.rows
    expected = losses_by_hand(3, 0.1 * 0.5 + 0.9 * 0.7 if export == "average" else 0.7, "target_embeds only")
    assert step == 2 and row["heldout/loss"] == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert float(module.scale) == torch.tensor(0.7) and module.training and torch.is_grad_enabled()


def test_what_is_due_and_how_long_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    clock = StepClock(lambda: seconds)

    def heldout_loss(self: DecoderMonitor, module: Any) -> dict[str, float]:
        nonlocal seconds
        seconds += 10
        return {}

    def paint(self: DecoderMonitor, module: Any, step: int) -> None:
        nonlocal seconds
        seconds += 4
        self._metrics.log_picture(step, "samples", Image.new("RGB", (1, 1)))

    monkeypatch.setattr(DecoderMonitor, "heldout_loss", heldout_loss)
    monkeypatch.setattr(DecoderMonitor, "paint", paint)
    made, recorder = monitor(write_shards(tmp_path, predicted=False), num_pictures=2, clock=clock)
    clock.start()
    for step in range(1, 8):
        seconds += 1
        clock.step_done()
        made.on_train_batch_end(SimpleNamespace(accumulate_grad_batches=1, global_step=step), Module(), None, None, 0)
        if step == 4:
            assert clock.remaining_s(4, 7, 1.0) == 3 + 2 * 10 + 2 * 4
    measured = [step for step, row in recorder.rows if "samples" not in row]
    painted = [step for step, row in recorder.rows if "samples" in row]
    assert (measured, painted) == ([2, 4, 6, 7], [3, 6, 7])
    assert clock.lap() == (7, 7.0)


@torch.no_grad()
def test_true_pictures_stand_above_painted_ones(tmp_path: Path) -> None:
    """Euler's two steps by hand, with guidance 3 between the velocity and the empty prompt's, here 0."""
    made, recorder = monitor(write_shards(tmp_path, predicted=True), num_pictures=2)
    made._vae = SimpleNamespace(decode=lambda latents: latents[:, :1].expand(-1, 3, -1, -1) / 4)
    made.paint(Module().eval(), 5)
    pixels = np.asarray(Image.open(tmp_path / "samples" / "step_00000005.png")).astype(int)
    assert recorder.rows[0][0] == 5 and pixels.shape == (2 * 6, 2 * 6, 3)
    sigmas = sampling_sigmas(2).tolist()
    for number in range(2):
        own = sample(100 + number, predicted=True)
        latents = noise_of(0, number)
        for here, there in ((sigmas[0], sigmas[1]), (sigmas[1], sigmas[2])):
            latents = latents + 3 * 0.5 * (latents + own["target_embeds"].mean() * here) * (there - here)
        for row, wanted in enumerate((own["latents"], latents)):
            shown = ((wanted[0] / 4).clamp(-1, 1) + 1) * 127.5
            cell = pixels[6 * row : 6 * row + 4, 6 * number : 6 * number + 4, 0]
            assert np.abs(cell - shown.numpy()).max() < 0.51, (row, number)


def test_a_grid_keeps_pictures_in_order_with_white_between() -> None:
    black, white = torch.full((1, 3, 1, 1), -1.5), torch.full((1, 3, 1, 1), 2.0)  # beyond both ends of the range
    grid = np.asarray(picture_grid([torch.cat([black, white]), torch.cat([white, black])]))
    assert grid.shape == (6, 6, 3)
    assert (np.argwhere(grid[:, :, 0] == 0) == [[0, 0], [3, 3]]).all()
    assert set(np.unique(grid)) == {0, 255}


def test_nothing_is_looked_at_where_nothing_is_asked_for(tmp_path: Path) -> None:
    made, recorder = monitor(write_shards(tmp_path, predicted=False), num_samples=0, num_pictures=0)
    made._config.samples.every_steps = 0  # and never between the first step and the last
    for step in range(1, 8):
        made.on_train_batch_end(SimpleNamespace(accumulate_grad_batches=1, global_step=step), Module(), None, None, 0)
    assert recorder.rows == []
