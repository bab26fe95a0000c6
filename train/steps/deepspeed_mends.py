"""Mends of DeepSpeed; importing this module applies them.

On CPUs it compiled, for 40 s with g++, a shared-memory reduction that only its inference calls; a process that was
killed meanwhile left a lock behind that every later one waited for. To decide on it, it ran compilers on GPUs too.
At ZeRO stage 0 in bfloat16 it took an optimizer step on gradients of zero when it was built, to make the optimizer's
state: a step of weight decay, and Adam's bias correction one step ahead ever after. Torch's optimizers make their state
when needed. At stage 0 in float32 it clipped gradients and forgot their norm.
"""

from importlib import import_module
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch.nn.utils import clip_grad_norm_


def _nothing_to_build() -> None:
    """In place of the reduction; DeepSpeed does without it where there is none."""


def _no_step(self: Any) -> None:
    """In place of a step on gradients of zero."""


def _clip_and_remember(self: Any) -> None:
    self._global_grad_norm = clip_grad_norm_(self.module.parameters(), self.gradient_clipping())


# By name: `deepspeed.comm.torch` as an attribute is torch itself.
_comm: Any = import_module("deepspeed.comm.torch")
_comm.build_shm_op = _nothing_to_build
FP16_Optimizer.initialize_optimizer_states = _no_step
FP16_UnfusedOptimizer.initialize_optimizer_states = _no_step
DeepSpeedEngine.clip_fp32_gradients = _clip_and_remember
