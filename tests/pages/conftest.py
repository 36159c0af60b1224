"""What the tests of pages share: a strict reader of HTML, and small results of runs."""

from __future__ import annotations

from html.parser import HTMLParser

from tests.report.conftest import many_blocks, result
from tests.story.conftest import command

__all__ = ["Reader", "command", "many_blocks", "result"]

VOID = {"meta", "br", "hr", "img", "link", "input"}
BLOCKS = {"p", "div", "ul", "table", "pre", "section", "figure", "details", "h1", "h2", "h3"}
TEXT_ONLY = {"p", "h1", "h2", "h3", "summary", "title", "figcaption", "b", "span", "small", "code"}
INSIDE = {
    "li": {"ul"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "caption": {"table"},
    "summary": {"details"},
    "figcaption": {"figure"},
    "desc": {"svg"},
    "polyline": {"svg"},
}
FETCHES = {"src", "srcset", "data", "poster", "action", "formaction", "xlink:href", "background"}


class Reader(HTMLParser):
    """Collects what a page holds, and checks that it is well formed and fetches nothing."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        assert source.startswith("<!DOCTYPE html>\n")
        self.feed(source)
        self.close()
        assert not self.open
        self.check()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self.open[-1] if self.open else ""
        assert not INSIDE.get(tag) or parent in INSIDE[tag], f"{tag} in {parent}"
        assert not (parent in TEXT_ONLY and tag in BLOCKS), f"{tag} in {parent}"
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"{tag} closes itself"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def check(self) -> None:
        """Check ids, links, and that nothing is fetched, run or sent."""
        ids = self.values("id")
        assert len(set(ids)) == len(ids)
        beside = {"analysis/analysis.html"}  # the one page that may lie with a result
        links = set(self.values("href")) - beside
        assert {link.removeprefix("#") for link in links} <= set(ids)
        assert all(link.startswith("#") for link in links)
        assert set(self.values("aria-labelledby")) <= set(ids)
        assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(self.tags)
        names = {name for _, name, _ in self.attributes}
        assert not FETCHES & names
        assert not [name for name in names if name.startswith("on")]
        for one in ("html", "head", "body", "main", "h1"):
            assert self.tags.count(one) == 1, one
        styles = " ".join([*self.of("style"), *self.values("style")])
        for word in ("url(", "@import", "expression"):
            assert word not in styles, word

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]

    def of(self, tag: str) -> list[str]:
        """Return the texts of a kind of element."""
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)
