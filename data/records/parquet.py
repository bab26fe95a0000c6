"""Rows of Parquet files."""

from bisect import bisect_right
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from data.notices import notices_of
from data.records.record import Record, Records
from nexus_gen.specs.errors import UserError

ROW_GROUPS_KEPT = 4  # of Parquet files, decoded, in each process


class Parquet(Records):
    """Rows of a Parquet file; pictures may be paths, bytes, or the {bytes, path} of Hugging Face's datasets.

    A row group is read as a whole and the last few are kept, so an order that stays within a few groups reads fast.
    """

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first row of each row group, and the number of rows."""
        import pyarrow
        from pyarrow import parquet

        try:
            metadata = parquet.read_metadata(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} is no Parquet file ({' '.join(str(error).split())}); write it again"
            ) from error
        starts = [0]
        for group in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(group).num_rows)
        return starts

    @property
    def chunks(self) -> list[int]:
        return self._starts[:-1] or [0]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        group = bisect_right(self._starts, index) - 1
        rows = _row_group(self.path, group)
        if isinstance(rows, str):
            return self._record(index + 1, None, "parquet", rows)
        row = rows[index - self._starts[group]]
        values = {name: value for name, value in row.items() if value is not None}
        return self._record(index + 1, values, notices=notices_of("empty_value", frozenset(row.keys() - values.keys())))


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def _row_group(path: Path, group: int) -> list[dict[str, Any]] | str:
    """The rows of a row group, or why it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read_row_group(group).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return f"row group {group} cannot be read ({' '.join(str(error).split())}); write the file again"
