"""Pages as a program reads them: the text, the exact values, the links; without a browser."""

from collections.abc import Mapping
from html.parser import HTMLParser

from tests.web.serving import Answer, Web

EMPTY = {"img", "input", "link", "meta", "br", "hr", "source", "wbr"}


class Element:
    """An element with what is in it."""

    def __init__(self, name: str, attributes: Mapping[str, str | None]) -> None:
        self.name = name
        self.attributes = attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        """All text in it, with single blanks."""
        return " ".join(self.raw.split())

    @property
    def raw(self) -> str:
        """All text in it as it is."""
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    def all(self, name: str = "", **attributes: str) -> list["Element"]:
        """The elements of this name in it, or all, at any depth; `class_` is one of its classes."""
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                if name in {"", child.name} and child._has(attributes):
                    found.append(child)
                found += child.all(name, **attributes)
        return found

    def one(self, name: str, **attributes: str) -> "Element":
        (found,) = self.all(name, **attributes)
        return found

    def _has(self, attributes: Mapping[str, str]) -> bool:
        for name, value in attributes.items():
            if name == "class_":
                if value not in (self.attributes.get("class") or "").split():
                    return False
            elif self.attributes.get(name) != value:
                return False
        return True

    @property
    def values(self) -> list[float]:
        """The exact values of the figures in it."""
        return [float(data.attributes["value"] or "") for data in self.all("data")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("page", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in EMPTY and not self.get_starttag_text().endswith("/>"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        closed = self._open.pop()
        if closed.name != tag:
            raise AssertionError(f"</{tag}> where {closed.name} is open")

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parsed(html: str) -> Element:
    """The page; every element must be closed."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    if parser._open != [parser.root]:
        raise AssertionError(f"{parser._open[-1].name} is not closed")
    return parser.root


def look(web: Web, path: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Element:
    """The page at a path, as a browser asks for it."""
    answer = answer_of(web, path, status, headers)
    if answer.headers["content-type"] != "text/html; charset=utf-8":
        raise AssertionError(f"{path}: {answer.headers['content-type']}")
    return parsed(answer.body.decode())


def answer_of(web: Web, path: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    answer = web.ask(path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", **(headers or {})})
    if answer.status != status:
        raise AssertionError(f"{path}: {answer.status} {answer.body[:2000]!r}")
    return answer


def tiles(page: Element) -> dict[str, Element]:
    """What the tiles show, by name."""
    return {tile.one("dt").text: tile.one("dd") for tile in page.all("div", class_="tile")}


def table(page: Element, heading: str) -> list[list[Element]]:
    """The cells of the table of the section with this heading."""
    (section,) = [section for section in page.all("section") if any(h2.text == heading for h2 in section.all("h2"))]
    return [row.all("td") for body in section.all("tbody") for row in body.all("tr")]
