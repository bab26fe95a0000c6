"""The optimizers that a config can name: AdamW, and Muon for the matrices of repeated blocks.

Muon moves a matrix by the orthogonal factor of its momentum, so that no direction of a weight is left behind; vectors,
embeddings, heads and what stands outside of blocks stay with AdamW. Both take the same learning rate: the update of a
matrix is scaled to the root mean square that AdamW's has.
Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982, for the scale.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

MOMENTUM = 0.95  # of Muon, as published


def matrices_of_blocks(model: nn.Module) -> list[Parameter]:
    """The trained matrices of everything that is repeated (entries of a ModuleList), in the model's order."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for parameter in module.parameters()
    }
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) in inside]


def build_optimizer(
    name: str, model: nn.Module, learning_rate: float, betas: Sequence[float], weight_decay: float
) -> Optimizer:
    """The optimizer that `optim.name` says, over the trained parameters of a model. betas: AdamW's two."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, second = betas
    if name == "adamw":
        return AdamW(trained, learning_rate, (first, second), weight_decay=weight_decay, fused=True)
    matrices = matrices_of_blocks(model)
    by_muon = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in trained if id(parameter) not in by_muon]
    return MatricesByMuon(matrices, others, learning_rate, (first, second), weight_decay)


class MatricesByMuon(Optimizer):
    """Muon over `matrices` and AdamW over `others` as one optimizer: one state, one list of groups, Muon's first."""

    def __init__(
        self,
        matrices: list[Parameter],
        others: list[Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._muon = Muon(matrices, learning_rate, weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, learning_rate, betas, weight_decay=weight_decay, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self._muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give both parts the groups and the state of the whole, which loading replaces."""
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state
