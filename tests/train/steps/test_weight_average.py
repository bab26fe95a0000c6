"""The average of the weights against its closed form, whatever the cut; and the weights back, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from nexus_gen.specs.errors import UserError
from train.schemas.common import AverageConfig
from train.steps.average import WeightAverage, decay_at


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Model(nn.Module):
    """Seven trained numbers in two tensors, and one that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(5, 1, dtype=dtype))
        self.vector = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((3,), 4.0, dtype=dtype), requires_grad=False)

    def be(self, value: float) -> None:
        with torch.no_grad():
            self.matrix.copy_(torch.arange(5.0).view(5, 1) + value)
            self.vector.fill_(-value)


VALUES = (1.0, 3.0, 7.0, 5.0)  # at the start and after each of three steps


def averaged(decay: float) -> float:
    """By hand: a_n = d_n a_(n-1) + (1 - d_n) w_n with d = 1/10, 2/11, 3/12, or less where `decay` is."""
    first, second, third = (min(decay, ramp) for ramp in (1 / 10, 2 / 11, 3 / 12))
    start, one, two, three = VALUES
    return (
        start * first * second * third
        + one * (1 - first) * second * third
        + two * (1 - second) * third
        + three * (1 - third)
    )


def follow(average: WeightAverage, model: Model, values: tuple[float, ...] = VALUES[1:]) -> None:
    for value in values:
        model.be(value)
        average.update()


def started(decay: float, rank: int = 0, world_size: int = 1) -> tuple[WeightAverage, Model]:
    model = Model()
    model.be(VALUES[0])
    average = WeightAverage(model, decay, rank, world_size)
    average.start()
    return average, model


def whole(average: float) -> dict[str, Tensor]:
    return {"matrix": torch.arange(5.0).view(5, 1) + average, "vector": torch.full((2,), -average)}


def test_the_decay_rises_to_the_configured_one() -> None:
    assert [decay_at(step, 0.5) for step in (0, 1, 2, 8, 9, 10, 1000)] == pytest.approx(
        [1 / 10, 2 / 11, 3 / 12, 0.5, 0.5, 0.5, 0.5]
    )
    assert decay_at(7, 0.5) == 8 / 17 and decay_at(10**6, 0.999) == 0.999


@pytest.mark.parametrize("decay", [0.9, 0.2, 0.05])
def test_three_updates_are_the_closed_form(decay: float) -> None:
    average, model = started(decay)
    follow(average, model)
    torch.testing.assert_close(average.gather(), whole(averaged(decay)), rtol=1e-6, atol=1e-6)
    assert average.num_updates == 3


def test_the_average_is_applied_and_the_weights_are_back_bit_for_bit() -> None:
    average, model = started(0.9)
    follow(average, model)
    with torch.no_grad():
        model.matrix.add_(1e-7)  # bits that an average would not give back
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), average.applied():
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        raise KeyboardInterrupt
    torch.testing.assert_close(inside, whole(averaged(0.9)) | {"frozen": torch.full((3,), 4.0)}, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(average.gather(), whole(averaged(0.9)), rtol=1e-6, atol=1e-6)  # which it did not move


def test_processes_hold_shares_of_the_same_average_and_any_number_of_them_resumes_it(tmp_path: Path) -> None:
    """Seven numbers on two processes are 3 + 2 and 1 + 1; three go on from their files, and one from those."""
    for world_size, values, directory in ((2, VALUES[1:2], "two"), (3, VALUES[2:3], "three")):
        (tmp_path / directory).mkdir()
        for rank in range(world_size):
            average, model = started(0.9, rank, world_size)
            if directory == "three":
                average.load(tmp_path / "two")
            follow(average, model, values)
            average.save(tmp_path / directory)
    sizes = [{name: len(share) for name, share in load_file(path).items()} for path in sorted(tmp_path.rglob("*two/*"))]
    assert sizes == [{"matrix": 3, "vector": 1}, {"matrix": 2, "vector": 1}]
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        f"average-0000{rank}-of-00003.safetensors" for rank in range(3)
    ]
    for rank, (matrix, vector) in enumerate((([0, 1, 2], 1), ([3, 4], 1))):  # as many as wrote them: each its own
        average, _ = started(0.9, rank, 2)
        average.load(tmp_path / "two")
        moved = 0.1 * VALUES[0] + 0.9 * VALUES[1]
        assert average.shares["matrix"].tolist() == pytest.approx([number + moved for number in matrix])
        assert average.shares["vector"].tolist() == pytest.approx([-moved] * vector)
    average, model = started(0.9)
    average.load(tmp_path / "three")
    assert average.num_updates == 2
    follow(average, model, VALUES[3:])
    torch.testing.assert_close(average.gather(), whole(averaged(0.9)), rtol=1e-6, atol=1e-6)


def test_the_average_of_bfloat16_weights_is_kept_in_float32_and_exported_in_theirs() -> None:
    model = Model(torch.bfloat16)
    average = WeightAverage(model, 0.9, 0, 1)
    average.start()
    for _ in range(100):
        model.be(1.0)
        average.update()
    model.be(1.0078125)  # the next number that bfloat16 has
    average.update()
    late = 1 - min(0.9, 101 / 110)
    assert float(average.shares["vector"][0]) == pytest.approx(-1 - 0.0078125 * late, rel=1e-6)
    gathered = average.gather()
    assert gathered["vector"].dtype == torch.bfloat16 and gathered.keys() == {"matrix", "vector"}


def test_what_zero_3_fills_up_is_no_part_of_a_share() -> None:
    """Five numbers on two processes lie in partitions of three, on four in partitions of two."""
    parameter: Any = SimpleNamespace(ds_numel=5)
    for world_size, sizes in ((1, [5]), (2, [3, 2]), (4, [2, 2, 1, 0])):
        partition = torch.arange(-(-5 // world_size))
        made = [WeightAverage(Model(), 0.9, rank, world_size) for rank in range(world_size)]
        assert [len(average._unpadded(partition, parameter)) for average in made] == sizes


def test_a_share_of_the_first_weights_stays_in_what_is_measured_and_exported(tmp_path: Path) -> None:
    """A quarter of the start beside three quarters of the average, on two processes and after a checkpoint on one."""
    wanted = whole(0.25 * VALUES[0] + 0.75 * averaged(0.9))
    for rank in range(2):
        model = Model()
        model.be(VALUES[0])
        average = WeightAverage(model, 0.9, rank, 2, initial=0.25)
        average.start()
        follow(average, model, VALUES[1:3])
        average.save(tmp_path)
    model = Model()
    model.be(100.0)  # not what training began with
    average = WeightAverage(model, 0.9, 0, 1, initial=0.25)
    average.load(tmp_path)
    follow(average, model, VALUES[3:])
    torch.testing.assert_close(average.gather(), wanted, rtol=1e-6, atol=1e-6)
    with average.applied():
        applied = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "frozen"}
    torch.testing.assert_close(applied, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(average.shares["vector"], torch.full((2,), -averaged(0.9)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AverageConfig(0.9, "average", 1.0), r"average.initial is 1.0; it is a share from 0 to below 1"),
        (AverageConfig(0.9, "average", -0.1), r"average.initial is -0.1"),
        (AverageConfig(0.0, "raw", 0.2), r"average.initial 0.2 has no effect with average.export=raw"),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(config: AverageConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.check()


def test_one_process_wrote_the_checkpoint(tmp_path: Path) -> None:
    average, model = started(0.9)
    follow(average, model)
    average.save(tmp_path)
    resumed, _ = started(0.9)
    resumed.load(tmp_path)
    assert resumed.num_updates == 3
    torch.testing.assert_close(resumed.shares, average.shares, rtol=0, atol=0)


def test_a_whole_parameter_is_put_together_from_the_shares_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five numbers on two processes: three here, two and a filling there."""

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        assert own.tolist() == [0.0, 1.0, 2.0]
        for part, values in zip(parts, (own, torch.tensor([3.0, 4.0, -1.0])), strict=True):
            part.copy_(values)

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    average, _ = started(0.9, 0, 2)
    whole_of = average._whole(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(5, 1))
    assert whole_of.shape == (5, 1) and whole_of.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_share_under_zero_3_is_of_the_optimizers_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter: Any = SimpleNamespace(ds_id=0, ds_numel=5)
    copies = {id(parameter): torch.arange(3.0)}
    monkeypatch.setattr("train.steps.average.safe_get_local_fp32_param", lambda one: copies[id(one)])
    shares = [WeightAverage(Model(), 0.9, rank, 2)._master_share(parameter).tolist() for rank in (0, 1)]
    assert shares == [[0.0, 1.0, 2.0], [0.0, 1.0]]


@pytest.mark.parametrize("partitioned", [True, False])
def test_rank_zero_writes_what_is_partitioned_and_every_rank_what_is_not(
    partitioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed hands rank zero's version of a gathered parameter to all when the context ends."""
    given: list[dict[str, Any]] = []

    @contextmanager
    def gathered(parameters: list[Any], **options: Any) -> Iterator[None]:
        given.append(options)
        yield

    monkeypatch.setattr("train.steps.average.deepspeed.zero.GatheredParameters", gathered)
    monkeypatch.setattr(WeightAverage, "_whole", lambda self, share, parameter: share.view(parameter.shape))
    for rank in (0, 1):
        model = Model()
        if partitioned:
            for parameter in (model.matrix, model.vector):
                parameter.ds_id = 0  # type: ignore[attr-defined]
        average = WeightAverage(model, 0.9, rank, 2)
        average._write({"matrix": torch.full((5,), 2.0), "vector": torch.full((2,), 3.0)})
        written = rank == 0 or not partitioned
        assert model.matrix.flatten().tolist() == [2.0 if written else 0.0] * 5
        assert model.vector.tolist() == [3.0 if written else 0.0] * 2
    assert given == [{"modifier_rank": 0, "enabled": partitioned}] * 4
