"""The stand-ins of the downloads: layouts that the full-size loaders read, tokenizers, statistics, determinism."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from nexus_gen.artifacts.artifact import hash_file
from nexus_gen.decoders.checkpoint import load_flux, load_vae
from nexus_gen.flux.text_encoders import encode_prompt
from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import patches
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, LanguageGeometry, TextEncoderGeometry, VaeGeometry, VisionGeometry
from train.schemas.standins import StandinsConfig, StandinsModelConfig
from train.standins.stage import build_standins
from train.standins.tokenizers import QWEN_SPECIAL_TOKENS, train_clip_tokenizer, train_qwen_tokenizer
from train.standins.vae import build_vae, fit_vae, in_unit_range, reconstruction_psnr, stacked
from train.standins.vision import (
    bent,
    fit_vision,
    in_random_hues,
    one_fact_each,
    patch_values,
    target_embeddings,
    token_labels,
)

SIZE = 32
MODEL = StandinsModelConfig(
    transformer=FluxGeometry(48, 4, 1, 1, 24, 16, [4, 4, 4], 16, 2),
    vae=VaeGeometry([16, 16], 1, 4, 16),
    image_size=SIZE,
    num_target_tokens=81,
)
STANDINS = StandinsConfig(
    vision=VisionGeometry(4, 64, 128, 3, 4, 32, [1]),
    language=LanguageGeometry(512, 64, 96, 2, 2, 1, [4, 6, 6], 1e6, 1e-6),
    clip=TextEncoderGeometry(640, 16, 32, 2, 2),
    t5=TextEncoderGeometry(128, 24, 32, 2, 2),
    vae_steps=4,
    vae_batch_size=8,
    vision_steps=0,
    vision_batch_size=8,
    num_images=24,
)
CORPUS = [
    "A large red circle on a blue background",
    "What colour is the small square? It is green.",
    "Make the triangle yellow and remove the circle",
    "蓝色背景上有一个红色的大圆形",
    "把正方形变成绿色",
] * 3


def shape_pictures(count: int, seed: int) -> list[Image.Image]:
    """Rectangles and ellipses of random colours on random grounds."""
    rng = random.Random(seed)

    def colour() -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(3))

    pictures = []
    for _ in range(count):
        picture = Image.new("RGB", (SIZE, SIZE), colour())
        brush = ImageDraw.Draw(picture)
        for shape in (brush.rectangle, brush.ellipse):
            left, top = rng.randrange(SIZE - 10), rng.randrange(SIZE - 10)
            shape((left, top, left + rng.randrange(6, SIZE), top + rng.randrange(6, SIZE)), fill=colour())
        pictures.append(picture)
    return pictures


IMAGES = shape_pictures(24, seed=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("standins")
    return directory, build_standins(directory, MODEL, STANDINS, CORPUS, IMAGES, seed=3)


def hashes(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): hash_file(path) for path in directory.rglob("*") if path.is_file()}


def colours_of_cells(images: list[Image.Image], cell: int) -> torch.Tensor:
    """(pictures x 81, colours): mean colours of the cells, `cell` px wide, under each token of a 72 px picture."""
    pixels = in_unit_range(stacked([image.resize((72, 72), Image.Resampling.BICUBIC) for image in images]))
    means = torch.nn.functional.avg_pool2d(pixels, cell)
    per_token = 8 // cell
    cells = means.unflatten(3, (9, per_token)).unflatten(2, (9, per_token))  # B, 3, row, y, column, x
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)


def test_the_loaders_of_the_downloads_read_both_layouts(built):
    directory, details = built
    flux, qwen = directory / "FLUX.1-dev", directory / "Qwen2.5-VL-Instruct"
    assert load_flux(flux, MODEL.transformer, torch.float32).geometry == MODEL.transformer
    load_vae(flux, MODEL.vae, torch.float32)
    context, pooled = encode_prompt(flux, "A red circle", torch.float32)
    assert context.shape == (1, 512, 24)
    assert pooled.shape == (1, 16)
    model, processor = load_autoregressive(qwen, dtype=torch.float32), load_processor(qwen)
    tokenizer = processor.tokenizer
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.text_config.vocab_size == 512 >= len(tokenizer)
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
    }
    assert processor.image_processor.patch_size == 4
    size = json.loads((qwen / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 4 * 64, "longest_edge": 16384 * 64}
    assert details["num_parameters"].keys() == {"qwen", "vae", "transformer", "clip", "t5"}


def test_the_same_seed_writes_the_same_bytes_and_another_other_weights(built, tmp_path):
    build_standins(tmp_path / "again", MODEL, STANDINS, CORPUS, IMAGES, seed=3)
    assert hashes(tmp_path / "again") == hashes(built[0])
    build_standins(tmp_path / "other", MODEL, replace(STANDINS, vae_steps=1), CORPUS, IMAGES, seed=4)
    same = {name for name, value in hashes(tmp_path / "other").items() if value == hashes(built[0])[name]}
    assert not [name for name in same if name.endswith(".safetensors")]


def test_equally_frequent_pairs_are_merged_in_the_same_order_every_time():
    for train, vocab_size in ((train_clip_tokenizer, 640), (train_qwen_tokenizer, 512)):
        assert len({train(CORPUS, vocab_size).backend_tokenizer.to_str() for _ in range(40)}) == 1


def test_the_qwen_tokenizer_round_trips_and_writes_chatml(built):
    tokenizer = AutoTokenizer.from_pretrained(built[0] / "Qwen2.5-VL-Instruct")
    for text in ("A large red circle, 3 squares!\n", "把圆形变成绿色", "unseen: Ünïcödé ☂ 漢字"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("A large red circle").input_ids) <= 6
    for token in QWEN_SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "there"}]},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>there<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [{"role": "system", "content": "You paint."}]
    assert tokenizer.apply_chat_template(system, tokenize=False) == "<|im_start|>system\nYou paint.<|im_end|>\n"


def test_the_text_encoders_tokenizers_read_words(built):
    clip = AutoTokenizer.from_pretrained(built[0] / "FLUX.1-dev" / "tokenizer")
    ids = clip("A RED circle").input_ids
    assert clip.convert_ids_to_tokens(ids) == ["<|startoftext|>", "a</w>", "red</w>", "circle</w>", "<|endoftext|>"]
    assert max(ids) == ids[-1] == len(clip) - 1  # CLIP finds the end of a text by its id, the largest
    t5 = AutoTokenizer.from_pretrained(built[0] / "FLUX.1-dev" / "tokenizer_2")
    assert t5.convert_ids_to_tokens(t5("red circle").input_ids) == ["▁red", "▁circle", "</s>"]
    assert len(t5) <= 128


def test_embeddings_are_scaled_and_hold_the_colours_of_their_cells(built):
    qwen = built[0] / "Qwen2.5-VL-Instruct"
    tower = load_autoregressive(qwen, dtype=torch.float32).model.visual
    held_out = shape_pictures(24, seed=2)
    seen, new = (target_embeddings(tower, load_processor(qwen), images).flatten(0, 1) for images in (IMAGES, held_out))
    torch.testing.assert_close(seen.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(64), atol=1e-3, rtol=0)
    for cell, least in ((8, 0.95), (4, 0.8)):
        known, wanted = colours_of_cells(IMAGES, cell), colours_of_cells(held_out, cell)
        weights = torch.linalg.solve(seen.T @ seen + torch.eye(64), seen.T @ (known - known.mean(0)))
        residual = wanted - known.mean(0) - new @ weights
        r_squared = 1 - residual.square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)
        assert r_squared.mean() > least


def test_fitting_improves_the_autoencoder_and_scales_its_latents():
    pictures, held_out = stacked(IMAGES), stacked(shape_pictures(8, seed=5))
    before, after = (fit_vae(build_vae(MODEL.vae, 0), pictures, steps, batch_size=8, seed=0) for steps in (1, 60))
    assert reconstruction_psnr(after, held_out) > reconstruction_psnr(before, held_out) + 2
    with torch.no_grad():
        latents = after.encode(in_unit_range(pictures))
    assert abs(latents.mean()) < 0.1
    assert 0.9 < latents.std() < 1.1


def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"language\.vocab_size is 200; .* need 270"):
        train_qwen_tokenizer(CORPUS, 200)
    with pytest.raises(UserError, match=r"t5\.hidden_size is 24 where model\.transformer\.context_dim is 32"):
        wide = replace(MODEL, transformer=replace(MODEL.transformer, context_dim=32))
        build_standins(tmp_path, wide, STANDINS, CORPUS, IMAGES, seed=0)
    with pytest.raises(UserError, match="norm_groups 4 leaves 2 of 8 channels"):
        build_vae(VaeGeometry([8, 16], 1, 4, 16), seed=0)
    with pytest.raises(UserError, match="no pictures"):
        build_standins(tmp_path, MODEL, STANDINS, CORPUS, [], seed=0)


@pytest.mark.parametrize("num_target_tokens", [81, 25])
def test_a_fitted_tower_tells_more_the_longer_it_is_fitted(built, num_target_tokens):
    qwen = built[0] / "Qwen2.5-VL-Instruct"
    processor = load_processor(qwen)
    scores = []
    for steps in (2, 40):
        tower = load_autoregressive(qwen, dtype=torch.float32).model.visual
        unknown = [None] * len(IMAGES)
        how = (steps, 4, 0, num_target_tokens)
        scores.append(fit_vision(tower, processor, stacked(IMAGES), unknown, *how))
    assert scores[0].keys() == {"cell_r2", "place_r2"}  # no ground truth, so no facts
    assert scores[1]["cell_r2"] > scores[0]["cell_r2"] + 0.1


def test_other_hues_keep_greys_and_the_distances_between_colours():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.full((2, 3, 1, 3), -0.4)
    pictures[:, 0, 0, 1], pictures[:, 1, 0, 2] = 0.1, 0.1  # grey, red, green
    grey, red, green = in_random_hues(pictures, generator)[:, :, 0].unbind(-1)
    torch.testing.assert_close(grey, torch.full((2, 3), -0.4))
    torch.testing.assert_close((red - green).norm(dim=1), torch.full((2,), 0.5**0.5))
    assert (red[0] - red[1]).norm() > 0.1
    assert (red - pictures[:, :, 0, 1]).norm(dim=1).min() > 0.1


def test_labels_follow_what_a_bent_picture_shows(monkeypatch):
    monkeypatch.setattr("train.standins.vision.BEND", 0.4)
    monkeypatch.setattr("train.standins.vision.BEND_KNOTS", 2)  # nearly a shift, by more than a cell
    pictures, labels = torch.zeros(16, 3, 72, 72), torch.zeros(16, 9, 9, 3, dtype=torch.int64)
    pictures[..., 24:48, 24:48], labels[:, 3:6, 3:6] = 1.0, 2
    moved, told = bent(pictures, labels, torch.Generator().manual_seed(0))
    object_there = moved[:, 0].unflatten(2, (9, 8)).unflatten(1, (9, 8)).mean((2, 4)) > 0.5
    follows, stays = ((values[..., 0] > 0) == object_there for values in (told, labels))
    assert follows.float().mean() > 0.97
    assert stays.float().mean() < 0.9


def test_a_picture_teaches_a_shape_or_a_colour_and_never_both():
    generator = torch.Generator().manual_seed(0)
    grey = torch.linspace(-0.9, 0.9, 9).view(9, 1, 1, 1).expand(-1, 3, 72, 72).clone()
    pictures, labels = grey.clone(), torch.full((9, 9, 9, 3), 2)
    pictures[..., 24:48, 24:48] = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    before = pictures.clone(), labels.clone()
    shown, told = one_fact_each(pictures, labels, generator)
    assert torch.equal(pictures, before[0]) and torch.equal(labels, before[1])
    kinds = {"shape": 0, "colour": 0, "neither": 0}
    for picture, drawn, told_of_it in zip(shown, pictures, told, strict=True):
        shape, colour, size = (told_of_it[..., fact].unique().tolist() for fact in range(3))
        assert [shape, colour, size].count([-1]) + [shape, colour, size].count([2]) == 3
        outline = (picture != picture[:, :1, :1]).any(0)
        straight = torch.equal(outline, (drawn != drawn[:, :1, :1]).any(0))
        same_colours = any(torch.allclose(pixel, drawn[:, 36, 36]) for pixel in picture.flatten(1).T)
        if shape == [2]:
            assert straight and not same_colours and (colour, size) == ([-1], [2])
        elif colour == [2]:
            assert same_colours and not straight and size == [-1]
        else:
            assert torch.equal(picture, drawn) and size == [2]
        kinds["shape" if shape == [2] else "colour" if colour == [2] else "neither"] += 1
    assert set(kinds.values()) == {3}


def test_a_tower_is_fitted_to_what_the_ground_truth_tells(built):
    qwen = built[0] / "Qwen2.5-VL-Instruct"
    processor = load_processor(qwen)
    known = [[{"shape": "circle", "colour": "red", "size": "large", "bbox": [0.2, 0.2, 0.8, 0.8]}]] * len(IMAGES)
    tower, pictures = load_autoregressive(qwen, dtype=torch.float32).model.visual, stacked(IMAGES)
    scores = fit_vision(tower, processor, pictures, known, 2, 4, 0)
    assert scores.keys() == {"cell_r2", "place_r2", "shape_accuracy", "colour_accuracy", "size_accuracy"}
    assert torch.equal(pictures, stacked(IMAGES))


def test_pictures_are_cut_into_patches_as_the_processor_does(built):
    processor = load_processor(built[0] / "Qwen2.5-VL-Instruct")
    sized = [image.resize((72, 72), Image.Resampling.BICUBIC) for image in IMAGES[:2]]
    pixels = in_unit_range(stacked(sized))
    torch.testing.assert_close(
        patch_values(pixels, processor.image_processor), patches(processor, sized)[0], rtol=0, atol=1e-6
    )


def test_tokens_are_labelled_by_the_object_that_reaches_into_their_cell():
    circle = {"shape": "circle", "colour": "red", "size": "large", "bbox": [0.35, 0.35, 0.65, 0.65]}
    square = {"shape": "square", "colour": "blue", "size": "small", "bbox": [0.07, 0.74, 0.26, 0.93]}
    labels = token_labels([[circle, square], [], None], 9)
    assert labels[0, 4, 4].tolist() == [1, 2, 1]  # circle, red and large, in the order of their names
    assert labels[0, 7, 1].tolist() == [2, 1, 2]
    assert (labels[0, 3:6, 3:6] == labels[0, 4, 4]).all() and (labels[0] > 0).all(-1).sum() == 9 + 1
    assert (labels[1] == 0).all() and (labels[2] == -1).all()
