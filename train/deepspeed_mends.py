"""Two mends of DeepSpeed at ZeRO stage 0; importing this module applies them.

In bfloat16 it took an optimizer step on gradients of zero when it was built, to make the optimizer's state: a step of
weight decay, and Adam's bias correction one step ahead ever after. Torch's optimizers make their state when needed.
In float32 it clipped gradients and forgot their norm.
"""

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch.nn.utils import clip_grad_norm_


def _no_step(self: Any) -> None:
    """In place of a step on gradients of zero."""


def _clip_and_remember(self: Any) -> None:
    self._global_grad_norm = clip_grad_norm_(self.module.parameters(), self.gradient_clipping())


FP16_Optimizer.initialize_optimizer_states = _no_step
FP16_UnfusedOptimizer.initialize_optimizer_states = _no_step
DeepSpeedEngine.clip_fp32_gradients = _clip_and_remember
