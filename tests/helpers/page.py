"""HTML as a browser would take it apart."""

from __future__ import annotations

from html.parser import HTMLParser

ATTACK = '<script>document.title = "run"</script><img src=x onerror="alert(1)"> " \' & {{ 7 * 7 }}'
"""Text that does something where it is not escaped."""


class Page(HTMLParser):
    """The elements, attributes and text of some HTML; elements that are left open are an error."""

    VOID = ("img", "rect", "path", "br")

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(content)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        """The text with one blank between its words."""
        return " ".join(self.text.split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def assert_harmless(self) -> None:
        for tag, attributes in self.elements:
            assert tag not in ("script", "style", "iframe", "object", "link"), tag
            assert not [name for name in attributes if name.startswith("on")], attributes
            assert (attributes.get("src") or "data:").startswith("data:"), attributes


def shown(record: object) -> Page:
    """What a notebook shows of `record`; nothing in it may run or be fetched."""
    page = Page(record._repr_html_())  # type: ignore[attr-defined]
    page.assert_harmless()
    return page
