"""Tiny language models, and replies of theirs by running everything again for each token."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive
from nexus_gen.language.model import NexusGenForConditionalGeneration
from nexus_gen.specs.geometry import LanguageGeometry, VisionGeometry

TOKENS = SpecialTokenIds(image=90, video=91, vision_start=92, vision_end=93, end_of_turn=94, padding=95)


def tiny(width: int, seed: int = 0, num_target_tokens: int = 81) -> NexusGenForConditionalGeneration:
    vision = VisionGeometry(
        patch_size=4,
        hidden_size=16,
        intermediate_size=24,
        depth=2,
        num_heads=2,
        window_size=32,
        fullatt_block_indexes=[1],
    )
    language = LanguageGeometry(
        vocab_size=96,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        mrope_section=[width // 4 - 4, 2, 2],
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )
    return build_autoregressive(vision, language, TOKENS, seed=seed, num_target_tokens=num_target_tokens)


def left_padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side="left")
    return input_ids, mask


@torch.no_grad()
def reply_one_by_one(
    model: NexusGenForConditionalGeneration,
    prompt: Tensor,
    pixel_values: Tensor | None,
    image_grid_thw: Tensor | None,
    max_new_tokens: int,
    image_advance: int,
    force_image_first: bool = False,
) -> tuple[list[int], list[Tensor]]:
    """A greedy reply that runs the whole sequence again for every single position. prompt: (1, S)."""
    config = model.config
    embeds = model.splice_inputs(prompt, None, pixel_values, image_grid_thw).inputs_embeds
    positions = model.rope_position_ids(prompt, None, image_grid_thw)
    cursor = int(positions.max()) + 1
    reply: list[int] = []
    images: list[Tensor] = []

    def output() -> Tensor:
        return model.model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[:, -1]

    def append(embed_D: Tensor, position: tuple[int, int, int]) -> None:
        nonlocal embeds, positions
        embeds = torch.cat([embeds, embed_D.reshape(1, 1, -1)], dim=1)
        positions = torch.cat([positions, torch.tensor(position).reshape(3, 1, 1)], dim=2)

    embedding = model.get_input_embeddings().weight
    while len(reply) < max_new_tokens:
        logits = model.lm_head(output())
        logits[:, config.vision_end_token_id] = -torch.inf
        token = int(logits.argmax())
        if force_image_first and not reply:
            token = config.vision_start_token_id
        reply.append(token)
        append(embedding[token], (cursor,) * 3)
        cursor += 1
        if token == config.vision_start_token_id:
            predicted = []
            for k in range(81):
                predicted.append(model.vision_head(output())[0])
                append(model.image_prefill_embeds.weight[k], (cursor, cursor + k // 9, cursor + k % 9))
            images.append(torch.stack(predicted))
            cursor += image_advance
            append(embedding[config.vision_end_token_id], (cursor,) * 3)
            cursor += 1
            reply += [config.image_token_id] * 81 + [config.vision_end_token_id]
    return reply, images
