"""Examples come from rows whose pictures lie beside them or inside them."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

from nexus_gen.parts.examples import examples_of
from nexus_gen.pictures.images import open_image


def test_examples_show_pictures_of_files_and_of_rows(tmp_path: Path) -> None:
    rows = tmp_path / "shapes" / "artifact" / "heldout.jsonl"
    rows.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(rows.parent / "red.png")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(buffer, "PNG")
    inside = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    asked = (
        ("en", "red.png", "Which colour?"),
        ("en", inside, "Not of another category"),
        ("zh", inside, "什么颜色？"),
    )
    lines = [
        json.dumps(
            {
                "truth": {"task": "understanding", "category": "colour", "language": language},
                "images": [image],
                "messages": [{"role": "user", "content": f"<image>\n{words}"}],
            }
        )
        for language, image, words in asked
    ]
    rows.write_text("\n".join(lines) + "\n")

    english, chinese = examples_of(tmp_path)["understanding"]
    assert (english.words, chinese.words) == ("Which colour?", "什么颜色？")
    colours = [open_image(example.picture).getpixel((0, 0)) for example in (english, chinese) if example.picture]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert examples_of(tmp_path / "elsewhere") == {}
