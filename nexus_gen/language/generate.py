"""Text and image embeddings out of the autoregressive model.

A reply is decoded token by token with a key-value cache until the model emits vision_start. The inputs of the image
that follows are known beforehand (the prefill embeddings), so one forward pass over vision_start, the N prefill
embeddings and vision_end yields the N embeddings and the next text token: one step where a loop would take N + 2.

Legend: B rows, L new positions of a step, D width, V vocabulary, N tokens of a target image (81 as released).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nexus_gen.language.model import (
    NexusGenForConditionalGeneration,
    index_within_runs,
    predicts,
)
from nexus_gen.language.packed_vision import PackedVisionTower
from nexus_gen.language.vision_tower import VisionTower, vision_embeds
from nexus_gen.specs.geometry import target_grids
from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from transformers import DynamicCache  # noqa: E402
from transformers.generation import (  # noqa: E402
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PositionsAfterImage = Literal["published", "trained"]
Progress = Callable[[int, int], None]  # (done, of how many)
DecoderLayer = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a text token is chosen; the defaults are greedy.

    temperature > 0, top_p in (0, 1], top_k >= 0 (0 keeps all), repetition_penalty > 0 (1 is none, and it also acts
    on greedy choice). Raises ValueError outside these ranges.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError(f"{self} is out of range: temperature > 0, 0 < top_p <= 1, top_k >= 0, penalty > 0")

    @property
    def processors(self) -> LogitsProcessorList:
        """transformers' processors for these options, in the order in which `generate` applies them."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample:
            processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
        return processors


@dataclass(frozen=True)
class Reply:
    """What `generate_reply` returns.

    sequences: (B, S) prompts followed by replies, padded on the right after a reply's end.
    new_tokens: per row the reply alone, unpadded. image_embeds: per row its images, (N, D) each, or as
    many as the target grid has.
    """

    sequences: Tensor
    new_tokens: list[Tensor]
    image_embeds: list[list[Tensor]]


@torch.no_grad()
def generate_reply(
    model: NexusGenForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    force_image_first: bool = False,
    positions_after_image: PositionsAfterImage = "published",
    target_grid: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Reply:
    """Continue prompts with text and images.

    input_ids, attention_mask: (B, S), prompts padded on the left. pixel_values, image_grid_thw: all context images of
    the batch in row order. max_new_tokens counts image tokens; an image begun within it is finished. A row ends at
    an end-of-sequence token. force_image_first: the first new token is vision_start.
    positions_after_image: where text continues behind an image at position p. "published" counts its tokens (p + 81),
    as the published generation does; "trained" counts its longer side (p + 9), as training does.
    target_grid: rows and columns of the images' merged tokens, one of `target_grids`, the model's square unless given;
    others need a model that was trained with dynamic targets. generator: on the model's device; seeds `do_sample`.
    progress: called before each step with (tokens of the longest reply, max_new_tokens); what it raises ends the work.
    Raises ValueError on prompts padded on the right or ending in vision_start, and for another target_grid.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: attention_mask ends in 0")
    if bool((input_ids[:, -1] == model.config.vision_start_token_id).any()):
        raise ValueError("a prompt ends in vision_start; leave it out and set force_image_first")

    grids = target_grids(model.num_target_tokens)
    target_grid = target_grid or grids[0]
    if target_grid not in grids:
        raise ValueError(f"target_grid {target_grid} is none of {', '.join(map(str, grids))}")

    decoding = _Decoding(model, attention_mask, positions_after_image, target_grid)
    logits_BV = decoding.prefill(input_ids, pixel_values, image_grid_thw)
    processors: Any = (sampling or Sampling()).processors
    do_sample = sampling is not None and sampling.do_sample
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    replies: list[list[int]] = [[] for _ in prompts]
    ends, pad_id = _end_tokens(model)
    forced = force_image_first
    is_open = [max_new_tokens > 0] * len(prompts)
    while any(is_open):
        if progress is not None:
            progress(max(map(len, replies)), max_new_tokens)
        if forced:
            next_tokens = [model.config.vision_start_token_id] * len(prompts)
            forced = False
        else:
            logits_BV[:, model.config.vision_end_token_id] = -torch.inf  # only the end of an image emits it
            scores_BV = processors(_rectangle(prompts, replies, input_ids), logits_BV)
            chosen_B = (
                torch.multinomial(scores_BV.softmax(-1), 1, generator=generator).squeeze(1)
                if do_sample
                else scores_BV.argmax(-1)
            )
            next_tokens = chosen_B.tolist()
        fed: list[int | None] = [token if is_open[row] else None for row, token in enumerate(next_tokens)]
        for row, token in enumerate(fed):
            if token is None:
                continue
            replies[row].append(token)
            is_image = token == model.config.vision_start_token_id
            if is_image:
                replies[row] += [model.config.image_token_id] * math.prod(target_grid)
                replies[row].append(model.config.vision_end_token_id)
            is_open[row] = token not in ends and len(replies[row]) < max_new_tokens
            if not is_open[row] and not is_image:
                fed[row] = None  # nothing reads what would follow
        if any(token is not None for token in fed):
            logits_BV = decoding.step(fed)

    new_tokens = [torch.tensor(reply, dtype=input_ids.dtype, device=input_ids.device) for reply in replies]
    padded = pad_sequence(new_tokens, batch_first=True, padding_value=pad_id)
    return Reply(torch.cat([input_ids, padded], dim=1), new_tokens, decoding.image_embeds)


def reply_text(tokenizer: Any, model: NexusGenForConditionalGeneration, reply: Tensor) -> str:
    """The words of one of `new_tokens`; a character of which max_new_tokens left only some bytes is left out."""
    words = tokenizer.decode(reply, skip_special_tokens=True)
    ends, _ = _end_tokens(model)
    is_cut = not len(reply) or int(reply[-1]) not in ends
    return (words.rstrip("\ufffd") if is_cut else words).strip()


def decoder_layer(module: nn.Module, hidden_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One layer of the language model over whole rows: causal without a mask, no cache."""
    return module(hidden_BSD, attention_mask=None, position_embeddings=rotary, use_cache=False)


@lru_cache(maxsize=1)
def compiled_decoder_layer() -> DecoderLayer:
    """`decoder_layer`, compiled at its first call: one graph for all layers and shapes, in about a minute on a GPU."""
    return torch.compile(decoder_layer, dynamic=True)


@torch.no_grad()
def teacher_forced_pairs(
    model: NexusGenForConditionalGeneration,
    batch: Mapping[str, Tensor],
    tower: PackedVisionTower | None = None,
    layer: DecoderLayer = decoder_layer,
) -> list[tuple[Tensor, Tensor]]:
    """Of every target image of a batch, in order: the embeddings that the model predicts, and those that the vision
    tower gives, (N, D) each; none for a batch without target images.

    batch: what `forward` takes, labels included, on any device, best on the CPU; rows padded on either side. They are
    moved to the left, so that attention is causal without a mask, and nothing is computed that these embeddings do not
    depend on, as logits.
    tower: the model's own, packed. layer: runs one decoder layer; `compiled_decoder_layer()` where compiling pays.
    Raises ValueError when image tokens and pictures disagree in number.
    """
    if not bool((batch["labels"] == model.config.image_token_id).any()):
        return []
    language_model = model.model.language_model
    if language_model.config._attn_implementation == "eager":  # the only one that is not causal by itself
        raise ValueError("teacher forcing without a mask needs attention that is causal by itself: use sdpa")
    input_ids, labels, grid_thw = (batch[name].cpu() for name in ("input_ids", "labels", "image_grid_thw"))
    present = batch.get("attention_mask", torch.ones_like(input_ids)).cpu()
    to_left = present.argsort(dim=1, descending=True, stable=True)
    input_ids, labels, present = (tensor.gather(1, to_left) for tensor in (input_ids, labels, present))
    position_ids = model.rope_position_ids(input_ids, present, grid_thw).to(model.device)
    vision_ND = vision_embeddings(model if tower is None else tower, batch["pixel_values"], grid_thw)
    spliced = model.splice(input_ids.to(model.device), labels.to(model.device), vision_ND)

    hidden_BSD = spliced.inputs_embeds
    rotary = language_model.rotary_emb(hidden_BSD, position_ids)
    for module in language_model.layers:
        hidden_BSD = layer(module, hidden_BSD, rotary)
    predicted_ND = model.vision_head(language_model.norm(hidden_BSD[predicts(spliced.target_mask)]))
    starts = (index_within_runs(labels == model.config.image_token_id) == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(predicted_ND)]
    return [
        (predicted_ND[start:end], spliced.target_embeds[start:end]) for start, end in zip(starts, ends, strict=True)
    ]


@torch.no_grad()
def generated_embeddings(model: NexusGenForConditionalGeneration, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """What `generate_reply` makes for the first target image of each row, after the words and pictures before it: the
    place of that image among the target images of the batch -> (N, D).

    batch: what `forward` takes, labels included, with square target images; rows padded on either side. A batch
    without target images makes as many passes as another, so that processes that share the weights stay together.
    """
    image_token_id = model.config.image_token_id
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    present = batch.get("attention_mask", torch.ones_like(input_ids)).cpu().bool()
    rows: list[tuple[Tensor, range, int | None]] = []  # prompt, its images, the target image
    num_images = num_targets = 0
    for ids, own_labels, here in zip(input_ids, labels, present, strict=True):
        ids, own_labels = ids[here], own_labels[here]
        images, targets = (image_starts(tokens == image_token_id) for tokens in (ids, own_labels))
        end = targets[0] if targets else len(ids)
        context = range(num_images, num_images + sum(start < end for start in images))
        rows.append((ids[: end - 1], context, num_targets if targets else None))  # vision_start is the reply's
        num_images, num_targets = num_images + len(images), num_targets + len(targets)
    rows = [row for row in rows if row[2] is not None] or rows[:1]
    prompts = [prompt for prompt, *_ in rows]
    inputs = {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence(
            [torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left"
        ),
    }
    if context_images := [image for _, images, _ in rows for image in images]:
        grids = batch["image_grid_thw"].cpu()
        pictures = batch["pixel_values"].split(grids.prod(dim=1).tolist())
        inputs["pixel_values"] = torch.cat([pictures[image] for image in context_images])
        inputs["image_grid_thw"] = grids[context_images]
    on_device: Any = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    reply = generate_reply(model, **on_device, max_new_tokens=model.num_target_tokens + 2, force_image_first=True)
    return {target: made[0] for (*_, target), made in zip(rows, reply.image_embeds, strict=True) if target is not None}


def image_starts(mask_S: Tensor) -> list[int]:
    """Where the images of one row begin, given where its image tokens are."""
    return (mask_S & ~torch.cat([mask_S.new_zeros(1), mask_S[:-1]])).nonzero().flatten().tolist()


@torch.no_grad()
def vision_embeddings(
    model: NexusGenForConditionalGeneration | VisionTower | PackedVisionTower,
    pixel_values: Tensor,
    image_grid_thw: Tensor,
) -> Tensor:
    """Merged vision embeddings (N, D) of images, by the whole model or by its vision tower alone.

    pixel_values: (patches, channels x 2 x patch x patch); image_grid_thw: (images, 3); N is the patches over 4.
    """
    if isinstance(model, PackedVisionTower):
        return model(pixel_values, image_grid_thw)
    tower = model.model.visual if isinstance(model, NexusGenForConditionalGeneration) else model
    return vision_embeds(tower, pixel_values.to(tower.device), image_grid_thw)


class _Decoding:
    """The cache of a batch and what its rows need to grow at different paces.

    Rows take steps of different length (1 for text, N + 2 for an image, 0 when finished): a step is as long as its
    longest row, shorter rows are padded on the left, and the attention mask hides that padding for good.
    """

    def __init__(
        self,
        model: NexusGenForConditionalGeneration,
        attention_mask: Tensor,
        positions_after_image: PositionsAfterImage,
        target_grid: tuple[int, int],
    ) -> None:
        self.model = model
        self.attention_mask = attention_mask
        rows, columns = target_grid
        self.image_tokens = rows * columns
        self.image_advance = self.image_tokens if positions_after_image == "published" else max(target_grid)
        self.image_embeds: list[list[Tensor]] = [[] for _ in range(attention_mask.shape[0])]
        self.next_positions: list[int] = []
        text_config: Any = model.config.text_config
        self.cache = DynamicCache(config=text_config)
        device = attention_mask.device
        row_N = torch.arange(rows, device=device).repeat_interleave(columns)
        column_N = torch.arange(columns, device=device).repeat(rows)
        grid_3N = torch.stack([torch.zeros_like(row_N), row_N, column_N])
        # Positions of vision_start, the image and vision_end, counted from vision_start.
        self.image_positions = torch.cat(
            [grid_3N.new_zeros(3, 1), 1 + grid_3N, grid_3N.new_full((3, 1), 1 + self.image_advance)], dim=1
        )

    def prefill(self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Tensor:
        """Run the prompts; float32 logits (B, V) of the first new token."""
        embeds_BSD = self.model.splice_inputs(input_ids, None, pixel_values, image_grid_thw).inputs_embeds
        position_ids = self.model.rope_position_ids(input_ids, self.attention_mask, image_grid_thw)
        last_B = position_ids.amax(0).masked_fill(self.attention_mask == 0, -1).amax(1)
        self.next_positions = (last_B + 1).tolist()
        return self._logits(self._forward(embeds_BSD, position_ids))

    def step(self, tokens: list[int | None]) -> Tensor:
        """Feed every row its newest token (None: finished); float32 logits (B, V) of the next one.

        A vision_start feeds the whole image and vision_end too, and adds to the row's `image_embeds`.
        """
        device = self.attention_mask.device
        image_rows = [row for row, token in enumerate(tokens) if token == self.model.config.vision_start_token_id]
        if image_rows and self.model.target_inputs == "embeddings":
            return self._step_feeding_back(tokens, image_rows)
        length = self.image_tokens + 2 if image_rows else 1
        present = torch.tensor([token is not None for token in tokens], device=device)
        ids_B = torch.tensor([token or 0 for token in tokens], device=device)
        embed = self.model.get_input_embeddings()
        text_BD = embed(ids_B)
        embeds_BLD = text_BD.new_zeros(len(tokens), length, text_BD.shape[-1])
        embeds_BLD[:, -1] = text_BD
        new_mask_BL = self.attention_mask.new_zeros(len(tokens), length)
        new_mask_BL[:, -1] = present
        position_ids = torch.zeros(3, len(tokens), length, dtype=torch.long, device=device)
        position_ids[:, :, -1] = torch.tensor(self.next_positions, device=device)
        if image_rows:
            prefill_ND = self.model.image_prefill_embeds(torch.arange(self.image_tokens, device=device))
            end_D = embed(torch.tensor([self.model.config.vision_end_token_id], device=device))
            for row in image_rows:
                embeds_BLD[row] = torch.cat([text_BD[row : row + 1], prefill_ND, end_D])
                new_mask_BL[row] = 1
                position_ids[:, row] = self.next_positions[row] + self.image_positions
        self.attention_mask = torch.cat([self.attention_mask, new_mask_BL], dim=1)
        hidden_BLD = self._forward(embeds_BLD, position_ids)
        # One call whatever the number of images: processes of ZeRO-3 call modules equally often.
        made = iter(self.model.vision_head(hidden_BLD[image_rows, : self.image_tokens]) if image_rows else ())
        for row, token in enumerate(tokens):
            if row in image_rows:
                self.image_embeds[row].append(next(made))
                self.next_positions[row] += 2 + self.image_advance
            elif token is not None:
                self.next_positions[row] += 1
        return self._logits(hidden_BLD)

    def _step_feeding_back(self, tokens: list[int | None], image_rows: list[int]) -> Tensor:
        """`step` where an image's own embeddings are its inputs: each one comes out before the next can."""
        device = self.attention_mask.device
        ids_B = torch.tensor([token or 0 for token in tokens], device=device)
        present_B = torch.tensor([token is not None for token in tokens], device=device)
        is_image_B = torch.zeros_like(present_B)
        is_image_B[image_rows] = True
        start_B = torch.tensor(self.next_positions, device=device)
        embed = self.model.get_input_embeddings()

        def feed(embeds_BD: Tensor, present_B: Tensor, positions_3B: Tensor) -> Tensor:
            """One more position of every row; its output (B, 1, D)."""
            new_mask = present_B[:, None].to(self.attention_mask.dtype)
            self.attention_mask = torch.cat([self.attention_mask, new_mask], dim=1)
            return self._forward(embeds_BD[:, None], positions_3B[:, :, None])

        hidden_B1D = feed(embed(ids_B), present_B, start_B.expand(3, -1))
        logits_BV = self._logits(hidden_B1D)
        made = []
        for token in range(self.image_tokens):
            made.append(self.model.vision_head(hidden_B1D[:, 0]))
            hidden_B1D = feed(made[-1], is_image_B, start_B + self.image_positions[:, 1 + token, None])
        end_B = torch.full_like(ids_B, self.model.config.vision_end_token_id)
        hidden_B1D = feed(embed(end_B), is_image_B, start_B + self.image_positions[:, -1, None])
        for row, token_id in enumerate(tokens):
            if row in image_rows:
                self.image_embeds[row].append(torch.stack([embeds[row] for embeds in made]))
                self.next_positions[row] += 2 + self.image_advance
            elif token_id is not None:
                self.next_positions[row] += 1
        return torch.where(is_image_B[:, None], self._logits(hidden_B1D), logits_BV)

    def _forward(self, embeds_BLD: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.model(
            inputs_embeds=embeds_BLD,
            attention_mask=self.attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _logits(self, hidden_BLD: Tensor) -> Tensor:
        return self.model.lm_head(hidden_BLD[:, -1]).float()


def _end_tokens(model: NexusGenForConditionalGeneration) -> tuple[set[int], int]:
    """(ids that end a reply, id that pads behind it), from the generation config or else the model's."""
    text_config: Any = model.config.text_config
    generation_config: Any = model.generation_config
    ends = generation_config.eos_token_id if generation_config.eos_token_id is not None else text_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pads = [generation_config.pad_token_id, text_config.pad_token_id, *sorted(ends), 0]
    return ends, next(pad for pad in pads if pad is not None)


def _rectangle(prompts: list[list[int]], replies: list[list[int]], like: Tensor) -> Tensor:
    """(B, longest) token ids seen so far for the processors; shorter rows repeat their last token."""
    rows = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    longest = max(map(len, rows))
    return like.new_tensor([row + row[-1:] * (longest - len(row)) for row in rows])
