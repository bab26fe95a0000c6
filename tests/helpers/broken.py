"""Datasets with one broken row each: what is wrong, where it is named, by which check it is found.

The broken row stands between two good ones, except where the file as a whole is the broken row.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

USER = {"role": "user", "content": "<image> what?"}
REPLY = {"role": "assistant", "content": "a square"}
PAINT = {"role": "assistant", "content": "here: <image>"}
SYSTEM = {"role": "system", "content": "be brief"}
GOOD = {"id": "good", "images": ["good.png"], "messages": [USER, REPLY]}

Write = Callable[[Path], Path]


@dataclass(frozen=True)
class Broken:
    """A dataset of one broken row.

    where: what follows the path of the dataset in the row's name. kind, reason: what it is counted under, and words of
    its sentence. found_by: `form` (parse_record), `listing` (a picture is not there), `opening` (a picture cannot be
    decoded), `sizing` (the model cannot look at it). write: makes the dataset in a directory and returns its path.
    num_rows: broken and good ones together.
    """

    name: str
    where: str
    kind: str
    reason: str
    found_by: str
    write: Write
    num_rows: int = 3


def png(width: int = 24, height: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def lines(broken: Any, pictures: dict[str, bytes] | None = None) -> Write:
    """JSON lines, the second broken: text or bytes as they stand, or values."""

    def write(directory: Path) -> Path:
        for name, data in {"good.png": png(), **(pictures or {})}.items():
            (directory / name).write_bytes(data)
        texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in (GOOD, broken, GOOD)]
        path = directory / "rows.jsonl"
        path.write_bytes(b"".join((t.encode() if isinstance(t, str) else t) + b"\n" for t in texts))
        return path

    return write


def array(text: str) -> Write:
    def write(directory: Path) -> Path:
        (directory / "good.png").write_bytes(png())
        (directory / "rows.json").write_text(text)
        return directory / "rows.json"

    return write


def tar(*members: tuple[str, bytes], damage: str = "") -> Write:
    """A tar of a good row, then `members`. damage: the header of b.json is `cut`, or it is `noise`."""

    def write(directory: Path) -> Path:
        path = directory / "rows.tar"
        good = json.dumps({"id": "good", "messages": [USER, REPLY]}).encode()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in (("a.json", good), ("a.png", png()), *members):
                info = tarfile.TarInfo(name)
                if data == b"->":
                    info.type, info.linkname = tarfile.SYMTYPE, "a.png"
                info.size = 0 if data == b"->" else len(data)
                archive.addfile(info, io.BytesIO(data))
        if damage:
            data = path.read_bytes()
            place = data.index(b"b.json")
            path.write_bytes(data[: place + 99] if damage == "cut" else data.replace(b"b.json", b"\xff" * 6))
        return path

    return write


def parquet(rows: list[dict[str, Any]], damage: bool = False) -> Write:
    def write(directory: Path) -> Path:
        import pyarrow
        from pyarrow import parquet as files

        (directory / "good.png").write_bytes(png())
        path = directory / "rows.parquet"
        files.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
        if damage:
            column = files.read_metadata(path).row_group(1).column(0)
            with open(path, "r+b") as file:
                file.seek(column.dictionary_page_offset or column.data_page_offset)
                file.write(b"\xff" * 24)
        return path

    return write


def unusual_file(make: Callable[[Path], None]) -> Write:
    """A row whose picture `bad.png` is a file of a sort of its own."""

    def write(directory: Path) -> Path:
        make(directory / "bad.png")
        return lines({**GOOD, "images": ["bad.png"]})(directory)

    return write


def row(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**GOOD, **changes}.items() if value != "left out"}


def says(*contents: Any, **changes: Any) -> dict[str, Any]:
    """A row whose user and assistant say this in turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return row(messages=messages, **changes)


def openai(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, REPLY]}


def form(name: str, kind: str, reason: str, broken: Any) -> Broken:
    return Broken(name, ":2", kind, reason, "form", lines(broken))


def picture(name: str, reason: str, data: bytes) -> Broken:
    """The bytes of bad.png, which tells its format by its content alone."""
    write = lines({**GOOD, "images": ["bad.png"]}, {"bad.png": data})
    return Broken(name, ":2", "picture", reason, "opening", write)


def cut(image_format: str) -> bytes:
    data = encoded(Image.open(io.BytesIO(png(60, 60))), image_format)
    return data[: len(data) // 2]


def flipped_png() -> bytes:
    data = bytearray(png())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def missing(name: str, image: str) -> Broken:
    return Broken(name, ":2", "missing_picture", f"{image} does not exist", "listing", lines(row(images=[image])))


GOOD_JSON = json.dumps(GOOD)
B_ROW = json.dumps({"messages": [USER, REPLY]}).encode()
TEXT_ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, REPLY]}).encode()

BROKEN = [
    form("no JSON", "json", "not JSON", "{not json"),
    form("JSON cut short", "json", "not JSON", GOOD_JSON[:40]),
    form("two objects on a line", "json", "not JSON", GOOD_JSON + GOOD_JSON),
    form("a list", "json", "a list where a JSON object", "[1, 2]"),
    form("a string", "json", "a str where a JSON object", '"hello"'),
    form("null", "json", "a NoneType where a JSON object", "null"),
    form("a key twice", "json", "key 'images' is there twice", '{"images": [], "images": ["good.png"]}'),
    form("nested without end", "json", "not JSON", "[" * 100_000),
    form("not UTF-8", "encoding", "not UTF-8", b'{"id": "\xff"}'),
    form("UTF-16", "encoding", "not UTF-8", GOOD_JSON.encode("utf-16").replace(b"\n", b"")),
    form("half a surrogate pair", "encoding", "surrogate", says("<image> \ud83d", "a square")),
    form("no messages", "messages", "no messages", row(messages="left out")),
    form("empty messages", "messages", "no messages", row(messages=[])),
    form("messages are an object", "messages", "no messages", row(messages={"role": "user"})),
    form("a message is text", "messages", "every message needs a role", row(messages=["hi", "hello"])),
    form("no content", "messages", "content of text", row(messages=[{"role": "user"}, REPLY])),
    form("content is null", "messages", "content of text", says(None, "a square")),
    form("content is a number", "messages", "content of text", says(3, "a square")),
    form("a choice of nothing", "messages", "content of text", says("<image>", [])),
    form("a choice with a number", "messages", "content of text", says("<image>", ["a", 3])),
    form("a choice with other tags", "placeholders", "hold 0 and 1 <image> tags", says(["<image> a", "b"], "c")),
    form("unknown role", "role", "role 'tool' is none of", row(messages=[USER, {**REPLY, "role": "tool"}])),
    form("no role", "role", "role None is none of", row(messages=[{"content": "<image>"}, REPLY])),
    form("a question only", "order", "turns are user;", row(messages=[USER])),
    form("a reply first", "order", "turns are assistant, user", row(messages=[REPLY, USER])),
    form("two questions", "order", "turns are user, user", row(messages=[USER, {**USER, "content": "so?"}])),
    form("a question last", "order", "an assistant ends", says("<image> what?", "a square", "and?")),
    form("system last", "order", "a system message stands first", row(messages=[USER, REPLY, SYSTEM])),
    form("system twice", "order", "a system message stands first", row(messages=[SYSTEM, SYSTEM, USER, REPLY])),
    form("system alone", "order", "turns are missing", row(messages=[SYSTEM], images=[])),
    form(
        "a picture in the system message",
        "placeholders",
        "a system message holds <image>",
        row(messages=[{**SYSTEM, "content": "<image>"}, {"role": "user", "content": "what?"}, REPLY]),
    ),
    form("too few pictures", "placeholders", "0 images for 1 <image> tags", row(images=[])),
    form("too many pictures", "placeholders", "2 images for 1 <image> tags", row(images=["good.png"] * 2)),
    form("no pictures", "placeholders", "0 images for 1 <image> tags", row(images="left out")),
    form("no tags", "placeholders", "1 images for 0 <image> tags", says("what?", "a square")),
    form("images are text", "images", "images are text but not JSON", row(images="['good.png']")),
    form("images are numbers", "images", "image 1 is neither a path nor bytes, but 3", row(images=[3])),
    form("an image is null", "images", "image 1 is empty", row(images=[None])),
    form("an image without a name", "images", "image 1 is empty", row(images=[""])),
    form("a path with a zero byte", "images", "a path that no file can have", row(images=["a\0.png"])),
    form("an image object without bytes", "images", "neither a path nor bytes", row(images=[{"width": 3}])),
    form("https", "url", "is an address", row(images=["https://example.com/a.png"])),
    form("a bucket", "url", "is an address", row(images=["s3://bucket/a.png"])),
    form("file://", "url", "is an address", row(images=["file:///a.png"])),
    form("data: that is no base64", "images", "cannot be decoded", row(images=["data:image/png;base64,*"])),
    form("data: of another encoding", "images", "not base64", row(images=["data:image/png,abc"])),
    form("an empty reply", "empty_reply", "an assistant message is empty", says("<image>", " ")),
    form("an empty question", "empty_prompt", "a user message is empty", says("", "hello", images=[])),
    form("a picture token", "markup", "holds <|image_pad|>", says("<image> <|image_pad|>", "a square")),
    form("the end of a turn", "markup", "holds <|im_end|>", says("<image>", "a<|im_end|>")),
    form("a misspelt key", "key", "did you mean 'messages'?", row(message=[USER], messages="left out")),
    form("truth is text", "truth", "truth is a str", row(truth="red")),
    form("ShareGPT: unknown speaker", "role", "role 'bot' is none", {"conversations": [{"from": "bot", "value": "a"}]}),
    form("ShareGPT: no list", "messages", "must be a list of {from, value}", {"conversations": {"from": "human"}}),
    form("ShareGPT: no text", "messages", "content of text", {"conversations": [{"from": "human"}, {"from": "gpt"}]}),
    form("OpenAI: audio", "messages", "part of type 'input_audio'", openai({"type": "input_audio"})),
    form(
        "OpenAI: an address", "url", "is an address", openai({"type": "image_url", "image_url": {"url": "http://a/b"}})
    ),
    form("OpenAI: a tag in text", "placeholders", "a text part holds", openai({"type": "text", "text": "<image>"})),
    form("OpenAI: tools", "messages", "calls tools", {"messages": [*openai()["messages"], {"tool_calls": [1]}]}),
    form("messages as broken text", "messages", "text but not JSON", row(messages="[{")),
    form("no caption", "empty_prompt", "caption is empty", {"image": "good.png", "caption": ""}),
    form("captions are numbers", "messages", "content of text", {"image": "good.png", "captions": [1]}),
    form("unknown language", "language", "language is 'fr'", {"image": "good.png", "caption": "a", "language": "fr"}),
    form("an edit without its result", "key", "needs 'target_image'", {"source_image": "a.png", "instruction": "b"}),
    missing("a picture that is not there", "gone.png"),
    missing("a directory that is not there", "gone/good.png"),
    missing("a picture under an absolute path", "/nowhere/good.png"),
    missing("a file for a directory", "good.png/good.png"),
    missing("a name in other letters", "GOOD.png"),
    Broken(
        "a link to nothing",
        ":2",
        "picture",
        "does not exist",
        "opening",
        unusual_file(lambda path: os.symlink("gone.png", path)),
    ),
    Broken("a directory for a picture", ":2", "picture", "cannot be read", "opening", unusual_file(Path.mkdir)),
    picture("an empty picture", "it is none of PNG", b""),
    picture("text for a picture", "it is none of PNG", b"hello"),
    picture("a page for a picture", "it is none of PNG", b"<!DOCTYPE html><html>not found</html>"),
    picture("SVG", "it is none of PNG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    picture("EPS, which would start a program", "it is none of PNG", encoded(Image.new("RGB", (8, 8)), "EPS")),
    picture("PNG cut short", "cannot be read", cut("PNG")),
    picture("JPEG cut short", "cannot be read", cut("JPEG")),
    picture("WebP cut short", "cannot be read", cut("WEBP")),
    picture("TIFF cut short", "cannot be read", cut("TIFF")),
    picture("GIF cut short", "cannot be read", cut("GIF")),
    picture("BMP cut short", "cannot be read", cut("BMP")),
    picture("the head of a PNG", "cannot be read", png()[:20]),
    picture("a bit that tipped", "cannot be read", flipped_png()),
    picture("a bomb", "exceeds limit of", png_of_claimed_size(100_000, 100_000)),
    picture("a smaller bomb", "12000 x 8000 pixels are more than 89478485", png_of_claimed_size(12_000, 8_000)),
    picture("no width", "cannot be read", png_of_claimed_size(0, 16)),
    picture("less data than it claims", "cannot be read", png_of_claimed_size(500, 500)),
    picture(
        "pixels as floating point", "floating-point", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    ),
    Broken(
        "data: that is no picture",
        ":2",
        "picture",
        "it is none of PNG",
        "opening",
        lines(row(images=["data:image/png;base64,aGVsbG8="])),
    ),
    Broken(
        "a hair",
        ":2",
        "picture",
        "more than 200 times as long",
        "sizing",
        lines(row(images=["bad.png"]), {"bad.png": png(2, 500)}),
    ),
    Broken("an array cut short", ":1", "json", "not JSON", "form", array(f"[{GOOD_JSON},"), 1),
    Broken("a number in an array", ":2", "json", "a int where", "form", array(f"[{GOOD_JSON}, 3, {GOOD_JSON}]")),
    Broken(
        "tar: no row",
        ":b",
        "tar",
        "no b.json beside b.png",
        "form",
        tar(("b.png", png()), ("c.json", TEXT_ROW)),
    ),
    Broken("tar: broken row", ":b.json", "json", "not JSON", "form", tar(("b.json", b"{"), ("b.png", png())), 2),
    Broken(
        "tar: a member twice",
        ":b",
        "tar",
        "b.png is there twice",
        "form",
        tar(("b.json", B_ROW), ("b.png", png()), ("b.png", png())),
        2,
    ),
    Broken("tar: a link", ":b", "tar", "b.png is a link", "form", tar(("b.json", B_ROW), ("b.png", b"->")), 2),
    Broken("tar: no picture", ":b.json", "placeholders", "0 images for 1", "form", tar(("b.json", B_ROW)), 2),
    Broken(
        "tar: another picture",
        ":b.json",
        "missing_picture",
        "picture c.png is not in the tar",
        "form",
        tar(("b.json", json.dumps({**GOOD, "images": ["c.png"]}).encode()), ("b.png", png())),
        2,
    ),
    Broken(
        "tar: a picture cut short",
        ":b.json",
        "picture",
        "cannot be read",
        "opening",
        tar(("b.json", B_ROW), ("b.png", cut("PNG"))),
        2,
    ),
    Broken("tar cut short", ":after a", "tar", "what follows is lost", "form", tar(("b.json", B_ROW), damage="cut"), 2),
    Broken("tar: noise", ":after a", "tar", "damaged here", "form", tar(("b.json", B_ROW), damage="noise"), 2),
    Broken(
        "Parquet: no messages",
        ":2",
        "messages",
        "'messages', which a row of format messages needs, is empty",
        "form",
        parquet([GOOD, {"id": "b", "images": ["good.png"]}, GOOD]),
    ),
    Broken(
        "Parquet: empty bytes",
        ":2",
        "images",
        "image 1 is empty",
        "form",
        parquet([{**GOOD, "images": [data]} for data in (png(), b"", png())]),
    ),
    Broken(
        "Parquet: bytes that are no picture",
        ":2",
        "picture",
        "it is none of PNG",
        "opening",
        parquet([{**GOOD, "images": [data]} for data in (png(), b"hello", png())]),
    ),
    Broken(
        "Parquet: a damaged row group",
        ":2",
        "parquet",
        "row group 1 cannot be read",
        "form",
        parquet([GOOD, GOOD, GOOD], damage=True),
    ),
]
