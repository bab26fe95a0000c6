"""Full-size models with random weights on one GPU: forward, backward, save, reload; with what each takes.

    python tests/gpu/full_size.py [PART ...] [--out DIR] [--scratch DIR] [--size released|medium|tiny]

Parts: generation, editing, autoregressive, flux, flux_float32 (default: all). The smaller sizes run on a CPU too:
medium is 1.5 B parameters of FLUX, tiny takes seconds. One line per fact at the end, and `full_size.json` in --out
(default: $OUT where set). Status 1 when a part failed. Needs about 50 GB of disk at a time under --scratch; each
checkpoint is deleted before the next.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_gen.decoders.checkpoint import load_decoder, load_flux, save_decoder, save_flux
from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.language.checkpoint import (
    SpecialTokenIds,
    build_autoregressive,
    load_autoregressive,
    save_autoregressive,
)
from nexus_gen.language.generate import generate_reply
from nexus_gen.parts.models import RELEASED, RELEASED_LANGUAGE, RELEASED_VISION
from nexus_gen.specs.geometry import (
    NUM_REFERENCE_TOKENS,
    RELEASED_TARGET_TOKENS,
    FluxGeometry,
    LanguageGeometry,
    ProjectorGeometry,
    VisionGeometry,
    patches_per_side,
)

GB = 1e9
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SECONDS_PER_CALL = 570  # parts that would end later are left out, and named


@dataclass
class Size:
    """The geometry of a run and the latents' side."""

    flux: FluxGeometry
    language: LanguageGeometry
    vision: VisionGeometry
    tokens: SpecialTokenIds
    latent_side: int


RELEASED_SIZE = Size(
    FluxGeometry(**RELEASED["generation_decoder"]["transformer"]),
    RELEASED_LANGUAGE,
    RELEASED_VISION,
    SpecialTokenIds(151655, 151656, 151652, 151653, end_of_turn=151645, padding=151643),
    latent_side=64,
)
TINY_SIZE = Size(
    FluxGeometry(32, 2, 1, 2, 24, 16, [4, 6, 6], 16, 2),
    LanguageGeometry(96, 32, 64, 2, 2, 1, [4, 2, 2], 1e6, 1e-6),
    VisionGeometry(4, 16, 24, 2, 2, 32, [1]),
    SpecialTokenIds(90, 91, 92, 93, end_of_turn=94, padding=95),
    latent_side=4,
)
SIZES = {
    "released": RELEASED_SIZE,
    "medium": dataclasses.replace(TINY_SIZE, flux=FluxGeometry(1536, 12, 10, 19, 2048, 768, [16, 56, 56], 16, 2)),
    "tiny": TINY_SIZE,
}


class Run:
    """Where it runs and what it found."""

    def __init__(self, size: Size, device: str, scratch: Path) -> None:
        self.size, self.device, self.scratch = size, torch.device(device), scratch
        self.facts: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()

    def note(self, part: str, **facts: Any) -> None:
        self.facts.setdefault(part, {}).update(facts)

    @contextmanager
    def measured(self, part: str, what: str) -> Iterator[None]:
        """Seconds, peaks of host memory above what the process held before, and the peak of device memory."""
        collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        peak = HostPeak()
        began = time.monotonic()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - began
            self.note(part, **{f"{what}_s": round(seconds, 2), **{f"{what}_{k}": v for k, v in peak.stop().items()}})
            if self.device.type == "cuda":
                self.note(part, **{f"{what}_device_peak_gb": round(torch.cuda.max_memory_allocated() / GB, 3)})
            print(f"[{time.monotonic() - self.began:6.1f} s] {part}: {what} took {seconds:.1f} s", flush=True)

    def build(self, part: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A model with random weights made where it runs, in bfloat16."""
        with self.measured(part, "build"), torch.device(self.device), default_dtype(torch.bfloat16):
            torch.manual_seed(0)
            model = make()
        parameters = list(model.parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        size = sum(parameter.nbytes for parameter in parameters)
        self.note(part, parameters=sum(parameter.numel() for parameter in parameters), weights_gb=round(size / GB, 6))
        return model

    def backward(self, part: str, model: nn.Module, loss_of: Callable[[Any], Tensor]) -> None:
        """One forward and backward; every parameter must get a finite gradient."""
        with self.measured(part, "train_step"):
            loss = loss_of(model)
            loss.backward()
        lost = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        norms = [parameter.grad.float().norm() for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.stack(norms).norm())
        self.note(part, loss=float(loss.detach()), grad_norm=norm, parameters_without_gradient=len(lost))
        model.zero_grad(set_to_none=True)
        assert not lost and norm > 0 and torch.isfinite(torch.tensor(norm)), f"{part}: gradients {lost[:4]} {norm}"

    def compare(self, part: str, before: Tensor, after: Tensor, what: str = "reloaded") -> None:
        equal = torch.equal(before, after)
        self.note(part, **{f"{what}_outputs_equal": equal})
        assert equal, f"{part}: outputs differ by {(before.float() - after.float()).abs().max():.2e} after reloading"

    def randn(self, *shape: int, seed: int = 1) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, torch.bfloat16)


class HostPeak:
    """The peak of this process's anonymous and of its whole resident memory, above where they began."""

    def __init__(self) -> None:
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM counts from now on; where that is not allowed, since the process began
        self._begin = status()
        self._anon = self._begin.get("RssAnon", 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._anon = max(self._anon, status().get("RssAnon", 0))

    def stop(self) -> dict[str, float]:
        self._done.set()
        self._thread.join()
        end = status()
        anon = max(self._anon, end.get("RssAnon", 0)) - self._begin.get("RssAnon", 0)
        resident = end.get("VmHWM", 0) - self._begin["VmRSS"]
        return {"host_anon_gb": round(anon / GB, 6), "host_resident_gb": round(resident / GB, 6)}


def status() -> dict[str, int]:
    """The kernel's memory figures of this process, in bytes."""
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith(("Vm", "Rss"))]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in lines}


def collect() -> None:
    """Give back what is free, and from now on at once, so that peaks count what is in use."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # glibc otherwise raises it to what was freed, up to 32 MB, and keeps that
    libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- parts ----------------------------------------------------------------------------------------------------------


def decoder(run: Run, part: str) -> None:
    """Either decoder: the generation decoder through safetensors, the editing decoder through the published .bin."""
    editing, width, side = part == "editing", run.size.language.hidden_size, run.size.latent_side

    def make() -> nn.Module:
        if editing:
            return build_editing_decoder(run.size.flux, ProjectorGeometry.of(run.size.language))
        return build_generation_decoder(run.size.flux, width)

    model = run.build(part, make)
    inputs = {
        "latents": run.randn(1, run.size.flux.latent_channels, side, side),
        "timestep": torch.tensor([500.0], device=run.device),
        "guidance": torch.tensor([3.5], device=run.device),
        "pooled": run.randn(1, run.size.flux.pooled_dim),
        "target_embeds": run.randn(1, RELEASED_TARGET_TOKENS, width),
        "source_embeds": run.randn(1, NUM_REFERENCE_TOKENS, width) if editing else None,
    }
    target = run.randn(1, run.size.flux.latent_channels, side, side, seed=2).float()
    run.backward(part, model, lambda m: (m(**inputs, gradient_checkpointing=True).float() - target).square().mean())
    with torch.no_grad():
        before = model(**inputs)
    path = run.scratch / ("edit_decoder.bin" if editing else "generation_decoder.safetensors")
    with run.measured(part, "save"):
        save_decoder(model, path)
    run.note(part, file=path.name, file_gb=round(size_of(path) / GB, 3))
    del model
    with run.measured(part, "load"):
        with torch.device("meta"):
            loaded = make()
        load_decoder(loaded, path, torch.bfloat16, run.device)
    with torch.no_grad():
        run.compare(part, before, loaded(**inputs))


def autoregressive(run: Run, part: str) -> None:
    """The language model with its vision tower: a context image, a target image, a reply of one image."""
    size = run.size
    model: Any = run.build(part, lambda: build_autoregressive(size.vision, size.language, size.tokens, seed=0))
    image = [size.tokens.vision_start, *[size.tokens.image] * RELEASED_TARGET_TOKENS, size.tokens.vision_end]
    prompt = [*image, *range(5, 25)]
    input_ids = torch.tensor([[*prompt, *image, size.tokens.end_of_turn]], device=run.device)
    labels = input_ids.clone()
    labels[:, : len(prompt)] = -100
    side = patches_per_side(RELEASED_TARGET_TOKENS)
    num_patches, values = side**2, 3 * 2 * size.vision.patch_size**2
    grid = torch.tensor([[1, side, side]] * 2, device=run.device)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": run.randn(2 * num_patches, values),
        "image_grid_thw": grid,
    }
    model.gradient_checkpointing_enable({"use_reentrant": False})
    run.backward(part, model.train(), lambda m: m(**batch).loss)
    request = {
        "input_ids": input_ids[:, : len(prompt)],
        "pixel_values": batch["pixel_values"][:num_patches],
        "image_grid_thw": grid[:1],
        "max_new_tokens": RELEASED_TARGET_TOKENS + 2,
        "force_image_first": True,
    }
    # A model built on a GPU gives other outputs than its reloaded copy, one built on a CPU the same: presumably its
    # rotary frequencies, which every loaded model has from the CPU. What users save was loaded before.
    built, path = run.scratch / "built", run.scratch / "autoregressive"
    save_autoregressive(model, built)
    del model
    model = load_autoregressive(built, dtype=torch.bfloat16, device=run.device)
    shutil.rmtree(built)
    with run.measured(part, "imagine"):
        before = generate_reply(model, **request).image_embeds[0][0]
    with run.measured(part, "save"):
        save_autoregressive(model, path)
    run.note(part, files=len(list(path.glob("*.safetensors"))), file_gb=round(size_of(path) / GB, 3))
    del model
    with run.measured(part, "load"):
        loaded = load_autoregressive(path, dtype=torch.bfloat16, device=run.device)
    run.compare(part, before, generate_reply(loaded, **request).image_embeds[0][0])


def flux(run: Run, part: str) -> None:
    """FLUX's transformer out of the diffusers layout, where q, k and v lie apart, into host and device memory."""
    in_float32 = part == "flux_float32"
    model: Any = run.build(part, lambda: FluxTransformer(run.size.flux))
    side = run.size.latent_side
    inputs = {
        "latents": run.randn(1, run.size.flux.latent_channels, side, side),
        "timestep": torch.tensor([500.0], device=run.device),
        "context": run.randn(1, RELEASED_TARGET_TOKENS, run.size.flux.context_dim),
        "pooled": run.randn(1, run.size.flux.pooled_dim),
        "guidance": torch.tensor([3.5], device=run.device),
    }
    with torch.no_grad():
        before = model(**inputs)
    path = run.scratch / "transformer" / "diffusion_pytorch_model.safetensors"
    with run.measured(part, "save"):
        save_flux(model.float() if in_float32 else model, path, "diffusers")
    run.note(part, file_gb=round(size_of(path) / GB, 3))
    del model
    weights = run.facts[part]["weights_gb"]
    for what, device in (("load_to_host", torch.device("cpu")), ("load_to_device", run.device)):
        with run.measured(part, what):
            loaded = load_flux(path, run.size.flux, torch.bfloat16, device)
        for kind in ("anon", "resident"):
            run.note(part, **{f"{what}_{kind}_ratio": round(run.facts[part][f"{what}_host_{kind}_gb"] / weights, 3)})
        with torch.no_grad():
            run.compare(part, before, loaded.to(run.device)(**inputs), what)
        del loaded


PARTS: dict[str, Callable[[Run, str], None]] = {
    "generation": decoder,
    "editing": decoder,
    "autoregressive": autoregressive,
    "flux": flux,
    "flux_float32": flux,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]) if "OUT" in os.environ else None)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", choices=SIZES, default="released")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.size == "released" and not torch.cuda.is_available():
        parser.error("full size needs a CUDA device; --size tiny runs anywhere")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(SIZES[arguments.size], device, arguments.scratch / "full_size")
    run.note(
        "machine",
        size=arguments.size,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        torch=torch.__version__,
    )
    run.note("geometry", flux=dataclasses.asdict(run.size.flux), language=dataclasses.asdict(run.size.language))
    failed = False
    longest = 0.0
    for part in arguments.parts or PARTS:
        began = time.monotonic()
        # The float32 files are twice as large as any before them.
        expected = longest * (2 if part == "flux_float32" else 1)
        if began - run.began + expected > SECONDS_PER_CALL:
            run.note(part, left_out=f"would take about {expected:.0f} s more")
            continue
        run.scratch.mkdir(exist_ok=True)
        try:
            PARTS[part](run, part)
        except Exception:
            traceback.print_exc()
            run.note(part, failed=traceback.format_exc(limit=1).splitlines()[-1])
            failed = True
        finally:
            shutil.rmtree(run.scratch)
            collect()
        longest = max(longest, time.monotonic() - began)
    for part, facts in run.facts.items():
        for name, value in facts.items():
            print(f"{part}.{name} = {value}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "full_size.json").write_text(json.dumps(run.facts, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
