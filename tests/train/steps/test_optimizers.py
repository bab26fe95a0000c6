"""Muon over the matrices of blocks, AdamW over the rest: against updates computed here."""

import copy

import pytest
import torch
from torch import Tensor, nn

from launch.compose import Override, compose_stage
from nexus_gen.specs.errors import UserError
from train.steps.optimizers import build_optimizer, matrices_of_blocks

RATE, BETAS, DECAY = 0.02, (0.9, 0.95), 0.1


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 12), "norm": nn.LayerNorm(12)}) for _ in range(2))
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(sum(block["norm"](block["up"](self.embed(ids))) for block in self.blocks))


def trained(model: Layers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def test_only_trained_matrices_of_repeated_blocks_are_muons() -> None:
    model = Layers()
    model.blocks[0]["up"].requires_grad_(False)
    assert [id(one) for one in matrices_of_blocks(model)] == [id(model.blocks[1]["up"].weight)]


def test_a_matrix_moves_by_the_orthogonal_factor_of_its_momentum() -> None:
    model = Layers()
    before = copy.deepcopy(model)
    weight = model.blocks[0]["up"].weight  # (12, 6)
    optimizer = build_optimizer("muon", model, RATE, BETAS, DECAY)
    trained(model, optimizer, range(1))
    assert weight.grad is not None
    left, size, right = torch.linalg.svd(weight.grad, full_matrices=False)  # the first momentum is along it
    kept = size > 0.02 * size.norm()  # smaller ones the iterations do not reach
    left, right = left[:, kept], right[kept]
    moved = (before.blocks[0]["up"].weight * (1 - RATE * DECAY) - weight) / (RATE * 0.2 * 12**0.5)
    # In the gradient's own directions: a diagonal, whose entries the published coefficients bring to 0.7 to 1.2.
    assert len(right) >= 4
    singular = left.T @ moved.detach() @ right.T
    assert singular.diagonal().min() > 0.6 and singular.diagonal().max() < 1.3
    assert (singular - torch.diag(singular.diagonal())).abs().max() < 0.02  # products in bfloat16


def test_what_is_no_matrix_of_a_block_moves_as_under_adamw() -> None:
    model = Layers()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, build_optimizer("muon", model, RATE, BETAS, DECAY), range(1))
    parameters = dict(model.named_parameters())
    for name in ("embed.weight", "head.bias", "blocks.1.norm.weight", "blocks.0.up.bias"):
        gradient = parameters[name].grad
        assert gradient is not None
        # Adam's first step: both moments are the gradient's, corrected for their start.
        by_hand = start[name] * (1 - RATE * DECAY) - RATE * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(parameters[name], by_hand, atol=1e-6), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_that_was_saved_trains_on_as_if_nothing_had_happened(name: str) -> None:
    whole, first, second = Layers(), Layers(), Layers()
    trained(whole, build_optimizer(name, whole, RATE, BETAS, DECAY), range(4))
    optimizer = build_optimizer(name, first, RATE, BETAS, DECAY)
    trained(first, optimizer, range(2))
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(name, second, 9.0, BETAS, DECAY)  # its rate is what was saved
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(second, resumed, range(2, 4))
    for ours, theirs in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_sets_the_rate_of_both_parts() -> None:
    model = Layers()
    start = copy.deepcopy(model)
    optimizer = build_optimizer("muon", model, RATE, BETAS, 0.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    trained(model, optimizer, range(2))
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("override", ["trainer.zero_stage=2", "trainer.precision=bfloat16"])
def test_muon_asks_for_whole_matrices_in_float32(override: str) -> None:
    keys = ["stage=generation_decoder", "experiment=finetune_generation_decoder", "optim.name=muon"]
    assert compose_stage([Override.parse(key) for key in keys]).optim.name == "muon"
    with pytest.raises(UserError, match=r"optim\.name=muon .* set trainer\.zero_stage=0"):
        compose_stage([Override.parse(key) for key in (*keys, override)])
