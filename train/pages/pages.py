"""The templates of the pages of reports and evaluations, which are one self-contained file each."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def template(name: str) -> jinja2.Template:
    """A page of this package; its filter `data_url` puts a picture into the page itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_url"] = data_url
    return environment.get_template(name)
