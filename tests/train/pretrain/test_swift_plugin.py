"""Swift's template against the encoding of inference, and a training run through swift's own pipeline."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken import BROKEN
from safetensors.torch import load_file
from tiny_qwen import PATCH_SIZE, ROWS, write_checkpoint, write_rows
from torch import distributed

from data.mixture.order import Mixture
from nexus_gen.artifacts.artifact import verify
from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import encode
from nexus_gen.language.model import IGNORE_INDEX, NexusGenForConditionalGeneration
from nexus_gen.pictures.images import open_image
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS, patches_per_side
from train.pretrain.callbacks import HeldoutLoss
from train.pretrain.plugin import NAME, NexusGenTemplate
from train.pretrain.stream import MessageStream, Quarantine
from train.steps.clock import StepClock

MAX_PIXELS = 3000  # less than either picture has
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen"
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def build_template(qwen: Path, **options: Any) -> NexusGenTemplate:
    """The template as swift builds it for training, with the model that computes position ids."""
    from swift.model import get_model_processor
    from swift.template import get_template

    model, processor = get_model_processor(str(qwen), model_type=NAME, torch_dtype=torch.float32)
    assert isinstance(model, NexusGenForConditionalGeneration)
    options = {"max_length": 1000, "max_pixels": MAX_PIXELS, **options}
    template = get_template(processor, template_type=NAME, **options)
    template.set_mode("train")
    template.model = model
    template.register_post_encode_hook([model])  # as the trainer does
    assert isinstance(template, NexusGenTemplate)
    return template


@pytest.fixture(scope="module")
def template(qwen: Path) -> NexusGenTemplate:
    return build_template(qwen)


def swift_row(task: str, rows: Path) -> dict[str, Any]:
    return {"messages": ROWS[task]["messages"], "images": [str(rows.parent / name) for name in ROWS[task]["images"]]}


@pytest.mark.parametrize("num_target_tokens", [81, 25])
@pytest.mark.parametrize("task", ROWS)
def test_a_row_is_encoded_as_inference_encodes_it(task: str, num_target_tokens: int, qwen: Path, rows: Path) -> None:
    processor, template = load_processor(qwen), build_template(qwen)
    template.num_target_tokens = num_target_tokens
    row = swift_row(task, rows)
    pictures = [open_image(path) for path in row["images"]]
    expected = encode(processor, row["messages"], pictures, MAX_PIXELS, num_target_tokens=num_target_tokens)
    encoded = template.encode(row)
    assert encoded["input_ids"] == expected["input_ids"].tolist()
    labels = torch.tensor(encoded["labels"])
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(labels == image_token, expected["labels"] == image_token)
    batch = template.data_collator([encoded])
    if row["images"]:
        assert batch["pixel_values"].dtype == torch.uint8
    batch = template._post_encode(template.model, batch)
    for name in ("pixel_values", "image_grid_thw"):
        assert (name in batch) == (name in expected) == bool(row["images"])
        assert name not in expected or torch.equal(batch[name], expected[name])


@pytest.mark.parametrize("task", ROWS)
def test_replies_and_their_ends_are_the_text_labels(task: str, template: NexusGenTemplate, rows: Path) -> None:
    row = swift_row(task, rows)
    encoded = template.encode(row)
    labels = torch.tensor(encoded["labels"])
    replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    markup = "<|vision_start|>" + "<|image_pad|>" * RELEASED_TARGET_TOKENS + "<|vision_end|>"
    learned = template.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert learned == "".join(f"{reply}<|im_end|>\n" for reply in replies).replace("<image>", markup)
    assert torch.equal(labels[labels != IGNORE_INDEX], torch.tensor(encoded["input_ids"])[labels != IGNORE_INDEX])


def test_targets_are_squashed_and_context_is_bounded(template: NexusGenTemplate, rows: Path) -> None:
    context, target = template.encode(swift_row("editing", rows))["image_grid_thw"].tolist()
    assert target == [1, *[patches_per_side(RELEASED_TARGET_TOKENS)] * 2]
    assert context[2] > context[1]  # 150 x 61 keeps its aspect
    assert context[1] * context[2] * PATCH_SIZE**2 <= MAX_PIXELS


def test_targets_of_dynamic_aspect_are_learned(qwen: Path, rows: Path) -> None:
    template = build_template(qwen)
    template.dynamic_targets = template.consistent_edit_scale = True
    encoded = template.encode(swift_row("editing", rows))
    assert encoded["image_grid_thw"].tolist() == [[1, 24, 12]] * 2  # tall.png is 40 x 90
    batch = template.data_collator([encoded, template.encode(swift_row("several turns and images", rows))])
    output = template.model(**batch)
    output.loss.backward()
    image_tokens = batch["labels"] == template.image_token_id
    assert len(output.predicted_embeds) == image_tokens.sum() == 72 * 2 + 72
    gradient = template.model.image_prefill_embeds.weight.grad
    assert gradient[:72].abs().sum(dim=1).all() and not gradient[72:].any()


def test_a_mixed_batch_is_positioned_as_its_rows_are(template: NexusGenTemplate, rows: Path) -> None:
    encoded = [template.encode(swift_row(task, rows)) for task in ROWS]
    batch = template.data_collator([dict(row) for row in encoded])
    assert batch["image_grid_thw"].shape[0] == sum(len(row["images"]) for row in ROWS.values())
    patches = [template.data_collator([dict(row)])["pixel_values"] for row in encoded if "pictures" in row]
    assert torch.equal(batch["pixel_values"], torch.cat(patches))
    for index, row in enumerate(encoded):
        length = len(row["input_ids"])
        alone = template.model.rope_position_ids(torch.tensor([row["input_ids"]]), None, row.get("image_grid_thw"))
        assert torch.equal(batch["position_ids"][:, index, :length], alone[:, 0])
        assert batch["attention_mask"][index].sum() == length
        assert (batch["labels"][index, length:] == IGNORE_INDEX).all()


def test_padding_changes_no_loss(template: NexusGenTemplate, rows: Path) -> None:
    row = template.encode(swift_row("generation", rows))
    longer = template.encode(swift_row("several turns and images", rows))

    def losses(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            output = template.model(**batch)
        return torch.stack([output.text_loss, output.image_loss])

    alone = losses(template.data_collator([dict(row)]))
    padded = template.data_collator([dict(row), dict(longer)])
    padded["labels"][1] = IGNORE_INDEX
    torch.testing.assert_close(losses(padded), alone, rtol=1e-5, atol=0)  # measured 3e-7


def test_generated_pictures_are_measured_on_what_the_loss_is_computed_on(
    template: NexusGenTemplate, rows: Path, process_group: None
) -> None:
    """In one pass over prefill embeddings, what is generated is what teacher forcing predicts: the errors are equal."""
    tasks = ["generation", "editing", "understanding", "editing"]
    encoded = [template.encode(swift_row(task, rows)) for task in tasks]
    batches = [template.data_collator([dict(row) for row in part]) for part in (encoded[:2], encoded[2:])]
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in batches)
    config: Any = SimpleNamespace(every_steps=0, num_samples=4)
    measuring: dict[str, Any] = {"guard": None, "metrics": None, "config": config, "average": None, "generates": True}
    measuring["clock"] = StepClock()
    model = template.model
    measured = HeldoutLoss(model=model, batches=batches, prepare=template.prepared, **measuring).measure()
    model.eval()
    with torch.no_grad():
        forced = [model(**template.prepared(batch)) for batch in batches]
    predicted, target = (
        torch.cat([getattr(out, f"{side}_embeds") for out in forced]) for side in ("predicted", "target")
    )
    mse = float((predicted - target).square().mean())
    cosine_distance = float(1 - torch.nn.functional.cosine_similarity(predicted, target, dim=-1).mean())
    for made in ("image", "generated"):
        assert measured[f"heldout/{made}_mse"] == pytest.approx(mse, rel=1e-5), made
        assert measured[f"heldout/{made}_cosine_distance"] == pytest.approx(cosine_distance, rel=1e-5), made
    assert measured["heldout/image_loss"] == pytest.approx((mse + cosine_distance) / 2, rel=1e-5)
    assert "heldout/image_loss/understanding" not in measured


def test_a_prepared_batch_stays_as_it_is(template: NexusGenTemplate, rows: Path) -> None:
    batch = template.data_collator([template.encode(swift_row("editing", rows))])
    prepared = template.prepared(batch)
    assert prepared["pixel_values"].is_floating_point()
    assert template.prepared(prepared)["pixel_values"] is prepared["pixel_values"]


def stream(path: Path, encode_row: Any, max_bad_fraction: float = 0.0) -> MessageStream:
    mixture = Mixture(path, seed=3)
    quarantine = Quarantine(path.parent / "bad", 0, max_bad_fraction=max_bad_fraction, num_rows=len(mixture))
    return MessageStream(mixture, encode_row, quarantine, num_samples=20, micro_batch_size=2, world_size=1)


def test_too_long_a_row_stops_with_both_numbers(qwen: Path, rows: Path) -> None:
    short = build_template(qwen, max_length=120)
    assert len(short.encode(swift_row("text", rows))["input_ids"]) <= 120
    with pytest.raises(UserError, match=rf"{rows}:\d: \d+ tokens where data.max_length is 120"):
        list(map(stream(rows, short.encode).__getitem__, range(5)))


def test_a_missing_picture_is_named_with_its_row(template: NexusGenTemplate, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    (tmp_path / "wide.png").unlink()
    with pytest.raises(UserError, match=r"train.jsonl:\d: picture .*wide.png does not exist"):
        list(map(stream(path, template.encode).__getitem__, range(5)))


def test_bad_rows_are_replaced_where_they_may_be(qwen: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    (tmp_path / "wide.png").unlink()
    short = build_template(qwen, max_length=120)
    samples = list(map(stream(path, short.encode, max_bad_fraction=0.9).__getitem__, range(10)))
    assert all(len(sample["input_ids"]) <= 120 for sample in samples)
    quarantined = map(json.loads, (tmp_path / "bad" / "rank0.jsonl").read_text().splitlines())
    kinds = {row["where"].rpartition(":")[2]: row["kind"] for row in quarantined}
    assert kinds == {"1": "picture", "2": "length", "3": "picture", "5": "picture"}  # the fourth is the text


def test_no_broken_row_reaches_the_trainer(qwen: Path, tmp_path: Path) -> None:
    template = build_template(qwen, max_length=10_000)
    for number, broken in enumerate(BROKEN):
        directory = tmp_path / str(number)
        directory.mkdir()
        mixture = Mixture(broken.write(directory), seed=3)
        assert len(mixture) == broken.num_rows
        quarantine = Quarantine(directory / "bad", 0, max_bad_fraction=0.99, num_rows=len(mixture))
        samples = MessageStream(mixture, template.encode, quarantine, num_samples=8, micro_batch_size=1, world_size=1)
        if broken.num_rows > 1:
            assert all(sample["input_ids"] for sample in map(samples.__getitem__, range(8))), broken.name
        else:
            with pytest.raises(UserError, match="1 bad rows of 1 "):
                samples[0]
        (entry,) = map(json.loads, (directory / "bad" / "rank0.jsonl").read_text().splitlines())
        assert entry["where"].startswith(str(directory)) and entry["where"].endswith(broken.where), broken.name
        assert entry["kind"] == ("picture" if broken.found_by == "listing" else broken.kind), broken.name


def image_mse(model: NexusGenForConditionalGeneration, qwen: Path, rows: Path) -> float:
    """Over the target image tokens of all rows, one row after the other, as inference reads them."""
    errors: list[float] = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pictures = [open_image(rows.parent / name) for name in row["images"]]
        inputs = encode(load_processor(qwen), row["messages"], pictures, MAX_PIXELS)
        if bool((inputs["labels"] != IGNORE_INDEX).any()):
            texts = {name: inputs[name][None] for name in ("input_ids", "labels")}
            with torch.no_grad():
                made = model(**texts, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
            errors += (made.predicted_embeds - made.target_embeds).square().mean(dim=1).tolist()
    return sum(errors) / len(errors)


@pytest.mark.slow
def test_two_steps_of_training_make_a_checkpoint(qwen: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", copies=2)
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("nexus-gen")), "run", "stage=pretrain", "name=run"),
            *(f"runs_dir={tmp_path / 'runs'}", f"model.qwen={qwen}", f"data.train={path}", f"data.heldout={path}"),
            *("data.max_length=1000", f"data.max_pixels={MAX_PIXELS}", "launch.device=cpu"),
            *("trainer.max_steps=2", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"),
            *("trainer.log_every_steps=1", "trainer.num_workers=1", "optim.warmup_steps=0"),
            *("objective.text_loss_weight=2", "objective.image_loss_weight=5", "objective.cosine_fraction=0.2"),
            *("average.decay=0.9", "average.export=raw"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,  # loader processes that outlive the stage would keep it
    )
    run_dir = tmp_path / "runs" / "run" / "pretrain"
    manifest = verify(run_dir / "artifact").require("ar_checkpoint", run_dir)
    assert manifest.details["max_pixels"] == MAX_PIXELS
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [row for row in lines if "train/loss" in row]
    assert [row["step"] for row in metrics] == [1, 2]
    heldout = [row for row in lines if "heldout/text_loss" in row]
    assert [row["step"] for row in heldout] == [2]
    assert 0 <= heldout[0]["heldout/accuracy/understanding"] <= 1 and heldout[0]["heldout/image_loss/editing"] > 0
    mse, cosine_distance = (heldout[0][f"heldout/image_{part}"] for part in ("mse", "cosine_distance"))
    assert heldout[0]["heldout/image_loss"] == pytest.approx(0.8 * mse + 0.2 * cosine_distance, rel=1e-5)
    for row in metrics:
        assert row["train/loss"] == pytest.approx(2 * row["train/text_loss"] + 5 * row["train/image_loss"], rel=1e-5)
        assert row["train/grad_norm"] > 0 and row["perf/samples_per_s"] > 0
    assert [row["train/lr"] for row in metrics] == pytest.approx([1e-3, 5e-4])  # half a cosine of two steps

    model = load_autoregressive(run_dir / "artifact", dtype=torch.float32).eval()
    assert heldout[0]["heldout/image_mse"] == pytest.approx(image_mse(model, qwen, path), rel=1e-4)  # the raw weights'
    trained = model.state_dict()
    before = load_file(qwen / "model.safetensors")
    frozen = [name for name in before if name.startswith("visual.")]
    assert frozen and all(torch.equal(trained[f"model.{name}"], before[name]) for name in frozen)
    assert not torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert load_processor(run_dir / "artifact").tokenizer.get_vocab() == load_processor(qwen).tokenizer.get_vocab()
    outside = [file for file in home.rglob("*") if file.is_file()]
    assert not outside
