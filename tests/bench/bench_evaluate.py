"""Batches of `nexus-gen evaluate` beside one row at a time, as `understand` and `generate` ask.

    python -m pytest tests/bench/bench_evaluate.py -o python_files='bench_*.py' -s      (or make bench)

A tiny model on whatever device there is; both ways give the same answers (tests/train/evaluate/test_evaluate.py).
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import ModelPaths
from nexus_gen.specs.prompts import GENERATION_PROMPT, GENERATION_REPLY, UNDERSTANDING_PROMPT

sys.path.append(str(Path(__file__).parent.parent / "helpers"))
from tiny_qwen import write_checkpoint

ROWS = 32
ANSWER_TOKENS = 8


def seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_batches_beside_single_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = NexusGen(ModelPaths(tmp_path, max_pixels=72 * 72))
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    question = UNDERSTANDING_PROMPT.format("What colour is the circle?")
    prompts, reply = [GENERATION_PROMPT["en"].format(f"{row} circles") for row in range(ROWS)], GENERATION_REPLY["en"]
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "answers": (
            lambda: [model.answer(question, [picture], ANSWER_TOKENS) for _ in range(ROWS)],
            lambda: model.answer_all([question] * ROWS, [[picture]] * ROWS, ANSWER_TOKENS),
        ),
        "image embeddings": (
            lambda: [model.imagine(prompt, reply, []) for prompt in prompts],
            lambda: model.imagine_all(prompts, [reply] * ROWS, [[] for _ in prompts]),
        ),
    }
    for what, (single, batched) in ways.items():
        alone, together = seconds(single), seconds(batched)
        rates = f"{ROWS / alone:.0f}/s one by one, {ROWS / together:.0f}/s in a batch of {ROWS}"
        print(f"\n{what} on {model.device}: {rates}, {alone / together:.1f} times as fast")
        assert together < alone
