"""A whole HTML page in one file: sections below a navigation, light and dark, wide and narrow.

What is text is escaped wherever it comes from; only `Markup` is taken as HTML. Build that by
`Markup("<p>{}</p>").format(text)`, which escapes what it puts in, and never from text itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.pages.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy: a page shows itself, and nothing is fetched, run or sent."""

_PAGE = Markup(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header><h1>{title}</h1>{subtitle}</header>
{navigation}
<main id="main">
{sections}
</main>
</body>
</html>
"""
)
_SECTION = Markup(
    '<section id="{name}" aria-labelledby="{name}-title">\n'
    '<h2 id="{name}-title">{title}</h2>\n{lead}{body}\n</section>'
)


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, HTML below it, and a sentence that says what is to be seen.

    A `body_html` that is not `Markup` is shown as text.
    """

    title: str
    body_html: Markup
    lead: str = ""


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Return a valid HTML5 page of these sections, each with its place in the navigation.

    >>> page("Runs", [Section("A < B", Markup("<p>text</p>"))]).count("A &lt; B")
    1
    """
    names = _names([section.title for section in sections])
    links = [
        Markup('<li><a href="#{}">{}</a></li>').format(name, section.title)
        for name, section in zip(names, sections, strict=True)
    ]
    navigation = Markup('<nav aria-label="Sections"><ul>{}</ul></nav>').format(together(links))
    return str(
        _PAGE.format(
            policy=Markup(POLICY),
            title=title,
            style=Markup(STYLE),
            subtitle=paragraph(subtitle, kind="subtitle"),
            navigation=navigation if len(sections) > 1 else "",
            sections=together(map(_section, names, sections), between="\n"),
        )
    )


def paragraph(text: str, *, kind: str = "") -> Markup:
    """Return a paragraph of text, with a class if it has one; nothing where there is no text."""
    if not text:
        return Markup()
    return Markup("<p{}>{}</p>").format(Markup(' class="{}"').format(kind) if kind else "", text)


def preformatted(text: str, *, label: str = "Text", wrap: bool = False) -> Markup:
    """Return text as it stands; where it is wider than the screen it scrolls, or is to `wrap`."""
    kind = Markup(' class="wrap"') if wrap else Markup()
    return Markup('<pre{} tabindex="0" role="region" aria-label="{}">{}</pre>').format(
        kind, label, text
    )


def card_row(cards: Sequence[tuple[str, str]]) -> Markup:
    """Return a few numbers, each above what it is, that are seen first."""
    parts = (
        Markup('<div class="card"><b>{}</b><span>{}</span></div>').format(number, what)
        for what, number in cards
    )
    return Markup('<div class="cards">{}</div>').format(together(parts))


def folded(title: str, body: Markup) -> Markup:
    """Return HTML that is folded away below its title."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, body)


def listed(items: Sequence[str]) -> Markup:
    """Return texts as a list."""
    return Markup("<ul>{}</ul>").format(together(Markup("<li>{}</li>").format(x) for x in items))


def side_by_side(*parts: Markup) -> Markup:
    """Return parts, charts for one, beside each other where the screen is wide enough."""
    return Markup('<div class="grid">{}</div>').format(together(parts))


def together(parts: object, between: str = "") -> Markup:
    """Return an iterable of parts as one piece of HTML; what is not `Markup` is escaped."""
    return Markup(between).join(parts)  # type: ignore[arg-type]


def _section(name: str, section: Section) -> Markup:
    return _SECTION.format(
        name=name,
        title=section.title,
        lead=paragraph(section.lead, kind="lead"),
        body=section.body_html,
    )


def _names(titles: Sequence[str]) -> list[str]:
    """Return a name for each title that a link can lead to: short, plain, and used once.

    >>> _names(["Sizes & speed", "Sizes, speed"])
    ['sizes-speed', 'sizes-speed-2']
    """
    found: list[str] = []
    for title in titles:
        name = base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        count = 1
        while name in found or name == "main":
            count += 1
            name = f"{base}-{count}"
        found.append(name)
    return found
