"""The autoregressive model against the published code's outputs, and the rules that no golden case shows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_gen.language.checkpoint import load_autoregressive
from nexus_gen.language.model import (
    LossWeights,
    NexusGenForConditionalGeneration,
    embedding_loss,
    index_within_runs,
    mean_or_zero,
    predicts,
    replace_rows,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "ar"
BATCH_KEYS = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw")
TOLERANCE = 1e-4  # relative, float32; measured worst over all cases: 7.1e-7 (predicted_embeds of train_editing)


@pytest.fixture
def model() -> NexusGenForConditionalGeneration:
    return load_autoregressive(GOLDEN, dtype=torch.float32)


def golden_batch(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case = load_file(GOLDEN / f"train_{name}.safetensors")
    return case, {key: case[key] for key in BATCH_KEYS}


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert error <= TOLERANCE, f"{what}: {error:.2e}"


@pytest.mark.parametrize("name", ["generation", "understanding", "editing", "mixed"])
def test_forward_and_gradients_equal_the_published_ones(model: NexusGenForConditionalGeneration, name: str) -> None:
    case, batch = golden_batch(name)
    real_BS1 = case["attention_mask"].unsqueeze(-1)

    position_ids = model.rope_position_ids(case["input_ids"], case["attention_mask"], case["image_grid_thw"])
    assert torch.equal(position_ids, case["position_ids"])
    vision_embeds = model.vision_embeds(case["pixel_values"], case["image_grid_thw"])
    assert_near(vision_embeds, case["vision_embeds"], "vision_embeds")
    spliced = model.splice_inputs(case["input_ids"], case["labels"], case["pixel_values"], case["image_grid_thw"])
    assert_near(spliced.inputs_embeds, case["inputs_embeds"], "inputs_embeds")

    output = model(**batch, all_positions=True)
    assert_near(output.target_embeds, case["target_image_embeds"], "target_image_embeds")
    assert_near(output.logits * real_BS1, case["logits"], "logits")
    assert_near(output.image_embeddings * real_BS1, case["image_embeddings"], "image_embeddings")
    weights = model.loss_weights
    assert_near(output.loss.reshape(1), case["loss"], "loss")
    assert_near(weights.text * output.text_loss.reshape(1), case["text_loss_weighted"], "text loss")
    assert_near(weights.image * output.image_loss.reshape(1), case["image_loss_weighted"], "image loss")
    predicting = predicts(case["labels"] == model.config.image_token_id)
    assert_near(output.predicted_embeds, case["image_embeddings"][predicting], "predicted_embeds")

    output.loss.backward()
    parameters = dict(model.named_parameters())
    for key in (key for key in case if key.startswith("grad_norm.")):
        in_memory = key.removeprefix("grad_norm.").replace("model.", "model.language_model.")
        gradient = parameters[in_memory].grad
        assert gradient is not None
        assert_near(gradient.norm().reshape(1), case[key], key)


def test_a_text_batch_touches_every_parameter_with_zero_weight(model: NexusGenForConditionalGeneration) -> None:
    input_ids = torch.arange(24).reshape(2, 12)
    output = model(input_ids=input_ids, labels=input_ids.clone())
    output.loss.backward()
    assert output.image_loss.item() == 0.0
    assert output.loss.item() == pytest.approx(model.loss_weights.text * output.text_loss.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "visual" in name or "vision_head" in name or "prefill" in name:
            assert not parameter.grad.any(), name


def test_a_batch_without_targets_keeps_user_images(model: NexusGenForConditionalGeneration) -> None:
    _, batch = golden_batch("understanding")
    output = model(**batch)
    output.loss.backward()
    assert output.image_loss.item() == 0.0 and output.predicted_embeds.shape == (0, 64)
    assert model.image_prefill_embeds.weight.grad is not None and not model.image_prefill_embeds.weight.grad.any()
    assert model.model.visual.patch_embed.proj.weight.grad.any(), "context images train the tower"


def test_a_batch_without_any_label_has_zero_loss(model: NexusGenForConditionalGeneration) -> None:
    _, batch = golden_batch("understanding")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == 0.0


def test_targets_get_prefill_embeddings_in_order_and_context_stays(model: NexusGenForConditionalGeneration) -> None:
    case, _ = golden_batch("mixed")
    spliced = model.splice_inputs(case["input_ids"], case["labels"], case["pixel_values"], case["image_grid_thw"])
    is_image = case["input_ids"] == model.config.image_token_id
    is_target = case["labels"] == model.config.image_token_id
    prefill = model.image_prefill_embeds.weight
    assert torch.equal(spliced.inputs_embeds[is_target], prefill.repeat(4, 1)), "four targets, two in one row"
    vision_ND = model.vision_embeds(case["pixel_values"], case["image_grid_thw"])
    assert torch.equal(spliced.inputs_embeds[is_image & ~is_target], vision_ND[~is_target[is_image]])
    assert torch.equal(spliced.target_embeds, vision_ND[is_target[is_image]])
    assert not spliced.target_embeds.requires_grad


def test_target_images_send_no_gradient_into_the_tower(model: NexusGenForConditionalGeneration) -> None:
    _, batch = golden_batch("generation")
    model(**batch).loss.backward()
    for name, parameter in model.model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_frozen_tower_builds_no_graph(model: NexusGenForConditionalGeneration) -> None:
    case, batch = golden_batch("editing")
    expected = model(**batch).loss
    model.model.visual.requires_grad_(False)
    assert not model.vision_embeds(case["pixel_values"], case["image_grid_thw"]).requires_grad
    assert model(**batch).loss == expected


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_leaves_gradients_alone(model: NexusGenForConditionalGeneration, use_reentrant: bool) -> None:
    _, batch = golden_batch("editing")
    model.train()
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_loss_is_near_and_in_float32(model: NexusGenForConditionalGeneration) -> None:
    case, batch = golden_batch("mixed")
    output = model.to(torch.bfloat16)(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(case["loss"].item(), rel=0.01)  # measured 2.2e-4


def test_a_packed_row_equals_its_parts(model: NexusGenForConditionalGeneration) -> None:
    parts = [golden_batch(name)[0] for name in ("generation", "editing")]
    separate = [model(**{key: part[key] for key in BATCH_KEYS}) for part in parts]
    text_positions = torch.cat([torch.arange(part["input_ids"].shape[1]) for part in parts])
    rope_positions = torch.cat([part["position_ids"] for part in parts], dim=2)
    packed = model(
        input_ids=torch.cat([part["input_ids"] for part in parts], dim=1),
        labels=torch.cat([part["labels"] for part in parts], dim=1),
        position_ids=torch.cat([text_positions.expand(1, 1, -1), rope_positions]),
        pixel_values=torch.cat([part["pixel_values"] for part in parts]),
        image_grid_thw=torch.cat([part["image_grid_thw"] for part in parts]),
    )
    for field in ("predicted_embeds", "target_embeds"):
        assert_near(packed[field], torch.cat([output[field] for output in separate]), field)


def test_loss_weights_combine_the_parts(model: NexusGenForConditionalGeneration) -> None:
    _, batch = golden_batch("generation")
    model.loss_weights = LossWeights(text=0.1, image=2.0, mse_share=1.0)
    output = model(**batch)
    mse = (output.predicted_embeds - output.target_embeds).pow(2).mean()
    assert output.image_loss.item() == pytest.approx(mse.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(0.1 * output.text_loss.item() + 2.0 * mse.item(), rel=1e-5)


def test_embedding_loss_by_hand() -> None:
    predicted, target = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # MSE (4 + 0 + 1 + 1) / 4 = 1.5; cosines 1 and 0, so the mean distance is 0.5
    assert embedding_loss(predicted, target, mse_share=0.5).mean().item() == pytest.approx(0.5 * 1.5 + 0.5 * 0.5)
    assert mean_or_zero(embedding_loss(predicted[:0], target[:0], mse_share=0.5)).item() == 0.0


def test_index_within_runs_restarts_at_every_run() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 1]]).bool()
    assert index_within_runs(mask).tolist() == [0, 1, 0, 1, 2, 0, 0]


def test_disagreeing_counts_are_errors(model: NexusGenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="3 image tokens in the sequences but 2 image embeddings"):
        replace_rows(torch.zeros(1, 4, 2), torch.tensor([[True, True, False, True]]), torch.zeros(2, 2))
    case, _ = golden_batch("generation")
    side = 20  # 100 tokens
    input_ids = torch.tensor([[1, 315, *[318] * 100, 316]])
    pixel_values = case["pixel_values"].repeat(2, 1)[: side * side]
    with pytest.raises(ValueError, match="100 tokens, more than the 81"):
        model.splice_inputs(input_ids, input_ids, pixel_values, torch.tensor([[1, side, side]]))


def test_inference_forward_is_qwens(model: NexusGenForConditionalGeneration) -> None:
    case, _ = golden_batch("understanding")
    keys = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    logits = model(**{key: case[key] for key in keys}).logits
    assert_near(logits, case["logits"], "logits")  # measured 5e-7: an understanding case has no target to splice
