"""A long list of small JSON values kept as text.

A tenth of the size of objects, sent to other processes as it is, and not copied by forked ones, which write to the
reference counts of objects that they look at.
"""

import json
from array import array
from typing import Any


class Packed:
    """Values by index, decoded on access."""

    def __init__(self) -> None:
        self._text, self._bounds = bytearray(), array("q", [0])

    def append(self, value: Any) -> None:
        self._text.extend(json.dumps(value).encode("ascii"))
        self._bounds.append(len(self._text))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._text[self._bounds[index] : self._bounds[index + 1]])
