"""What libraries need before they serve: a torchvision that imports beside a CPU build of torch, and less noise.

Call `ensure_torchvision` before anything imports torchvision.

The registry's torchvision is linked against CUDA. Where its library does not load, its import fails on
`operator torchvision::nms does not exist`; with the two schemas defined, transforms, models and datasets work.
`torchvision.ops.nms` and `torchvision.io` then raise when called.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # an operator lives as long as its Library object

if not torch.cuda.is_available():
    # diffsynth imports DeepSpeed, which otherwise warns at every start that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def ensure_torchvision() -> None:
    """Define what torchvision's import needs when its own library does not load; otherwise do nothing."""
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return
    for file in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(file))
            return
        except OSError:
            continue
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Inside, transformers says nothing while it loads a checkpoint whose loading info the caller checks.

    Its report calls the two tensors that a plain Qwen2.5-VL lacks a problem, and where nobody watches its progress
    bars fill the log; on a terminal they stay.
    """
    from transformers.utils import logging as transformers_logging

    def severe(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # A filter, because the loader says more, of tensor parallelism, when its logger's level is raised.
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(severe)
    bars = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        loader.removeFilter(severe)
        if bars:
            transformers_logging.enable_progress_bar()
