"""CLIP and T5 from a FLUX.1-dev directory: padding, what is returned, and directories that must be refused."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from nexus_gen.commands.convert import convert
from nexus_gen.flux.text_encoders import encode_context, encode_pooled, encode_prompt, tokenize
from nexus_gen.parts.inspection import inspect
from nexus_gen.specs.errors import UserError

LETTERS = string.ascii_lowercase
CLIP_VOCAB = {
    token: i for i, token in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"])
}
T5_VOCAB = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -1.0), *((x, -2.0) for x in LETTERS)]
END = CLIP_VOCAB["<|endoftext|>"]


@pytest.fixture(scope="module")
def flux_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("FLUX.1-dev")
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=len(CLIP_VOCAB),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=END - 1,
        eos_token_id=2,  # as FLUX.1-dev's config has it: the end is then the largest id
    )
    t5 = T5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    CLIPTokenizer(vocab=CLIP_VOCAB, merges=[], model_max_length=77).save_pretrained(directory / "tokenizer")
    T5Tokenizer(vocab=T5_VOCAB, extra_ids=2).save_pretrained(directory / "tokenizer_2")
    CLIPTextModel(clip).save_pretrained(directory / "text_encoder")
    T5EncoderModel(t5).save_pretrained(directory / "text_encoder_2")
    return directory


def test_prompts_are_padded_and_cut_as_flux_expects(flux_dir):
    clip = tokenize(flux_dir / "tokenizer", "ab", 77)
    assert clip.shape == (1, 77)
    assert clip[0, :5].tolist() == [END - 1, CLIP_VOCAB["a"], CLIP_VOCAB["b</w>"], END, END]
    t5 = tokenize(flux_dir / "tokenizer_2", "ab", 512)
    assert t5.shape == (1, 512)
    assert t5[0, :6].tolist() == [3, 4, 5, 1, 0, 0]
    assert tokenize(flux_dir / "tokenizer_2", "a " * 600, 512).shape == (1, 512)


@torch.no_grad()
def test_pooled_is_the_output_at_the_end_token_and_context_attends_to_padding(flux_dir):
    context, pooled = encode_prompt(flux_dir, "ab", torch.float32)
    assert context.shape == (1, 512, 24)
    clip = CLIPTextModel.from_pretrained(flux_dir / "text_encoder")
    alone = clip(torch.tensor([[END - 1, CLIP_VOCAB["a"], CLIP_VOCAB["b</w>"], END]])).last_hidden_state[:, -1]
    torch.testing.assert_close(pooled, alone)  # causal: what follows the end token cannot matter
    t5 = T5EncoderModel.from_pretrained(flux_dir / "text_encoder_2")
    ids = tokenize(flux_dir / "tokenizer_2", "ab", 512)
    torch.testing.assert_close(context, t5(ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    masked = t5(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (masked - context)[:, :4].abs().max() > 1e-3


def test_the_empty_prompt_differs_from_others_and_takes_the_dtype(flux_dir):
    empty = encode_pooled(flux_dir, "", torch.float32)
    assert empty.shape == (1, 16)
    assert not empty.requires_grad
    assert not torch.allclose(empty, encode_pooled(flux_dir, "cat", torch.float32))
    assert encode_context(flux_dir, "", torch.bfloat16).dtype == torch.bfloat16


def test_incomplete_directories_are_refused(flux_dir, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_2 does not exist; give a FLUX\.1-dev directory"):
        encode_prompt(tmp_path, "", torch.float32)
    (tmp_path / "tokenizer_2").mkdir()
    with pytest.raises(UserError, match=r"tokenizer_2 holds no whole tokenizer"):
        encode_prompt(tmp_path, "", torch.float32)
    (tmp_path / "tokenizer").symlink_to(flux_dir / "tokenizer")
    encoder = tmp_path / "text_encoder"
    encoder.mkdir()
    with pytest.raises(UserError, match=r"text_encoder holds 0 \.safetensors files"):
        encode_pooled(tmp_path, "", torch.float32)
    (encoder / "config.json").write_bytes((flux_dir / "text_encoder" / "config.json").read_bytes())
    tensors = load_file(flux_dir / "text_encoder" / "model.safetensors")
    lost = next(key for key in tensors if "q_proj.weight" in key)
    save_file(
        {key: value for key, value in tensors.items() if key != lost}, encoder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        UserError, match=r"text_encoder does not fit the configured CLIPTextModel: 1 missing key \(.*q_proj.weight\)"
    ):
        encode_pooled(tmp_path, "", torch.float32)
    whole = (flux_dir / "text_encoder" / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        encode_pooled(tmp_path, "", torch.float32)


def text_copy(flux_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flux_dir, tmp_path / "copy"))


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({key: value.clone() for key, value in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_as_old_and_new_releases_write_it(flux_dir, tmp_path, prefix):
    copy = text_copy(flux_dir, tmp_path)
    positions = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    rewritten(
        copy / "text_encoder" / "model.safetensors",
        lambda tensors: {prefix + key.removeprefix("text_model."): value for key, value in tensors.items()} | positions,
    )
    assert torch.equal(encode_pooled(copy, "ab", torch.float32), encode_pooled(flux_dir, "ab", torch.float32))


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_the_embedding_of_t5_under_either_name_or_both(flux_dir, tmp_path, names):
    copy = text_copy(flux_dir, tmp_path)
    rewritten(
        copy / "text_encoder_2" / "model.safetensors",
        lambda tensors: (
            {f"{name}.weight": tensors["shared.weight"] for name in names}
            | {key: value for key, value in tensors.items() if key != "shared.weight"}
        ),
    )
    assert torch.equal(encode_context(copy, "ab", torch.float32), encode_context(flux_dir, "ab", torch.float32))


def test_surplus_and_contradicting_tensors_are_refused(flux_dir, tmp_path):
    copy = text_copy(flux_dir, tmp_path)
    t5, clip = (copy / name / "model.safetensors" for name in ("text_encoder_2", "text_encoder"))
    rewritten(t5, lambda tensors: {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] + 1})
    with pytest.raises(UserError, match=r"one embedding, with two values"):
        encode_context(copy, "", torch.float32)
    rewritten(t5, lambda tensors: {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"][1:]})
    with pytest.raises(UserError, match=r"1 unexpected key \(encoder\.embed_tokens\.weight\)"):
        encode_context(copy, "", torch.float32)
    rewritten(clip, lambda tensors: {**tensors, "visual_projection.weight": torch.zeros(2), "a": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not fit .*2 unexpected keys \(a, visual_projection\.weight"):
        encode_pooled(copy, "", torch.float32)


def test_a_stale_file_beside_shards_is_refused(flux_dir, tmp_path):
    directory = text_copy(flux_dir, tmp_path) / "text_encoder"
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds two sets of weights"):
        encode_pooled(directory.parent, "", torch.float32)


@pytest.mark.parametrize(("encoder", "folder"), [("CLIP", "text_encoder"), ("T5", "text_encoder_2")])
def test_a_text_encoder_by_itself_says_what_it_is(flux_dir: Path, tmp_path: Path, encoder: str, folder: str) -> None:
    report = inspect(flux_dir / folder)
    tensors = load_file(flux_dir / folder / "model.safetensors")
    assert report.what == f"{encoder} text encoder" and report.whole
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    alone = tmp_path / "some.safetensors"  # as ComfyUI keeps them
    save_file({key: tensor for key, tensor in tensors.items() if "q" not in key.split(".")}, alone)
    assert inspect(alone).what == f"{encoder} text encoder"
    assert inspect(alone).problems == ["no config.json beside it, by which its size is known"]
    shutil.copyfile(flux_dir / folder / "config.json", tmp_path / "config.json")
    tensors.pop(next(key for key in tensors if key.endswith("norm.weight") or "final" in key))
    save_file(tensors, alone)
    assert inspect(alone).problems[0].startswith("1 missing key (")
    with pytest.raises(UserError, match=f"some.safetensors holds a {encoder} text encoder, which is read as it is"):
        convert(alone, tmp_path / "other.safetensors", "released")
