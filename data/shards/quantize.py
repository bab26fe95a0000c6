"""How embeddings are stored: as floats, or in 8 bits with one scale per token; and what that loses.

Legend: B samples, N tokens, D embedding width. The scales of `x` are stored as `x.scale`, (N, 1) float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8_MAX = 448.0  # the largest float8_e4m3fn
INT8_MAX = 127.0
SCALE = ".scale"


def quantize(name: str, embeds_ND: Tensor, dtype: str) -> dict[str, Tensor]:
    """What is stored of an embedding under the storage dtype (see EMBED_DTYPES): itself, and its scales if it has some.

    8 bits per number: a token's largest magnitude becomes the largest number of the format.
    """
    if dtype in ("float32", "bfloat16"):
        return {name: embeds_ND.to(getattr(torch, dtype))}
    largest = FLOAT8_MAX if dtype == "float8_e4m3fn" else INT8_MAX
    values = embeds_ND.float()
    scale_N1 = values.abs().amax(-1, keepdim=True) / largest
    scale_N1 = torch.where(scale_N1 > 0, scale_N1, 1.0)  # a token of zeros stays zeros
    scaled = values / scale_N1
    stored = scaled.to(torch.float8_e4m3fn) if dtype == "float8_e4m3fn" else scaled.round().to(torch.int8)
    return {name: stored, name + SCALE: scale_N1}


def dequantize(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are trained on: those with scales as bfloat16, the others as they are."""
    return {
        name: (value.float() * stored[name + SCALE]).bfloat16() if name + SCALE in stored else value
        for name, value in stored.items()
        if not name.endswith(SCALE)
    }


def storage_error(embeds_BND: Tensor, restored_BND: Tensor) -> dict[str, Tensor]:
    """relative_rms: |restored - x| over |x|. cosine: mean over tokens of the cosine between the two. (B,) float64."""
    exact, restored = embeds_BND.double(), restored_BND.double()
    size = exact.norm(dim=(-2, -1)).clamp_min(1e-30)
    return {
        "relative_rms": (restored - exact).norm(dim=(-2, -1)) / size,
        "cosine": F.cosine_similarity(exact, restored, -1).mean(-1),
    }


def embedding_gap(predicted_BND: Tensor, true_BND: Tensor) -> dict[str, Tensor]:
    """cosine: mean over tokens; mse: mean over all numbers, of predicted against true embeddings. (B,) float64."""
    predicted, true = predicted_BND.double(), true_BND.double()
    return {
        "cosine": F.cosine_similarity(predicted, true, -1).mean(-1),
        "mse": (predicted - true).square().mean((-2, -1)),
    }


def rounded(value: float) -> float:
    """Six digits: enough to compare, and short in the JSON of every sample."""
    return float(f"{value:.6g}")
