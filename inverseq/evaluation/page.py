"""Self-contained HTML pages: one file, no script, no network, readable on a phone and on paper.

Everything that comes from a model or a file is text and goes through ``escape``; a Content-Security-Policy forbids
scripts and requests altogether, should anything slip through.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["document", "escape", "figure_svg", "table", "visible"]

# Control characters and those that reorder or hide text are shown by their code point.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } .facts td { text-align: left; overflow-wrap: anywhere; }
thead th { overflow-wrap: normal; white-space: normal; min-width: 3.5rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg, figure img { max-width: 100%; height: auto; }
figure img { min-width: 40rem; }  /* smaller, its words cannot be read: on a phone it scrolls by itself */
figcaption, .note { font-size: .85rem; color: #555; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .75rem; font-size: .8rem; }
.text { border: 1px solid #ddd; border-radius: .25rem; padding: .6rem; margin: .25rem 0 .75rem; line-height: 1.7; }
.turn { background: #f6f6f6; } .role { font-size: .75rem; color: #555; text-transform: uppercase; }
.text span { border-radius: .15rem; } .text .break { color: #999; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; font-size: 11pt; } figure img { min-width: 0; } figure, tr { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def visible(text: str) -> str:
    """Text with control, zero-width and direction-changing characters written as ⟨U+202E⟩; line ends stay."""
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.encode("utf-8", "replace").decode())


def escape(text: Any) -> str:
    """Anything as HTML text, safe between tags and inside a quoted attribute."""
    return html.escape(visible(str(text)), quote=True)


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page; ``sections`` are HTML made by this package's functions."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *sections,
            "</body></html>\n",
        ]
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where the screen is narrow; floats with four significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return escape(value)

    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure_svg(figure, caption: str) -> str:
    """A Matplotlib figure as inline SVG with its caption."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f'<figure role="img" aria-label="{escape(caption)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
