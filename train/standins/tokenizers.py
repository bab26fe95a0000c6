"""Small tokenizers learnt from the caller's words, of the classes and in the files that the real downloads have.

Byte-level ones spell any text, so nothing is unknown to them; what their vocabulary adds is length.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from nexus_gen.specs import prompts
from nexus_gen.specs.errors import UserError

Pair = tuple[str, str]

# The added tokens of Qwen2.5, in its order; each is one id whatever the vocabulary.
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# ChatML as Qwen2.5-VL writes it: a default system turn, and content that is text or a list of typed parts.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{ part['text'] }}
{%- else -%}
{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
CHAT_WORDS = ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
UNKNOWN_COST = -40.0  # log probability
T5_SPECIAL_TOKENS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", UNKNOWN_COST)]
WORD_START = "▁"
MAX_TOKEN_BYTES = 12  # four Chinese characters: a longer token would be a whole clause, which Chinese does not space
MAX_LENGTHS = {"qwen": 32768, "clip": 77, "t5": 512}

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def template_texts() -> list[str]:
    """The fixed words of every task in both languages, which every dataset will meet."""
    templates = chain(
        prompts.GENERATION_PROMPT.values(),
        prompts.GENERATION_REPLY.values(),
        prompts.EDITING_REPLY.values(),
        CHAT_WORDS,
    )
    return [text.replace("{}", "").replace(prompts.IMAGE_TAG, "") for text in templates]


def learn_merges(tokenizer: Tokenizer, corpus: Iterable[str], num_merges: int, suffix: str = "") -> list[Pair]:
    """Neighbours worth joining, by rank; how text is normalised and split is `tokenizer`'s."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    learner.normalizer = tokenizer.normalizer
    learner.pre_tokenizer = tokenizer.pre_tokenizer
    # Given as special tokens, the bytes that end words are numbered at once. The trainer would number them as it meets
    # them, in the changing order of a hash table, and rank equally frequent pairs by number.
    word_ends = [byte + suffix for byte in BYTES] if suffix else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTES) + len(word_ends) + num_merges,
        initial_alphabet=BYTES,
        special_tokens=word_ends,
        max_token_length=MAX_TOKEN_BYTES,
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:num_merges]


def train_qwen_tokenizer(corpus: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's splitting, special tokens and chat template; at most `vocab_size` ids.

    Raises UserError when bytes and special tokens alone need more.
    """
    smallest = len(BYTES) + len(QWEN_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"standins.language.vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}, so raise it"
        )
    merges: Any = learn_merges(Qwen2Tokenizer().backend_tokenizer, [*template_texts(), *corpus], vocab_size - smallest)
    return Qwen2Tokenizer(
        vocab=numbered([*BYTES, *map("".join, merges)]),
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # type: ignore[arg-type]  # as the download has it
        additional_special_tokens=QWEN_SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTHS["qwen"],
    )


def train_clip_tokenizer(corpus: list[str], vocab_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE, which marks the ends of words; exactly `vocab_size` ids or, of a small corpus, fewer.

    The end token has the largest id, which is how CLIP finds it. Raises UserError when bytes alone need more.
    """
    smallest = 2 * len(BYTES) + 2
    if vocab_size < smallest:
        raise UserError(f"standins.clip.vocab_size is {vocab_size}; bytes and ends need {smallest}, so raise it")
    merges: Any = learn_merges(CLIPTokenizer().backend_tokenizer, corpus, vocab_size - smallest, END_OF_WORD)
    ends = [byte + END_OF_WORD for byte in BYTES]
    return CLIPTokenizer(
        vocab=numbered([*BYTES, *ends, *map("".join, merges), CLIP_START, CLIP_END]),
        merges=merges,
        model_max_length=MAX_LENGTHS["clip"],
    )


def train_t5_tokenizer(corpus: list[str], vocab_size: int) -> T5Tokenizer:
    """T5's unigram model: the letters and the most frequent words of the corpus, at most `vocab_size` ids."""
    words: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    for text in corpus:
        for word in text.split():
            words[WORD_START + word] += 1
            letters.update(WORD_START + word)
    ranked = [*by_count(letters), *(entry for entry in by_count(words) if len(entry[0]) > 2)]
    ranked = ranked[: vocab_size - len(T5_SPECIAL_TOKENS)]
    total = sum(words.values())
    # A letter costs more than any word, so that words are spelt only where they are unknown.
    scores = [(piece, math.log(count / total) if len(piece) > 1 else UNKNOWN_COST / 2) for piece, count in ranked]
    return T5Tokenizer(vocab=[*T5_SPECIAL_TOKENS, *scores], extra_ids=0, model_max_length=MAX_LENGTHS["t5"])


def by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first, ties in alphabetical order."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def numbered(tokens: Iterable[str]) -> dict[str, int]:
    """Token -> id, in order."""
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}
