"""Text that a model may write and a page must survive, and what a browser shows of HTML."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["HOSTILE", "text_of"]

HOSTILE = '<script>alert(1)</script> & "quotes" \u202eevil\u202c 🔑👩‍👩‍👧 مرحبا\n\x00end'


def text_of(page: str) -> str:
    """The text of HTML, references resolved."""
    parts: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = parts.append
    parser.feed(page)
    parser.close()
    return "".join(parts)
