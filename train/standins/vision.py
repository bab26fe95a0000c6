"""Make a small vision tower worth predicting: its frozen outputs are the targets and the conditioning of training.

Either random weights under which colours and places survive, or a tower fitted for a minute to say of every token what
its cell looks like, where it is, and which object it belongs to. Legend: B pictures, G patches per side, N tokens per
side (G / 2), D output width.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLProcessor

from nexus_gen.language.conversation import patches, target_size
from nexus_gen.language.generate import vision_embeddings
from nexus_gen.language.vision_tower import VisionTower, vision_embeds
from nexus_gen.pictures.images import context_size, squash
from nexus_gen.specs.geometry import MERGE_SIZE, REFERENCE_GRID, RELEASED_TARGET_TOKENS, patches_per_side
from train.standins.vae import in_unit_range

log = logging.getLogger(__name__)

Objects = list[dict[str, Any]] | None  # ground truth of a picture, as the procedural dataset writes it; None: unknown

BATCH_SIZE = 64  # pictures per forward without gradients
# On unseen shapes these explain, from a token, 0.999 of the variance of its colours (0.94 with transformers'
# initialisation) and, by a small network on the token at an object's centre, 0.92 of its place (0.73 with weak
# attention in windows). Stronger attention tells more of places (0.95 at a gain of 2) and paints worse. FLUX gives the
# 81 tokens no positions: what they say of their place is all it has.
BIAS_STD = 1.0
QUERY_KEY_BIAS_STD = 3.0
QUERY_KEY_GAIN = 0.1
ATTENTION_GAIN = 0.5
MLP_GAIN = 0.3
# Fitting.
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
CELL_PIXELS = 4  # a token tells the colours of its cell at 4 x 4
EMBED_NOISE = 0.2  # of embeddings with std 1: what is predicted later is never exact, and must still tell
FACTS = ("shape", "colour", "size")
TOLD = ((1, 0, 1), (0, 1, 0), (0, 0, 1))  # which facts pictures in other hues tell, bent ones, and those as drawn
BEND, BEND_KNOTS = 0.1, 10  # how far, in half sides of a picture (std), the knots across it are pulled
FACT_WEIGHT, PLACE_WEIGHT, CELL_WEIGHT = 0.3, 0.5, 10.0
REFERENCE_SHARE = 4  # of the batch on a step of its larger grid, which costs four times as much


@torch.no_grad()
def initialise_vision(tower: VisionTower, seed: int) -> None:
    """Random weights under which colours and places survive.

    Biases as large as the signal keep what RMSNorm would divide away, the brightness of a flat patch. Queries and keys
    are mostly bias, so a head looks in a fixed direction, whatever it sees, and the edge of the picture cuts its view:
    what it returns tells where its token is.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tower.named_parameters():
        if "norm" in name or "ln_q" in name:
            continue
        if parameter.ndim == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * BIAS_STD)
        else:
            gain = {"attn.proj.weight": ATTENTION_GAIN, "mlp.down_proj.weight": MLP_GAIN}
            scale = next((value for suffix, value in gain.items() if name.endswith(suffix)), 1.0)
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * fan_in**-0.5)
        if "attn.qkv" in name:
            queries_and_keys = parameter[: 2 * len(parameter) // 3]
            queries_and_keys *= QUERY_KEY_BIAS_STD if parameter.ndim == 1 else QUERY_KEY_GAIN


@torch.no_grad()
def calibrate_vision(
    tower: VisionTower, processor: Qwen2_5_VLProcessor, images: list[Image.Image], num_target_tokens: int
) -> None:
    """Give every output dimension mean 0 and std 1 over the tokens of the pictures, by the last layer's weights."""
    last: Any = tower.merger.mlp[-1]
    embeds = target_embeddings(tower, processor, images, num_target_tokens)
    std, mean = torch.std_mean(embeds.flatten(0, 1), dim=0)
    last.bias.sub_(mean).div_(std)
    last.weight.div_(std[:, None])


@torch.no_grad()
def target_embeddings(
    tower: VisionTower,
    processor: Qwen2_5_VLProcessor,
    images: list[Image.Image],
    num_target_tokens: int = RELEASED_TARGET_TOKENS,
) -> Tensor:
    """(pictures, num_target_tokens, D): the embeddings of pictures at the size of a target."""
    side, embeds = target_size(processor, num_target_tokens), []
    for first in range(0, len(images), BATCH_SIZE):
        sized = [squash(image, side) for image in images[first : first + BATCH_SIZE]]
        embeds.append(vision_embeddings(tower, *patches(processor, sized)).unflatten(0, (len(sized), -1)))
    return torch.cat(embeds)


def fit_vision(
    tower: VisionTower,
    processor: Qwen2_5_VLProcessor,
    pictures: Tensor,
    objects: list[Objects],
    steps: int,
    batch_size: int,
    seed: int,
    num_target_tokens: int = RELEASED_TARGET_TOKENS,
) -> dict[str, float]:
    """Train the tower in place to describe every token linearly; returns how well it does on pictures left out.

    A token tells the colours of its cell, its place in the picture and, where the ground truth is known, shape, colour
    and size of the object that reaches into the cell (`one_fact_each` says from which pictures). Learned on every grid
    that it will see: that of references, that of targets and, where it is another, that of these pictures as context.
    pictures: (N, 3, S, S) uint8, on the device to train on, where the tower stays. The same device makes the same
    weights.
    """
    device, side, patch = pictures.device, pictures.shape[-1], processor.image_processor.patch_size
    target, context = patches_per_side(num_target_tokens), context_size(side, side, patch, 4 * side**2)[0] // patch
    grids = list(dict.fromkeys((REFERENCE_GRID, target, context)))
    labels = {grid: torch.from_numpy(token_labels(objects, grid // MERGE_SIZE)).to(device) for grid in grids}
    held_out = max(1, min(256, len(pictures) // 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reinitialise(tower)
        heads = Heads(tower.config.out_hidden_size, max(1, *(int(values.max()) + 1 for values in labels.values())))
    module: nn.Module = tower  # transformers types `to` for whole models
    module.to(device).train().requires_grad_(True)
    heads.to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator(device).manual_seed(seed)
    for step in range(steps):
        grid = grids[step % len(grids)]
        count = max(1, batch_size // REFERENCE_SHARE) if grid == REFERENCE_GRID else batch_size
        index = held_out + torch.randint(len(pictures) - held_out, (count,), generator=generator, device=device)
        batch, wanted = one_fact_each(in_unit_range(pictures[index]), labels[grid][index], generator)
        embeds = heads.normalise(embed(tower, processor, batch, grid))
        embeds = embeds + EMBED_NOISE * torch.randn(embeds.shape, generator=generator, device=device)
        losses = heads.losses(embeds, batch, wanted)
        loss = losses["cell"] * CELL_WEIGHT + losses["place"] * PLACE_WEIGHT + losses["facts"] * FACT_WEIGHT
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 < len(grids) or step >= steps - len(grids):
            values = ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            log.info("vision tower step %d of %d, grid %d: %s", step + 1, steps, grid, values)
    with torch.no_grad():
        unseen = in_unit_range(pictures[:held_out])
        embeds = heads.normalise(embed(tower.eval(), processor, unseen, target))
        return heads.scores(embeds, unseen, labels[target][:held_out])


class Heads(nn.Module):
    """Linear readings of the embeddings, thrown away after fitting."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, 3 * CELL_PIXELS**2)
        self.place = nn.Linear(width, 2)
        self.facts = nn.Linear(width, len(FACTS) * num_classes)

    def normalise(self, embeds: Tensor) -> Tensor:
        """Mean 0 and std 1 in every dimension over the batch, as `calibrate_vision` does for good."""
        return F.batch_norm(embeds.flatten(0, 2), None, None, training=True).view_as(embeds)

    def losses(self, embeds: Tensor, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """embeds (B, N, N, D), pictures (B, 3, S, S), labels (B, N, N, facts)."""
        size = embeds.shape[1]
        logits = self.facts(embeds).unflatten(-1, (len(FACTS), -1)).flatten(0, 3)
        entropy = F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="none")
        known = labels.flatten() >= 0
        on_object = labels.flatten() > 0
        halves = [(entropy * mask).sum() / mask.sum().clamp(min=1) for mask in (on_object, known & ~on_object)]
        return {
            "cell": F.mse_loss(self.cell(embeds), cells(pictures, size)),
            "place": F.mse_loss(self.place(embeds), places(size, embeds.device).expand(len(embeds), -1, -1, -1)),
            "facts": torch.stack(halves).sum(),
        }

    def scores(self, embeds: Tensor, pictures: Tensor, labels: Tensor) -> dict[str, float]:
        """Shares of the variance explained, and of the tokens on objects whose facts are read right."""
        size = embeds.shape[1]
        scores = {}
        for name, read, wanted in (
            ("cell_r2", self.cell(embeds), cells(pictures, size)),
            ("place_r2", self.place(embeds), places(size, embeds.device).expand(len(embeds), -1, -1, -1)),
        ):
            variance = (wanted - wanted.flatten(0, 2).mean(0)).square().mean()
            scores[name] = round(1 - float((read - wanted).square().mean() / variance), 4)
        read_facts = self.facts(embeds).unflatten(-1, (len(FACTS), -1)).argmax(-1)
        for number, fact in enumerate(FACTS):
            on_object = labels[..., number] > 0
            if bool(on_object.any()):
                right = read_facts[..., number][on_object] == labels[..., number][on_object]
                scores[f"{fact}_accuracy"] = round(float(right.float().mean()), 4)
        return scores


@torch.no_grad()
def reinitialise(tower: VisionTower) -> None:
    """Unit gain for every matrix, biases of 0; the branches of a residual block start smaller."""
    for name, parameter in tower.named_parameters():
        if "norm" in name or "ln_q" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            gain = 0.3 if name.endswith(("attn.proj.weight", "mlp.down_proj.weight")) else 1.0
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)


def one_fact_each(pictures: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """By turns a picture in other hues, a bent one, and one as it was drawn, with the labels of what it tells (`TOLD`).

    Whoever learns both from pictures as drawn reads the one from the other where a dataset does not show every pair:
    what is yellow was never a square. pictures (B, 3, S, S) in [-1, 1] and labels (B, N, N, facts), neither changed.
    """
    device = pictures.device
    turn = torch.randint(3, (1,), generator=generator, device=device)
    kind = ((torch.arange(len(pictures), device=device) + turn) % 3)[:, None, None, None]
    bent_pictures, bent_labels = bent(pictures, labels, generator)
    pictures = torch.where(kind == 0, in_random_hues(pictures, generator), pictures)
    pictures, labels = torch.where(kind == 1, bent_pictures, pictures), torch.where(kind == 1, bent_labels, labels)
    told = torch.tensor(TOLD, dtype=torch.bool, device=device)[kind[..., 0]]
    return pictures, torch.where(told, labels, -1)


def in_random_hues(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], the colours of each turned about grey, or mirrored there, and clipped."""
    device, count = pictures.device, len(pictures)
    angle = torch.rand(count, generator=generator, device=device) * 2 * math.pi
    mirror = torch.randint(2, (count,), generator=generator, device=device) * 2 - 1
    turns = torch.zeros(count, 3, 3, device=device)
    turns[:, 0, 0] = 1
    turns[:, 1, 1], turns[:, 1, 2] = angle.cos(), -angle.sin() * mirror
    turns[:, 2, 1], turns[:, 2, 2] = angle.sin(), angle.cos() * mirror
    # Grey and two directions across it, all of length 1.
    basis = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], device=device))
    return torch.einsum("bij,bjhw->bihw", basis.T @ turns @ basis, pictures).clamp(-1, 1)


def bent(pictures: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, S, S) pulled about until no shape is left, and labels (B, N, N, facts) moved with them."""
    knots = torch.randn(len(pictures), 2, BEND_KNOTS, BEND_KNOTS, generator=generator, device=pictures.device) * BEND

    def seen_from(size: int) -> Tensor:
        """(B, size, size, 2): where each pixel comes from, x and y in [-1, 1]."""
        straight = centres(size, pictures.device).flip(-1)
        return straight + F.interpolate(knots, (size, size), mode="bicubic").permute(0, 2, 3, 1)

    def pulled(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values, seen_from(values.shape[-1]), mode, padding_mode="border", align_corners=False)

    moved = pulled(labels.permute(0, 3, 1, 2).float(), "nearest").permute(0, 2, 3, 1)
    return pulled(pictures, "bilinear"), moved.to(labels.dtype)


def embed(tower: VisionTower, processor: Any, pictures: Tensor, grid: int) -> Tensor:
    """(B, N, N, D) of pictures (B, 3, S, S) in [-1, 1], squashed to the grid, all on the tower's device."""
    patch = processor.image_processor.patch_size
    side = grid * patch
    if pictures.shape[-1] != side:
        resized = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True)
        pictures = resized.clamp(-1, 1)
    values = patch_values(pictures, processor.image_processor)
    grid_thw = torch.tensor([[1, grid, grid]]).expand(len(pictures), -1)
    size = grid // MERGE_SIZE
    return vision_embeds(tower, values, grid_thw).view(len(pictures), size, size, -1)


def patch_values(pictures: Tensor, image_processor: Any) -> Tensor:
    """What Qwen's image processor makes of pictures in [-1, 1], on their device: (patches, values)."""
    patch, frames = image_processor.patch_size, image_processor.temporal_patch_size
    mean, std = (
        pictures.new_tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    values = ((pictures + 1) / 2 - mean) / std
    values = values.unflatten(3, (-1, MERGE_SIZE, patch)).unflatten(2, (-1, MERGE_SIZE, patch))
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # B, row, column, merge, merge | channel, y, x
    return values[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)


def cells(pictures: Tensor, size: int) -> Tensor:
    """(B, size, size, 48): the colours of each token's cell at 4 x 4."""
    means = F.interpolate(pictures, (size * CELL_PIXELS, size * CELL_PIXELS), mode="bilinear", antialias=True)
    means = means.unflatten(3, (size, CELL_PIXELS)).unflatten(2, (size, CELL_PIXELS))
    return means.permute(0, 2, 4, 1, 3, 5).flatten(3)


def places(size: int, device: torch.device) -> Tensor:
    """(size, size, 2): row and column of each token, with std 1."""
    return centres(size, device) * 3**0.5


def centres(size: int, device: torch.device) -> Tensor:
    """(size, size, 2): row and column of the middle of each of size x size cells, in [-1, 1]."""
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)


def token_labels(objects: list[Objects], size: int) -> np.ndarray:
    """(pictures, size, size, 3) int64: shape, colour and size of the object that reaches into each token's cell.

    0 is the ground, and -1 everywhere in pictures without ground truth. Names are numbered in alphabetical order.
    """
    known = [thing for things in objects for thing in things or ()]
    numbers = [{name: 1 + i for i, name in enumerate(sorted({thing[fact] for thing in known}))} for fact in FACTS]
    labels = np.full((len(objects), size, size, len(FACTS)), -1, dtype=np.int64)
    for picture, things in zip(labels, objects, strict=True):
        if things is None:
            continue
        picture[:] = 0
        for thing in things:
            left, top, right, bottom = (round(edge * size) for edge in thing["bbox"])
            picture[top:bottom, left:right] = [number[thing[fact]] for number, fact in zip(numbers, FACTS, strict=True)]
    return labels
