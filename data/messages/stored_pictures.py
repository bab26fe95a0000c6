"""The pictures that rows name or hold: a path, a member of a tar, bytes, base64 or a data: address.

No torch here.
"""

import base64
import os
import re
from pathlib import Path
from typing import Any

from data.quotes import BASE64, brief, shortened
from data.records.record import Record, RowError
from nexus_gen.pictures.images import EncodedImage, StoredImage

# How the files of pictures begin, in base64. A path that begins so has a suffix, and base64 has no full stop.
BASE64_HEAD = re.compile(
    r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK|AAAA.{1,2}Z0eX|AAAADGpQICA|AAABAA|UD[EIMQUY][KNg])"
    r"[A-Za-z0-9+/\s]{20}"
)
MOST_NAME, MOST_PATH = 255, 4096  # bytes that the name of a file and a path may have


def stored_image(image: Any, number: int, record: Record) -> StoredImage:
    """A picture of a row: the member of its tar, a path, or the bytes that came with it. number: from 1."""

    def refuse(kind: str, problem: str) -> RowError:
        return RowError(record.where, kind, problem)

    name = f"{number} of {record.where}"
    if isinstance(image, dict):  # Hugging Face's Image feature: the bytes, or a path where they were not embedded
        data = image.get("bytes")
        if isinstance(data, str) and data:  # JSON has no bytes
            try:
                return EncodedImage(name, decoded(data.partition(",")[2] if data.startswith("data:") else data))
            except ValueError as error:
                raise refuse("images", f"the bytes of image {number} are no base64 ({error})") from error
        image = data or image.get("path")
    if isinstance(image, bytes) and image:
        return EncodedImage(name, image)
    if not isinstance(image, str) or not image:
        raise refuse("images", f"image {number} is neither a path nor bytes")
    if image.startswith("data:"):
        head, _, text = image.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return EncodedImage(name, decoded(text))
        except ValueError as error:
            raise refuse("images", f"image {number} is a data: address that cannot be decoded ({error})") from error
    if is_base64(image):
        try:
            return EncodedImage(name, decoded(image))
        except ValueError as error:
            raise refuse("images", f"image {number} is base64 that cannot be decoded ({error})") from error
    if "://" in image:
        raise refuse(
            "url",
            f"image {shortened(image)} is an address; download it and give its path, nothing is fetched while training",
        )
    if len(image) > MOST_NAME and (len(image) > MOST_PATH or max(map(len, image.split("/"))) > MOST_NAME):
        raise refuse(
            "images", f"image {number} is a text of {len(image)} characters, neither a path nor a picture in base64"
        )
    if record.members:
        key = os.path.basename(record.name).partition(".")[0]
        for member in (os.path.basename(image), f"{key}.{image}"):
            if member in record.members:
                return record.members[member]
        beside = ", ".join(record.members)
        raise refuse("missing_picture", f"picture {shortened(image)} is not in the tar; beside the row are {beside}")
    if not is_unicode(image) or "\0" in image:
        raise refuse("images", f"image {number} has a path that no file can have")
    return (record.root or record.file.parent) / image


def is_base64(text: str) -> bool:
    """Whether a text is a picture in base64 and not the path of one."""
    return BASE64_HEAD.match(text) is not None and "." not in text


def decoded(text: str) -> bytes:
    """Base64 in lines too, and without its padding. Raises ValueError, whose words hold nothing of the text."""
    text = re.sub(r"\s+", "", text)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def not_there(path: Path) -> str:
    """What to say of a picture that does not exist; a name that nobody meant as one is not quoted."""
    name = str(path) if not BASE64.fullmatch(path.name) else f"{path.parent}/{brief(path.name)}"
    remedy = "paths are relative to the file that names them, or to picture_root"
    if "\\" in name:
        remedy = "write its path with / in place of \\"
    return f"picture {name} does not exist; {remedy}"


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
