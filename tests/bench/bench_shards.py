"""Writing embedding shards beside safetensors and webdataset's TarWriter: samples/s, alone and beside a busy thread.

Full-size samples: 81 x 3584 embeddings in bfloat16, packed, hashed and written on one thread each as the embedding
stages do; into memory (/dev/shm) where there is some, so that no disk is measured. The other way is what they did
before: every sample packed by itself, hashed twice on the writing thread, and cut into blocks by tarfile.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from data.shards.files import checksum, save_samples, write_shard
from train.embed.pipeline import quick_switches

BATCH, BATCHES, EMBED_DIM = 64, 4, 3584


class HashingFile(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def close(self) -> None:
        if not self.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        super().close()


def by_libraries(path: Path, batches: list[dict[str, Tensor]]) -> None:
    def pack(batch: dict[str, Tensor]) -> list[bytes]:
        return [save({name: values[n].contiguous() for name, values in batch.items()}) for n in range(BATCH)]

    def write(packed: list[list[bytes]]) -> None:
        with contextlib.closing(HashingFile(path)) as file, TarWriter(file, encoder=False, mtime=0.0) as writer:
            for number, data in enumerate(data for of_batch in packed for data in of_batch):
                text = json.dumps({"id": str(number), "checksum": checksum(data)}).encode()
                writer.write({"__key__": f"{number:09d}", "safetensors": data, "json": text})

    through(pack, write, batches)


def by_ours(path: Path, batches: list[dict[str, Tensor]]) -> None:
    def pack(batch: dict[str, Tensor]) -> list[tuple[bytes, str]]:
        return [(data, checksum(data)) for data in save_samples(batch)]

    def write(packed: list[list[tuple[bytes, str]]]) -> None:
        samples = (sample for of_batch in packed for sample in of_batch)
        write_shard(
            path, [(f"{n:09d}", data, {"id": str(n), "checksum": sha}) for n, (data, sha) in enumerate(samples)]
        )

    with quick_switches():
        through(pack, write, batches)


def through(pack: Callable[[Any], Any], write: Callable[[Any], None], batches: list[dict[str, Tensor]]) -> None:
    """Two shards: one is packed while the other is written."""
    with ThreadPoolExecutor(1) as packer, ThreadPoolExecutor(1) as writer:
        writing = []
        for _ in range(2):
            packed = [future.result() for future in [packer.submit(pack, batch) for batch in batches]]
            writing.append(writer.submit(write, packed))
        for future in writing:
            future.result()


@pytest.mark.parametrize("busy", [False, True])
def test_writing_beside_libraries(busy: bool) -> None:
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    batches = [{"target_embeds": torch.randn(BATCH, 81, EMBED_DIM).bfloat16()} for _ in range(BATCHES)]
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    if busy:
        thread.start()
    rates = {}
    try:
        for name, way in (("libraries", by_libraries), ("ours", by_ours)):
            if not busy:  # beside a thread a sample may take the libraries a quarter of a second
                way(directory / "0.tar", batches[:1])
            began, used = time.perf_counter(), time.process_time()
            timed = batches[:1] if busy else batches
            way(directory / "0.tar", timed)
            elapsed, cpu = time.perf_counter() - began, time.process_time() - used
            count = 2 * BATCH * len(timed)
            rates[name] = count / elapsed
            spent = "" if busy else f", {1e3 * cpu / count:.2f} ms CPU per sample"
            print(f"\n{name}{' beside a busy thread' if busy else ''}: {rates[name]:,.0f} samples/s{spent}", end="")
    finally:
        ended.set()
        if busy:
            thread.join()
        shutil.rmtree(directory)
    print(f"\nours: {rates['ours'] / rates['libraries']:.2f} x the samples/s")
