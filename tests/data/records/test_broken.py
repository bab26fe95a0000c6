"""Every kind of broken row is named by file, line and reason, and none is lost from the counts."""

from pathlib import Path

import pytest
from broken import BROKEN, Broken

from data.messages.rows import MissingPictures, RowError, count_rows, parse_record
from data.records.reading import open_records, read_records
from nexus_gen.pictures.images import context_size, open_image
from nexus_gen.specs.errors import UserError


def test_there_are_many_kinds() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) > 90


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_row_is_named_and_its_neighbours_are_used(broken: Broken, tmp_path: Path) -> None:
    path = broken.write(tmp_path)
    missing_picture = MissingPictures()
    used, found = [], []
    for record in read_records(path):
        try:
            row = parse_record(record)
        except RowError as error:
            found.append(("form", record.where, error.kind, error.problem))
            continue
        if missing := missing_picture.of(row):
            found.append(("listing", record.where, missing.kind, missing.problem))
            continue
        try:
            images = [open_image(image) for image in row.images]
            for image in images:
                context_size(image.width, image.height, patch_size=14, max_pixels=262640)
            used.append(row)
        except UserError as error:
            found.append(("opening", record.where, "picture", str(error)))
        except ValueError as error:
            found.append(("sizing", record.where, "picture", str(error)))
    ((found_by, where, kind, reason),) = found
    assert (found_by, where, kind) == (broken.found_by, f"{path}{broken.where}", broken.kind)
    assert broken.reason in reason
    assert "\n" not in reason
    assert len(used) + len(found) == broken.num_rows == len(open_records(path))
    if broken.found_by in ("form", "listing"):
        with pytest.raises(UserError) as caught:
            count_rows(path, check_images="exists").check()
        assert str(caught.value).startswith(f"{path}{broken.where}: ")
