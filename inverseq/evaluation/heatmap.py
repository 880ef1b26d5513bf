"""Token credit for the eye: coloured text in a terminal and in HTML, and the running value as a curve.

Blue is credit gained, red is credit lost; full colour is the 98th percentile of |credit| of the response, so that a
single extreme token does not wash out the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from .credit import Span, TokenCredit
from .page import escape, figure_svg, visible

__all__ = ["credit_html", "credit_rows", "credit_text", "messages_html", "strongest_spans", "value_figure"]

GAIN, LOSS = (33, 102, 172), (178, 24, 43)
MAX_SPANS = 4000  # shown at once; a browser grows slow far above
MAX_POINTS = 2000  # of a curve


def credit_scale(credit: TokenCredit) -> float:
    """The |credit| in nats that gets full colour."""
    magnitudes = np.abs(credit.credit[np.isfinite(credit.credit)])
    return max(float(np.percentile(magnitudes, 98)) if len(magnitudes) else 0.0, 1e-6)


def strength(value: float, scale: float) -> float:
    """Opacity of a token's colour, 0 … 1."""
    return min(1.0, abs(value) / scale) if np.isfinite(value) else 1.0


def credit_text(credit: TokenCredit) -> Text:
    """The response for a terminal, each token on its colour."""
    scale, text = credit_scale(credit), Text()
    for span in credit.spans:
        value = credit.span_credit(span)
        base = GAIN if value > 0 else LOSS
        red, green, blue = (round(255 + (channel - 255) * strength(value, scale)) for channel in base)
        ink = "black" if strength(value, scale) < 0.6 else "white"
        text.append(visible(span.text), style=f"{ink} on rgb({red},{green},{blue})")
    return text


def credit_html(credit: TokenCredit, max_spans: int = MAX_SPANS) -> str:
    """The response as HTML text, each token on its colour with its numbers as a tooltip; the rest is only counted."""
    scale, values = credit_scale(credit), credit.value
    parts = ['<div class="text" dir="auto">']
    for span in credit.spans[:max_spans]:
        value = credit.span_credit(span)
        red, green, blue = GAIN if value > 0 else LOSS
        alpha = strength(value, scale)
        ink = ";color:#fff" if alpha > 0.6 else ""
        style = f"background:rgba({red},{green},{blue},{alpha:.2f}){ink}"
        hint = f"credit {value:+.3f}, value {values[span.stop - 1]:+.3f}"
        text = escape(span.text).replace("\n", '<i class="break">↵</i>\n')
        parts.append(f'<span style="{style}" title="{hint}">{text}</span>')
    parts.append("</div>")
    num_shown = credit.spans[min(max_spans, len(credit.spans)) - 1].stop if credit.spans else 0
    if num_shown < len(credit.credit):
        hidden = credit.credit[num_shown:]
        parts.append(
            f'<p class="note">{len(hidden):,} more tokens are not shown; their credit is {hidden.sum():+.3f}.</p>'
        )
    return "".join(parts)


def messages_html(messages: Sequence[dict[str, str]], max_characters: int = 20_000) -> str:
    """The conversation before the response; a very long turn is cut and says so."""
    parts = []
    for message in messages:
        content = message["content"]
        cut = f" … ({len(content) - max_characters:,} more characters)" if len(content) > max_characters else ""
        parts.append(f'<div class="role">{escape(message["role"])}</div>')
        parts.append(f'<div class="text turn" dir="auto">{escape(content[:max_characters])}{escape(cut)}</div>')
    return "".join(parts)


def value_figure(credit: TokenCredit) -> str:
    """The running value over the response as an inline figure."""
    from matplotlib.figure import Figure

    values = credit.value
    positions = np.arange(1, len(values) + 1)
    if len(values) > MAX_POINTS:  # the extremes of each stretch, so that no peak is lost
        stretches = np.array_split(np.arange(len(values)), MAX_POINTS // 2)
        kept = sorted({i for s in stretches for i in (s[np.argmin(values[s])], s[np.argmax(values[s])])})
        values, positions = values[kept], positions[kept]
    figure = Figure(figsize=(7, 2.2))
    axes = figure.add_subplot()
    axes.axhline(0.0, color="#999", linewidth=0.8)
    axes.plot(positions, values, color="#2166ac", linewidth=1.2)
    axes.set(xlabel="response token", ylabel="value (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure_svg(figure, f"Value of the prefix: running sum of the credit, {credit.total:+.3f} nats at the end")


def strongest_spans(credit: TokenCredit, count: int) -> list[tuple[Span, float]]:
    """The spans of largest |credit|, strongest first."""
    scored = [(span, credit.span_credit(span)) for span in credit.spans]
    return sorted(scored, key=lambda item: -abs(item[1]))[:count]


def credit_rows(credit: TokenCredit) -> Iterator[tuple[int, str, float, float]]:
    """(position, text, credit, value) of every token; the text of several tokens stands with their first."""
    values = credit.value
    text_of = {span.start: span.text for span in credit.spans}
    for index, one in enumerate(credit.credit):
        yield index, text_of.get(index, ""), float(one), float(values[index])
