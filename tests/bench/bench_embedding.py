"""Embedding pictures: the packed tower and teacher-forced passes beside the published way, and from JPEGs to shards.

    python tests/bench/bench_embedding.py       on a GPU the full-size models with random weights, about 5 minutes;
                                                elsewhere, as in `make bench`, small ones, whose ratios differ
It writes $OUT/bench_embedding.json where OUT is set.

Rates are of whole calls, inputs on the host or the device as said. A fraction is that of the bf16 matrix rate measured
in the same run; matrix FLOPs are those of the published model (no padding, no second frame), counted below.
"""

import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from nexus_gen.tensors.compat import ensure_torchvision  # noqa: E402

ensure_torchvision()

from transformers import Qwen2VLImageProcessor  # noqa: E402
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention  # noqa: E402

from nexus_gen.language import packed_vision, vision_tower  # noqa: E402
from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive  # noqa: E402
from nexus_gen.language.generate import compiled_decoder_layer, decoder_layer, teacher_forced_pairs  # noqa: E402
from nexus_gen.language.packed_vision import PackedVisionTower  # noqa: E402
from nexus_gen.language.vision_tower import VisionTower, grid_layout  # noqa: E402
from nexus_gen.pictures.images import context_size, cover_crop, open_image  # noqa: E402
from nexus_gen.specs.geometry import LanguageGeometry, VisionGeometry  # noqa: E402

PATCH, MERGE, WINDOW = 14, 2, 112
TARGET_PX, REFERENCE_PX, MAX_PIXELS = 252, 504, 262_640
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass(frozen=True)
class Scale:
    """Models and amounts of a run; batches: pictures per call over which the tower is timed."""

    tower: VisionGeometry
    language: LanguageGeometry
    tokens: SpecialTokenIds
    matrix: int
    seconds: float
    batches: tuple[int, ...]
    batch: int
    reference_batches: tuple[int, ...]
    editing_rows: tuple[int, ...]
    jpegs: int


FULL = Scale(
    tower=VisionGeometry(PATCH, 1280, 3420, 32, 16, WINDOW, [7, 15, 23, 31]),
    language=LanguageGeometry(152064, 3584, 18944, 28, 28, 4, [16, 24, 24], 1e6, 1e-6),
    tokens=SpecialTokenIds(
        image=151655, video=151656, vision_start=151652, vision_end=151653, end_of_turn=151645, padding=151643
    ),
    matrix=8192,
    seconds=1.5,
    batches=(32, 64, 128, 256, 512),
    batch=128,
    reference_batches=(32, 128),
    editing_rows=(16, 32, 64),
    jpegs=8192,
)
SMALL = Scale(
    tower=VisionGeometry(PATCH, 64, 172, 4, 4, WINDOW, [1, 3]),
    language=LanguageGeometry(320, 64, 128, 2, 4, 2, [2, 3, 3], 1e6, 1e-6),
    tokens=SpecialTokenIds(image=305, video=306, vision_start=302, vision_end=303, end_of_turn=304, padding=301),
    matrix=512,
    seconds=0.3,
    batches=(8,),
    batch=8,
    reference_batches=(2,),
    editing_rows=(2,),
    jpegs=48,
)
SCALE = FULL if CUDA else SMALL
TOWER, LANGUAGE, TOKENS = SCALE.tower, SCALE.language, SCALE.tokens

Grid = tuple[int, int, int]


# ---------------------------------------------------------------- matrix FLOPs, counted


def tower_flops(tower: VisionGeometry, out_hidden_size: int, grid: Grid) -> int:
    """Multiply-adds of a picture's matrix products, times two: linears, attention within windows and pictures."""
    patches, width = grid[0] * grid[1] * grid[2], tower.hidden_size
    linears = width * (3 * width) + width * width + 3 * width * tower.intermediate_size
    ends = grid_layout(grid, MERGE, tower.window_size, tower.patch_size)[2].long()
    windows = ends.diff(prepend=ends.new_zeros(1))
    full = len(tower.fullatt_block_indexes)
    attention = (tower.depth - full) * int((windows**2).sum()) + full * patches**2
    merged_width = width * MERGE**2
    merger = patches // MERGE**2 * (merged_width**2 + merged_width * out_hidden_size)
    embedding = patches * 3 * tower.patch_size**2 * width  # one frame: both of a still picture are the same
    return 2 * (embedding + tower.depth * patches * linears + 2 * attention * width + merger)


def language_flops(language: LanguageGeometry, length: int, predicted: int) -> int:
    """Of one row's decoder layers, causal attention counted by half, and of the vision head at predicted positions."""
    width = language.hidden_size
    key_value = width // language.num_heads * language.num_key_value_heads
    linears = 2 * width * width + 2 * width * key_value + 3 * width * language.intermediate_size
    attention = 2 * width * length * (length + 1) // 2
    return 2 * (language.num_layers * (length * linears + attention) + predicted * width * width)


# ---------------------------------------------------------------- timing


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def rate(work: Callable[[], Any], amount: float, seconds: float = SCALE.seconds, warm_up: int = 2) -> float:
    """amount per second of repeated `work`; the device is idle at both ends of each."""
    for _ in range(warm_up):
        work()
    synchronize()
    calls, began = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - began < seconds:
        work()
        calls += 1
        synchronize()
    return amount * calls / (time.perf_counter() - began)


class Report:
    """Lines as they come, one table last, JSON where OUT says."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.numbers: dict[str, float | str] = {}
        self.began = time.perf_counter()

    def add(self, name: str, value: float | str, shown: str) -> None:
        self.numbers[name] = value
        self.rows.append((name, shown))
        print(f"[{time.perf_counter() - self.began:5.0f} s] {name}: {shown}", flush=True)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def part(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one part; a failure is printed and counted, and the next part goes on."""
        try:
            return function(self, *arguments)
        except Exception as error:
            traceback.print_exc()
            self.add(f"FAILED {function.__name__}", repr(error)[:200], repr(error)[:200])
            return None
        finally:
            if CUDA:
                torch.cuda.empty_cache()

    def finish(self) -> None:
        width = max(len(name) for name, _ in self.rows)
        print("\n" + "\n".join(f"{name:{width}}  {shown}" for name, shown in self.rows))
        if os.environ.get("OUT"):
            (Path(os.environ["OUT"]) / "bench_embedding.json").write_text(json.dumps(self.numbers, indent=1))


def matrix_rate(report: Report) -> float:
    """FLOP/s of products of square matrices: of ten in a row, and kept up, which power may limit; the larger counts."""
    size = SCALE.matrix
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    out = torch.empty_like(left)

    def ten() -> None:
        for _ in range(10):
            torch.matmul(left, right, out=out)

    burst = rate(ten, 20 * size**3, seconds=0, warm_up=1)
    kept_up = rate(ten, 20 * size**3)
    shown = f"{burst / 1e12:.3g} T for a moment, {kept_up / 1e12:.3g} T kept up, {DTYPE}"
    report.add(f"matrix rate, {size} x {size}, FLOP/s", max(burst, kept_up), shown)
    report.numbers["matrix rate kept up"] = kept_up
    return max(burst, kept_up)


# ---------------------------------------------------------------- models and inputs


def random_tower(geometry: VisionGeometry, out_hidden_size: int, dtype: torch.dtype = DTYPE) -> VisionTower:
    """A random tower, in eval mode, with transformers' own attention (sdpa)."""
    config = Qwen2_5_VLVisionConfig(
        depth=geometry.depth,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_heads=geometry.num_heads,
        patch_size=geometry.patch_size,
        window_size=geometry.window_size,
        fullatt_block_indexes=geometry.fullatt_block_indexes,
        out_hidden_size=out_hidden_size,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return VisionTower._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def random_language_model() -> Any:
    """A random autoregressive model, built in place: 16.6 GB at full size."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return build_autoregressive(TOWER, LANGUAGE, TOKENS, seed=0).eval()
    finally:
        torch.set_default_dtype(before)


def random_patches(grids: list[Grid]) -> tuple[Tensor, Tensor]:
    """pixel_values and image_grid_thw of pictures of noise."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 3 * 2 * PATCH**2, device=DEVICE, dtype=DTYPE), torch.tensor(grids)


def editing_batch(rows: int, seed: int) -> tuple[dict[str, Tensor], list[int], list[Grid]]:
    """A batch as `collate` makes it (padded on the left), the lengths of its rows, and its grids.

    Sources of photographs' aspects under the pixel bound, 40 to 120 tokens of text, one target of 81 tokens.
    """
    random = np.random.default_rng(seed)
    ids, labels, grids = [], [], []
    for _ in range(rows):
        long, short = random.integers(600, 1200), random.integers(400, 800)
        width, height = context_size(*((long, short) if random.random() < 0.7 else (short, long)), PATCH, MAX_PIXELS)
        grids += [(1, height // PATCH, width // PATCH), (1, 18, 18)]
        source = [TOKENS.vision_start] + [TOKENS.image] * (height * width // 784) + [TOKENS.vision_end]
        before, after = (random.integers(0, 300, size=random.integers(20, 60)).tolist() for _ in range(2))
        target = [TOKENS.vision_start] + [TOKENS.image] * 81 + [TOKENS.vision_end, TOKENS.end_of_turn]
        ids.append(torch.tensor([*before[:20], *source, *before[20:], *after, *target]))
        labels.append(torch.full_like(ids[-1], -100))
        labels[-1][-83:-2] = TOKENS.image
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    pixel_values, grid_thw = random_patches(grids)
    batch = {
        "input_ids": pad(ids, padding_value=TOKENS.padding),
        "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0),
        "labels": pad(labels, padding_value=-100),
        "pixel_values": pixel_values,
        "image_grid_thw": grid_thw,
    }
    return batch, [len(row) for row in ids], grids


def random_pictures(count: int, px: int) -> Tensor:
    """(count, 3, px, px) uint8 on the host, pinned beside a GPU."""
    pictures = torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8)
    return pictures.pin_memory() if CUDA else pictures


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    actual, expected = actual.float().flatten(), expected.float().flatten()
    return float((actual - expected).norm() / expected.norm())


# ---------------------------------------------------------------- on a GPU: the vision tower


@contextmanager
def one_by_one_attention() -> Iterator[None]:
    """transformers' own attention, one call per window, as published; `vision_tower` replaces it on import."""
    ours = Qwen2_5_VLVisionAttention.forward
    Qwen2_5_VLVisionAttention.forward = vision_tower._attend_one_by_one
    try:
        yield
    finally:
        Qwen2_5_VLVisionAttention.forward = ours


@torch.no_grad()
@one_by_one_attention()
def published_way(report: Report, tower: VisionTower) -> float:
    """One picture at a time through transformers' tower, inputs on the device, the result brought to the host."""
    best = 0.0
    for px in (TARGET_PX, REFERENCE_PX):
        pixels, grid = random_patches([(1, px // PATCH, px // PATCH)])
        grid = grid.to(DEVICE)
        got = rate(lambda pixels=pixels, grid=grid: tower(pixels, grid_thw=grid).pooler_output.cpu(), 1)
        report.add(f"published way, {px} px, one at a time, img/s", got, f"{got:.2f}")
        best = best or got
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (TARGET_PX, TARGET_PX, 3), dtype=np.uint8))]
    processor = Qwen2VLImageProcessor(patch_size=PATCH)

    def with_processor() -> None:
        features = processor(images=images, do_resize=False, return_tensors="pt")
        pixels = features["pixel_values"].to(DEVICE, DTYPE)
        tower(pixels, grid_thw=features["image_grid_thw"].to(DEVICE)).pooler_output.cpu()

    got = rate(with_processor, 1)
    report.add("the same with its image processor, img/s", got, f"{got:.2f}")
    pixels, grid = random_patches([(1, 18, 18)] * SCALE.batch)
    got = rate(lambda: tower(pixels, grid_thw=grid.to(DEVICE)).pooler_output, SCALE.batch)
    report.add(f"transformers' tower, 252 px, B {SCALE.batch}, img/s", got, f"{got:.1f}")
    return best


@torch.no_grad()
def tower_parity(report: Report, tower: VisionTower) -> None:
    """bf16 results of both ways against float32 ones, and the one-frame weights against two frames."""
    pictures = random_pictures(4, TARGET_PX)
    features = Qwen2VLImageProcessor(patch_size=PATCH)(images=list(pictures), do_resize=False, return_tensors="pt")
    pixels, grid = features["pixel_values"].to(DEVICE), features["image_grid_thw"]
    theirs = tower(pixels.to(DTYPE), grid_thw=grid.to(DEVICE)).pooler_output
    packed = PackedVisionTower(tower)
    torch.backends.cudnn.allow_tf32 = False  # or the reference's patch embedding is rounded to 10 bits
    exact_tower = random_tower(TOWER, LANGUAGE.hidden_size, torch.float32)
    exact_tower.load_state_dict(tower.state_dict())
    exact = exact_tower(pixels, grid_thw=grid.to(DEVICE)).pooler_output
    for name, result in {
        "transformers' bf16": theirs,
        "packed bf16": packed(pixels, grid),
        "packed bf16 from uint8": packed.embed_pictures(pictures),
    }.items():
        report.add(f"deviation from float32, {name}", deviation(result, exact), f"{deviation(result, exact):.2e}")
    ours = PackedVisionTower(exact_tower)(pixels, grid)
    report.add("deviation, packed float32", deviation(ours, exact), f"{deviation(ours, exact):.2e}")


@torch.no_grad()
def packed_rate(
    report: Report, peak: float, published: float, name: str, packed: PackedVisionTower, batch: int, px: int = TARGET_PX
) -> float:
    """Whole calls from uint8 pictures in pinned memory to embeddings on the device."""
    pictures = random_pictures(batch, px)
    got = rate(lambda: packed.embed_pictures(pictures), batch, warm_up=3)
    flops = tower_flops(TOWER, LANGUAGE.hidden_size, (1, px // PATCH, px // PATCH))
    fraction = got * flops / peak
    ratio = f", {got / published:.1f} x the published way" if px == TARGET_PX else ""
    report.add(f"{name}, {px} px, B {batch}, img/s", got, f"{got:.0f}, {fraction:.1%} of the matrix rate{ratio}")
    report.numbers[f"{name}, {px} px, B {batch}, fraction"] = fraction
    return got


@torch.no_grad()
def default_tower(report: Report, peak: float, published: float, tower: VisionTower) -> PackedVisionTower:
    """What the stages use, over batch sizes."""
    packed_rate(report, peak, published, "packed, eager", PackedVisionTower(tower), SCALE.batch)
    began = time.perf_counter()
    packed = PackedVisionTower(tower, compiled=True)
    packed.embed_pictures(random_pictures(SCALE.batch, TARGET_PX))
    synchronize()
    report.add("compiling, s", time.perf_counter() - began, f"{time.perf_counter() - began:.1f}")
    for batch in SCALE.batches:
        packed_rate(report, peak, published, "packed, compiled", packed, batch)
    for batch in SCALE.reference_batches:
        packed_rate(report, peak, published, "packed, compiled", packed, batch, REFERENCE_PX)
    pixels, grid = random_patches([(1, 18, 18)] * SCALE.batch)
    got = rate(lambda: packed(pixels, grid), SCALE.batch)
    report.add(f"packed, compiled, from pixel_values on the device, B {SCALE.batch}, img/s", got, f"{got:.0f}")
    return packed


def kernels(report: Report, packed: PackedVisionTower) -> None:
    """Where a call's time goes."""
    pictures = random_pictures(SCALE.batch, TARGET_PX)
    packed.embed_pictures(pictures)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        packed.embed_pictures(pictures)
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=18, max_name_column_width=90)[:9000])


@torch.no_grad()
def variants(report: Report, peak: float, published: float, tower: VisionTower, limit_s: float) -> None:
    """One choice taken back at a time, at B 128, while time is left."""

    def unpadded() -> PackedVisionTower:
        packed_vision.ALIGNMENT = 1
        return PackedVisionTower(tower, compiled=True)

    def static() -> PackedVisionTower:
        packed = PackedVisionTower(tower)
        packed._block = torch.compile(packed_vision.block, dynamic=False)
        packed._merge = torch.compile(packed._merge, dynamic=False)
        return packed

    def tuned() -> PackedVisionTower:
        packed = PackedVisionTower(tower)
        packed._block = torch.compile(packed_vision.block, mode="max-autotune-no-cudagraphs")
        return packed

    choices = {"without padding the MLP": unpadded, "static shapes": static, "max-autotune": tuned}
    for name, build in choices.items():
        if report.elapsed > limit_s:
            report.add(f"variant {name}", "not run", "not run: no time left")
            continue
        torch._dynamo.reset()
        aligned = packed_vision.ALIGNMENT
        try:
            report.part(packed_rate, peak, published, f"variant, {name}", build(), SCALE.batch)
        finally:
            packed_vision.ALIGNMENT = aligned
    torch._dynamo.reset()


# ---------------------------------------------------------------- on a GPU: editing


@torch.no_grad()
def editing(report: Report, peak: float) -> None:
    """Predicted embeddings of the target and vision embeddings of the source at 504 px, by rows of several shapes."""
    model = random_language_model()
    width = LANGUAGE.hidden_size
    batch, *_ = editing_batch(1, 0)
    on_device = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    reference, reference_grid = random_patches([(1, 36, 36)])

    def one_by_one() -> None:
        model(**on_device)
        model.model.visual(reference, grid_thw=reference_grid.to(DEVICE))

    with one_by_one_attention():
        got = rate(one_by_one, 1, seconds=2 * SCALE.seconds)
    report.add("editing, one row at a time, whole forward, rows/s", got, f"{got:.2f}")
    published = got
    packed = PackedVisionTower(model.model.visual, compiled=True)
    for compiled, rows in ((False, SCALE.editing_rows[0]), *((True, rows) for rows in SCALE.editing_rows)):
        layer = compiled_decoder_layer() if compiled else decoder_layer
        batches = []
        for seed in range(3):
            batch, lengths, grids = editing_batch(rows, seed)
            language = sum(language_flops(LANGUAGE, length, 81) for length in lengths)
            vision = sum(tower_flops(TOWER, width, grid) for grid in grids)
            batches.append((batch, sum(lengths), language + vision, batch["input_ids"].numel()))
        sources = random_pictures(rows, REFERENCE_PX)
        reference_flops = rows * tower_flops(TOWER, width, (1, 36, 36))

        def predicted(batches: Any = batches, layer: Any = layer) -> None:
            for batch, *_ in batches:
                teacher_forced_pairs(model, batch, packed, layer)

        def whole(batches: Any = batches, layer: Any = layer, sources: Any = sources) -> None:
            for batch, *_ in batches:
                teacher_forced_pairs(model, batch, packed, layer)
                packed.embed_pictures(sources)

        tokens, flops = sum(part[1] for part in batches), sum(part[2] for part in batches)
        padding = sum(part[3] for part in batches) / tokens - 1
        kind = "compiled" if compiled else "packed tower, eager layers"
        calls = rate(predicted, 1)
        report.add(
            f"editing, {kind}, B {rows}: predicted, tokens/s",
            calls * tokens,
            f"{calls * tokens:.0f}, {calls * 3 * rows:.1f} rows/s, {calls * flops / peak:.1%} of the matrix rate "
            f"(padding {padding:.1%})",
        )
        calls = rate(whole, 1, warm_up=1)
        fraction = calls * (flops + 3 * reference_flops) / peak
        report.add(
            f"editing, {kind}, B {rows}: with the source's 324, rows/s",
            calls * 3 * rows,
            f"{calls * 3 * rows:.1f}, {fraction:.1%} of the matrix rate, "
            f"{calls * 3 * rows / published:.1f} x one by one",
        )
        report.numbers[f"editing, {kind}, B {rows}, fraction"] = fraction
    first = batches[0][0]
    pairs = teacher_forced_pairs(model, first, packed, compiled_decoder_layer())
    ours = torch.cat([predicted for predicted, _ in pairs])
    theirs = model(**{name: tensor.to(DEVICE) for name, tensor in first.items()}).predicted_embeds
    report.add(
        "editing, deviation from the model's own forward (bf16)",
        deviation(ours, theirs),
        f"{deviation(ours, theirs):.2e}",
    )


# ---------------------------------------------------------------- from JPEG files to shards


def write_jpegs(directory: Path, first: int, count: int) -> int:
    """Smooth pictures with some grain, as photographs are: about 500 x 400 to 1000 x 800, quality 90."""
    random = np.random.default_rng(first)
    size = 0
    for index in range(first, first + count):
        width = int(random.integers(500, 1001))
        shape = (width, int(width * 0.8)) if index % 3 else (int(width * 0.8), width)
        coarse = Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8)).resize(
            shape, Image.Resampling.BICUBIC
        )
        grain = random.integers(-12, 13, (shape[1], shape[0], 1), dtype=np.int16)
        picture = Image.fromarray((np.asarray(coarse, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        (directory / f"{index:06d}.jpg").write_bytes(buffer.getvalue())
        size += buffer.tell()
    return size


def load(path: Path) -> Tensor:
    """(3, 252, 252) uint8: decoded and cover-cropped as the embedding stage does."""
    return torch.from_numpy(np.array(cover_crop(open_image(path), TARGET_PX)).transpose(2, 0, 1).copy())


def count_values(path: Path) -> int:
    """The work of `load` without its result."""
    return load(path).numel()


class Batches(Dataset[Tensor]):
    """Stacked pictures, a batch per item."""

    def __init__(self, paths: list[Path], batch: int) -> None:
        self.batches = [paths[first : first + batch] for first in range(0, len(paths), batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([load(path) for path in self.batches[index]])


def feeds(report: Report, paths: list[Path], batch: int, cores: int) -> None:
    """Ways to have decoded pictures ready, alone, 20 seconds each at most."""
    paths = paths[: 16 * batch]

    def timed(name: str, items: Callable[[], Iterator[int]]) -> None:
        began, done = time.perf_counter(), 0
        for count in items():
            done += count
            if time.perf_counter() - began > 20:
                break
        got = done / (time.perf_counter() - began)
        report.add(f"decode and resize, {name}, img/s", got, f"{got:.0f}")

    def threads() -> Iterator[int]:
        with ThreadPoolExecutor(cores) as pool:
            yield from (1 for _ in pool.map(load, paths))

    def processes() -> Iterator[int]:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            yield from (1 for _ in pool.imap(count_values, paths, chunksize=8))

    def loader(pin_memory: bool) -> Iterator[int]:
        dataset = Batches(paths, batch)
        for pictures in DataLoader(dataset, batch_size=None, num_workers=cores, pin_memory=pin_memory):
            yield len(pictures)

    timed(f"{cores} threads", threads)
    timed(f"{cores} processes, results dropped", processes)
    timed(f"loader of {cores} processes", lambda: loader(False))
    if CUDA:
        timed(f"loader of {cores} processes, pinned", lambda: loader(True))


def end_to_end(report: Report, packed: PackedVisionTower, tower_rate: float) -> None:
    """The stage's own pipeline from files to shards, and its parts alone."""
    cores, batch = len(os.sched_getaffinity(0)), SCALE.batch
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        per = -(-SCALE.jpegs // (cores * 4))
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            parts = [(directory, first, min(per, SCALE.jpegs - first)) for first in range(0, SCALE.jpegs, per)]
            size = sum(pool.starmap(write_jpegs, parts))
        paths = sorted(directory.glob("*.jpg"))
        average = size / len(paths) / 1000
        report.add("corpus", len(paths), f"{len(paths)} JPEGs, {average:.0f} kB on average, {cores} cores")
        few = paths[:batch]
        decode = rate(lambda: [load(path) for path in few], len(few), seconds=0, warm_up=0)
        report.add(
            "decode and resize, one core, img/s", decode, f"{decode:.0f} (x {cores} cores: {decode * cores:.0f})"
        )
        report.part(feeds, paths, batch, cores)
        if CUDA:
            pictures = random_pictures(batch, TARGET_PX)
            embeds = packed.embed_pictures(pictures)
            pinned = torch.empty(embeds.shape, dtype=embeds.dtype, pin_memory=True)
            copy_in = rate(lambda: pictures.cuda(non_blocking=True), batch, 0.3)
            copy_out = rate(lambda: pinned.copy_(embeds, non_blocking=True), batch, 0.3)
            report.add("copies to and from the GPU, img/s", copy_in, f"{copy_in:.0f} in, {copy_out:.0f} out")
        steady = report.part(through_the_stage, packed, paths, directory, cores, batch)
        report.add("tower alone, img/s", tower_rate, f"{tower_rate:.0f}")
        if steady:
            report.add("end to end over the tower alone", steady / tower_rate, f"{steady / tower_rate:.0%}")


def through_the_stage(
    report: Report, packed: PackedVisionTower, paths: list[Path], directory: Path, cores: int, batch: int
) -> float:
    """The pipeline of the embedding stages, of workers, device, packing and writing; 60 seconds at most."""
    from data.shards.plan import EarlierSamples, PlannedSample, PlannedShard, RowFacts
    from train.embed.pipeline import ShardFiller, stacked

    class Pictures:
        def prepare(self, sample: Any) -> dict[str, Tensor]:
            return {"target": load(Path(sample.facts["id"]))}

        def group(self, prepared: Any) -> int:
            return 0

        def embed(self, rows: Any) -> dict[str, Tensor]:
            return {"target_embeds": packed.embed_pictures(stacked([row["target"] for row in rows]))}

    samples = [
        PlannedSample(
            "train",
            RowFacts(None, path.name, str(path), "bench", "", [], ""),  # type: ignore[arg-type]
            {"id": str(path), "index": index, "address": path.name, "pictures": []},
        )
        for index, path in enumerate(paths)
    ]
    shards = [
        PlannedShard("train", n, samples[first : first + 512]) for n, first in enumerate(range(0, len(samples), 512))
    ]
    filler = ShardFiller(
        directory, Pictures(), EarlierSamples([]), {}, dtype="bfloat16", batch_size=batch, num_workers=cores, max_bad=0
    )
    began = time.perf_counter()
    times: list[tuple[float, int]] = []

    def note(rows: int) -> None:
        times.append((time.perf_counter(), rows))

    (directory / "train").mkdir()
    finished = filler.fill(shards, lambda: time.perf_counter() - began > 60, note)
    ended = time.perf_counter()
    rows = sum(count for _, count in times)
    steady = (rows - times[0][1]) / (ended - times[0][0])
    report.add(
        "JPEG files to shards, img/s",
        steady,
        f"{steady:.0f} from the first batch on, {rows / (ended - began):.0f} with the start of the workers"
        + ("" if finished else f"; stopped after {rows} pictures"),
    )
    return steady


@torch.no_grad()
def autoencoder(report: Report) -> None:
    """The latents that a stage stores beside the embeddings: FLUX's VAE at 512 px, random weights."""
    from nexus_gen.flux.vae import FluxVae
    from nexus_gen.specs.geometry import VaeGeometry

    vae = FluxVae(VaeGeometry([128, 256, 512, 512], 2, 32, 16)).to(DEVICE, DTYPE).eval()
    pixels = torch.randn(16, 3, 512, 512, device=DEVICE, dtype=DTYPE)
    got = rate(lambda: vae.encode(pixels), 16)
    report.add("VAE latents, 512 px, B 16, eager, img/s", got, f"{got:.0f}")
    last = vae.to(memory_format=torch.channels_last)
    channels_last = pixels.to(memory_format=torch.channels_last)
    got = rate(lambda: last.encode(channels_last), 16)
    report.add("VAE latents, 512 px, B 16, channels last, img/s", got, f"{got:.0f}")


# ---------------------------------------------------------------- all parts


@torch.no_grad()
def counted(report: Report, tower: VisionTower) -> None:
    """torch's own count of transformers' forward; it holds the second frame's patches too."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels, grid = random_patches([(1, 18, 18)])
    with FlopCounterMode(display=False) as counter:
        tower(pixels, grid_thw=grid.to(DEVICE))
    total = counter.get_total_flops()
    report.add("the same by torch's counter, both frames' patches", total, f"{total / 1e9:.2f} G")


def test_embedding() -> None:
    """Every part at the scale of this machine; raises at the end when one failed."""
    report = Report()
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    report.add("device", device, f"{device}, torch {torch.__version__}")
    peak = report.part(matrix_rate) or float("nan")
    flops = tower_flops(TOWER, LANGUAGE.hidden_size, (1, 18, 18))
    report.add("matrix FLOPs of a 252-px picture", flops, f"{flops / 1e9:.2f} G")
    tower = random_tower(TOWER, LANGUAGE.hidden_size)
    report.part(counted, tower)
    published = report.part(published_way, tower) or float("nan")
    report.part(tower_parity, tower)
    packed = report.part(default_tower, peak, published, tower)
    if packed is not None and CUDA:
        report.part(kernels, packed)
    report.part(editing, peak)
    if packed is not None:
        tower_rate = report.numbers[f"packed, compiled, 252 px, B {SCALE.batch}, img/s"]
        report.part(end_to_end, packed, tower_rate)
    if CUDA:
        report.part(autoencoder)
        report.part(variants, peak, published, tower, 300)
    report.finish()
    failed = [name for name in report.numbers if name.startswith("FAILED")]
    assert not failed, failed


if __name__ == "__main__":
    test_embedding()
