"""A tiny Qwen2.5-VL directory in the layout of the download, and message rows of every task, for tests of training."""

import json
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive, save_autoregressive
from nexus_gen.specs.geometry import LanguageGeometry, VisionGeometry

PATCH_SIZE = 4  # a target image is 72 px
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(directory: Path) -> None:
    """A plain Qwen2.5-VL: weights, config, byte-level tokenizer, image and video processor, chat template."""
    tokenizer = Tokenizer(
        models.BPE(vocab={byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        unk_token=None,
        additional_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    image_sizes = {"patch_size": PATCH_SIZE, "merge_size": 2, "temporal_patch_size": 2}
    ids = dict(zip(SPECIAL_TOKENS, fast.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    model = build_autoregressive(
        VisionGeometry(
            patch_size=PATCH_SIZE,
            hidden_size=16,
            intermediate_size=24,
            depth=2,
            num_heads=2,
            window_size=8 * PATCH_SIZE,
            fullatt_block_indexes=[1],
        ),
        LanguageGeometry(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            num_key_value_heads=1,
            mrope_section=[4, 2, 2],
            rope_theta=1e6,
            rms_norm_eps=1e-6,
        ),
        SpecialTokenIds(
            image=ids["<|image_pad|>"],
            video=ids["<|video_pad|>"],
            vision_start=ids["<|vision_start|>"],
            vision_end=ids["<|vision_end|>"],
            end_of_turn=ids["<|im_end|>"],
            padding=ids["<|endoftext|>"],
        ),
        seed=0,
    )
    save_autoregressive(model, directory, as_qwen=True)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**image_sizes, min_pixels=64, max_pixels=10_000),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**image_sizes),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


ROWS = {
    "understanding": {
        "images": ["wide.png"],
        "messages": [
            {"role": "user", "content": "<image>\nWhat is this?"},
            {"role": "assistant", "content": "A red square."},
        ],
    },
    "generation": {
        "images": ["tall.png"],
        "messages": [
            {"role": "user", "content": "Generate an image according to the following description: a square"},
            {"role": "assistant", "content": "Here is an image based on the description: <image>"},
        ],
    },
    "editing": {
        "images": ["wide.png", "tall.png"],
        "messages": [
            {"role": "user", "content": "<image> 把它变成圆形"},
            {"role": "assistant", "content": "Here is the image: <image>"},
        ],
    },
    "text": {
        "images": [],
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello there!"}],
    },
    "several turns and images": {
        "images": ["wide.png", "tall.png", "tall.png", "wide.png", "wide.png"],
        "messages": [
            {"role": "system", "content": "You paint."},
            {"role": "user", "content": "Mix <image> with <image>"},
            {"role": "assistant", "content": "Two tries: <image> and <image>. Which?"},
            {"role": "user", "content": "More like <image>, please"},
            {"role": "assistant", "content": "I cannot."},
        ],
    },
}


def write_rows(directory: Path, copies: int = 1) -> Path:
    """train.jsonl with every row of ROWS, `copies` times, and the pictures beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, size in {"wide.png": (150, 61), "tall.png": (40, 90)}.items():
        image = Image.new("RGB", size, "navy")
        ImageDraw.Draw(image).rectangle((10, 10, 30, 50), fill="red")
        image.save(directory / name)
    path = directory / "train.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"{task} {copy}", "source": "test", **row}) + "\n"
            for copy in range(copies)
            for task, row in ROWS.items()
        ),
        encoding="utf-8",
    )
    return path
