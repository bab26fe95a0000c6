"""Generation against the published code's outputs and against a decoder that takes one step at a time, uncached."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import left_padded, reply_one_by_one
from torch import Tensor

from nexus_gen.language.checkpoint import load_autoregressive, load_vision_tower
from nexus_gen.language.generate import (
    PositionsAfterImage,
    Sampling,
    _end_tokens,
    generate_reply,
    generated_embeddings,
    reply_text,
    teacher_forced_pairs,
    vision_embeddings,
)
from nexus_gen.language.model import NexusGenForConditionalGeneration

GOLDEN = Path(__file__).parents[2] / "golden" / "ar"
TOLERANCE = 1e-4  # relative, float32; measured worst: 8.1e-7 against the published code, 6.5e-7 against one-by-one


@pytest.fixture
def model() -> NexusGenForConditionalGeneration:
    return load_autoregressive(GOLDEN, dtype=torch.float32)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def emit_images_instead_of(model: NexusGenForConditionalGeneration, token: int) -> None:
    """Make vision_start win wherever `token` would have won with a positive logit."""
    with torch.no_grad():
        model.lm_head.weight[model.config.vision_start_token_id] = 1.001 * model.lm_head.weight[token]


@pytest.mark.parametrize("name", ["text", "image"])
def test_generation_equals_the_published_one(model: NexusGenForConditionalGeneration, name: str) -> None:
    case = load_file(GOLDEN / f"generate_{name}_prompt.safetensors")
    max_new_tokens = case["sequences"].shape[1] - case["input_ids"].shape[1]
    reply = generate_reply(
        model,
        case["input_ids"],
        pixel_values=case.get("pixel_values"),
        image_grid_thw=case.get("image_grid_thw"),
        max_new_tokens=max_new_tokens,
        force_image_first=True,
    )
    assert torch.equal(reply.sequences, case["sequences"])
    assert_near(reply.image_embeds[0][0], case["output_image_embeddings"][0])


@pytest.mark.parametrize("grid", [(8, 10), (11, 7), (6, 12)])
def test_an_image_of_another_aspect_is_what_training_predicts(
    model: NexusGenForConditionalGeneration, grid: tuple[int, int]
) -> None:
    config, case = model.config, load_file(GOLDEN / "generate_text_prompt.safetensors")
    reply = generate_reply(
        model,
        case["input_ids"],
        max_new_tokens=grid[0] * grid[1] + 4,
        force_image_first=True,
        positions_after_image="trained",
        target_grid=grid,
    )
    image = [config.image_token_id] * (grid[0] * grid[1])
    assert reply.new_tokens[0][: len(image) + 2].tolist() == [
        config.vision_start_token_id,
        *image,
        config.vision_end_token_id,
    ]
    labels = reply.sequences.clone()
    labels[:, : case["input_ids"].shape[1]] = -100
    patch_values = model.model.visual.config.in_channels * 2 * model.model.visual.config.patch_size**2
    with torch.no_grad():
        output = model(
            input_ids=reply.sequences,
            labels=labels,
            pixel_values=torch.randn(4 * len(image), patch_values, generator=torch.Generator().manual_seed(0)),
            image_grid_thw=torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]),
            all_positions=True,
        )
    assert_near(reply.image_embeds[0][0], output.predicted_embeds)
    behind = output.logits[0, -len(reply.new_tokens[0]) + len(image) + 1 : -1].argmax(-1)  # text after the image
    assert behind.tolist() == reply.new_tokens[0][len(image) + 2 :].tolist()


def test_a_grid_without_prefill_embeddings_is_refused(model: NexusGenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"target_grid \(7, 12\) is none of \(9, 9\), "):
        generate_reply(model, torch.tensor([[1, 2]]), max_new_tokens=5, target_grid=(7, 12))


@pytest.mark.parametrize(("convention", "image_advance"), [("published", 81), ("trained", 9)])
def test_batched_one_pass_equals_one_by_one(
    model: NexusGenForConditionalGeneration, convention: PositionsAfterImage, image_advance: int
) -> None:
    case = load_file(GOLDEN / "generate_image_prompt.safetensors")
    rows = [case["input_ids"][0].tolist(), [101, 102, 103, 104], list(range(20, 40))]
    emit_images_instead_of(model, token=31)
    model.generation_config.eos_token_id = []
    input_ids, attention_mask = left_padded(rows, padding=313)
    replies = generate_reply(
        model,
        input_ids,
        attention_mask,
        case["pixel_values"],
        case["image_grid_thw"],
        max_new_tokens=100,
        positions_after_image=convention,
    )
    starts = []
    for row, prompt in enumerate(rows):
        pictures = (case["pixel_values"], case["image_grid_thw"]) if row == 0 else (None, None)
        tokens, images = reply_one_by_one(model, torch.tensor([prompt]), *pictures, 100, image_advance)
        assert replies.new_tokens[row].tolist() == tokens
        assert len(images) == len(replies.image_embeds[row])
        for actual, expected in zip(replies.image_embeds[row], images, strict=True):
            assert_near(actual, expected)
        starts.append([place for place, token in enumerate(tokens) if token == model.config.vision_start_token_id])
    assert len({tuple(places) for places in starts}) == 3, "the rows reach their images at different steps"
    assert max(map(len, starts)) > 1, "a reply with several images is among them"


def test_teacher_forcing_gives_what_generation_gave(model: NexusGenForConditionalGeneration) -> None:
    case = load_file(GOLDEN / "generate_image_prompt.safetensors")
    target = load_file(GOLDEN / "train_generation.safetensors")
    labels = case["sequences"].clone()
    labels[:, : case["input_ids"].shape[1]] = -100
    batch = {
        "input_ids": case["sequences"],
        "labels": labels,
        "pixel_values": torch.cat([case["pixel_values"], target["pixel_values"]]),
        "image_grid_thw": torch.cat([case["image_grid_thw"], target["image_grid_thw"]]),
    }
    ((embeds, _),) = teacher_forced_pairs(model, batch)
    assert_near(embeds, case["output_image_embeddings"][0])


def test_teacher_forcing_of_a_batch_without_targets_gives_nothing(model: NexusGenForConditionalGeneration) -> None:
    case = load_file(GOLDEN / "train_mixed.safetensors")
    keys = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw")
    batch = {key: case[key] for key in keys} | {"labels": torch.full_like(case["labels"], -100)}
    assert teacher_forced_pairs(model, batch) == []
    text = torch.tensor([[5, 6, 7]])
    assert teacher_forced_pairs(model, {"input_ids": text, "labels": text}) == []  # without pictures at all


class Bytes:
    """A tokenizer of UTF-8's bytes."""

    def decode(self, tokens: Tensor, skip_special_tokens: bool) -> str:
        return bytes(token for token in tokens.tolist() if token < 256).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("words", "cut", "read"),
    [
        ("三角形", 1, "三角"),
        ("三角形", 2, "三角"),
        ("三角形", 3, "三角"),
        ("a 🙂", 2, "a"),
        ("a 🙂", 0, "a 🙂"),
        ("é", 1, ""),
    ],
)
def test_a_reply_ends_with_a_whole_character(
    words: str, cut: int, read: str, model: NexusGenForConditionalGeneration
) -> None:
    data = words.encode()
    assert reply_text(Bytes(), model, torch.tensor(list(data[: len(data) - cut]))) == read


def test_a_reply_that_came_to_its_end_is_not_cut(model: NexusGenForConditionalGeneration) -> None:
    end = _end_tokens(model)[0].pop()
    data = [*"a\ufffd".encode(), *([end] if end >= 256 else [])]
    assert reply_text(Bytes(), model, torch.tensor(data)) == "a\ufffd"
    assert reply_text(Bytes(), model, torch.tensor([], dtype=torch.long)) == ""


def test_teacher_forcing_splits_the_images_of_a_batch(model: NexusGenForConditionalGeneration) -> None:
    case = load_file(GOLDEN / "train_mixed.safetensors")
    keys = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw")
    embeds = [predicted for predicted, _ in teacher_forced_pairs(model, {key: case[key] for key in keys})]
    assert [tuple(image.shape) for image in embeds] == [(81, 64)] * 4
    starts = ((case["labels"] == 318) & (case["input_ids"].roll(1, dims=1) == 315)).nonzero().tolist()
    for image, (row, start) in zip(embeds, starts, strict=True):
        assert_near(image, case["image_embeddings"][row, start - 1 : start + 80])


@torch.no_grad()
def test_what_a_batch_generates_is_what_one_pass_predicts_of_first_images(
    model: NexusGenForConditionalGeneration,
) -> None:
    case = load_file(GOLDEN / "train_mixed.safetensors")
    keys = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw")
    batch = {key: case[key] for key in keys}
    predicted = [embeds for embeds, _ in teacher_forced_pairs(model, batch)]
    targets = ((case["labels"] == 318) & (case["input_ids"].roll(1, dims=1) == 315)).sum(dim=1).tolist()
    firsts = [sum(targets[:row]) for row, count in enumerate(targets) if count]
    assert len(firsts) < len(predicted) and len(firsts) < len(targets)  # a second image, a row without one
    generated = generated_embeddings(model, batch)
    assert sorted(generated) == firsts
    for image, embeds in generated.items():
        assert_near(embeds, predicted[image])

    passes = []
    hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    generated_embeddings(model, batch)
    with_images = len(passes)
    assert generated_embeddings(model, {**batch, "labels": torch.full_like(case["labels"], -100)}) == {}
    hook.remove()
    assert len(passes) == 2 * with_images > 0


def test_an_image_begun_within_the_budget_is_finished(model: NexusGenForConditionalGeneration) -> None:
    reply = generate_reply(model, torch.tensor([[5, 6, 7]]), max_new_tokens=1, force_image_first=True)
    assert reply.new_tokens[0].tolist() == [315, *[318] * 81, 316]
    assert reply.image_embeds[0][0].shape == (81, 64)


def test_rows_end_at_an_end_token_and_are_padded(model: NexusGenForConditionalGeneration) -> None:
    input_ids, mask = left_padded([[5, 6, 7], [8, 9, 10, 11, 12]], padding=313)
    free = generate_reply(model, input_ids, mask, max_new_tokens=12)
    end = int(free.new_tokens[0][2])
    model.generation_config.eos_token_id = end
    reply = generate_reply(model, input_ids, mask, max_new_tokens=12)
    for row, tokens in enumerate(free.new_tokens):
        expected = tokens.tolist()
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert reply.new_tokens[row].tolist() == expected
        padding = reply.sequences[row, input_ids.shape[1] + len(expected) :]
        assert (padding == 313).all()
    assert len(reply.new_tokens[0]) < len(reply.new_tokens[1])


def test_sampling_repeats_with_its_seed_and_narrows_to_greedy(model: NexusGenForConditionalGeneration) -> None:
    prompt = torch.tensor([[5, 6, 7]])

    def sample(options: Sampling, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        reply = generate_reply(model, prompt, max_new_tokens=16, sampling=options, generator=generator)
        return reply.new_tokens[0].tolist()

    warm = Sampling(do_sample=True, temperature=2.0)
    assert sample(warm, 1) == sample(warm, 1) != sample(warm, 2)
    greedy = sample(Sampling(), 0)
    assert sample(Sampling(do_sample=True, top_k=1), 3) == greedy
    assert sample(Sampling(do_sample=True, top_p=1e-6), 4) == greedy
    unrepeated = sample(Sampling(repetition_penalty=1e6), 0)
    assert len(set(unrepeated)) == len(unrepeated) > len(set(greedy))


def test_unusable_requests_are_errors(model: NexusGenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="padded on the left"):
        generate_reply(model, torch.tensor([[5, 6]]), torch.tensor([[1, 0]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="force_image_first"):
        generate_reply(model, torch.tensor([[5, 315]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(do_sample=True, temperature=0)


def test_the_tower_alone_gives_the_same_embeddings(model: NexusGenForConditionalGeneration) -> None:
    case = load_file(GOLDEN / "train_editing.safetensors")
    tower = load_vision_tower(GOLDEN, dtype=torch.float32)
    alone = vision_embeddings(tower, case["pixel_values"], case["image_grid_thw"])
    assert_near(alone, case["vision_embeds"])
    assert torch.equal(alone, vision_embeddings(model, case["pixel_values"], case["image_grid_thw"]))


@torch.no_grad()
def test_embeddings_that_are_fed_back_come_out_as_in_one_pass(model: NexusGenForConditionalGeneration) -> None:
    model.config.target_inputs = "embeddings"
    prompts = [[5, 6, 7, 8, 9], [5, 6]]
    input_ids, attention_mask = left_padded(prompts, padding=0)
    reply = generate_reply(model, input_ids, attention_mask, max_new_tokens=85, force_image_first=True)
    embed = model.get_input_embeddings()
    side = torch.arange(9)
    grid = torch.stack([torch.zeros(81), side.repeat_interleave(9), side.repeat(9)]).long()
    for row, prompt in enumerate(prompts):
        (made,) = reply.image_embeds[row]
        text = embed(torch.tensor([*prompt, model.config.vision_start_token_id]))
        before = torch.arange(len(text)).expand(3, -1)
        positions = torch.cat([before, len(text) + grid], dim=1)[:, None]
        embeds = torch.cat([text, made])[None]
        hidden = model.model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0]
        assert_near(made, model.vision_head(hidden[len(prompt) : len(prompt) + 81]))
        assert reply.new_tokens[row][82] == model.config.vision_end_token_id
    model.config.target_inputs = "prefill"
    assert not torch.allclose(
        generate_reply(model, input_ids, attention_mask, max_new_tokens=83, force_image_first=True).image_embeds[0][0],
        reply.image_embeds[0][0],
    )
