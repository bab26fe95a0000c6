"""Reading the pages that commands write."""

from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """Counts tags, and keeps everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        names = ("src", "srcset", "href", "xlink:href", "data")
        self.fetched += [value for name, value in attrs if name in names and value]
