"""Text files that are not UTF-8: what they are, and how to say it. No torch here."""

MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 text by its mark, or by the zeros that UTF-16 puts beside ASCII characters; None for other."""
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if marked or len(head) < 2 or head[:2].count(0) != 1:
        return marked
    return "UTF-16LE" if head[1] == 0 else "UTF-16BE"


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that cannot be decoded, and the remedy."""
    encoding = wide_encoding(data)
    why = f"it is {encoding}" if encoding else f"{error.reason} at byte {error.start} of the row"
    return f"not UTF-8 ({why}); save it as UTF-8"


def utf8_text(data: bytes) -> str:
    """The text of a file in UTF-8, with or without a mark. Raises ValueError, which says what it is instead."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(data, error)) from error
    if "\0" in text:
        raise ValueError(f"not UTF-8 ({wide_encoding(data) or 'it holds zero bytes'}); save it as UTF-8")
    return text
