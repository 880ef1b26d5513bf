"""The judge's question and its verdict: the prompt of a comparison, and the final verdict of a free-text answer.

A verdict is ``[[A]]``, ``[[B]]`` or ``[[C]]`` (also ``[[tie]]``). Judges quote what they judge, and answers may hold
verdicts of their own to win by; so the last line counts when it is a verdict and nothing else, then the last line with
a verdict that is not quoted. What remains unclear is no verdict: it is counted, never guessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from .readers import Pair

__all__ = ["load_judge_prompt", "parse_verdict", "render_comparison"]

PROMPTS = Path(__file__).parent / "judge_prompts"
PLACEHOLDERS = ("conversation", "answer_a", "answer_b", "mark")
REQUIRED = ("conversation", "answer_a", "answer_b")
# ASCII alone: IGNORECASE would take the dotless ı for an i, which is no word of WORD_OF.
MARKER = re.compile(r"(?a:\[\[\s*(?:(?:answer|assistant|response|model)\s+)?(A|B|C|tie)\s*\]\])", re.IGNORECASE)
WORD_OF = {"a": "a", "b": "b", "c": "tie", "tie": "tie"}
# The last line may say what it is: "Final verdict: **[[A]]**."
LEAD = r"(?:(?:my|the|final|overall|verdict|judge?ment|decision|answer|winner|choice|is|therefore|so|thus)\W+)*"
ALONE = re.compile(r"[\W_]*" + LEAD + r"[^\w\[]*(" + MARKER.pattern + r")[^\w\[\]]*", re.IGNORECASE)
MAX_ALONE = 200  # characters of such a line: matching takes quadratic time, and a longer line says more than a verdict
# What opens the text may be cut off; further in, an opening tag without its end is one that the judge quotes.
THOUGHT = re.compile(
    r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE
)
QUOTES = re.compile(
    r"```.*?```|~~~.*?~~~|`[^`\n]*`|\"[^\"\n]*\"|“[^”]{0,4000}”|«[^»]{0,4000}»|‘[^’\n]*’|(?<!\w)'[^'\n]*'(?!\w)"
    r"|^[ \t]*>.*$",
    re.DOTALL | re.MULTILINE,
)
CONTEXT = 12  # characters before a verdict that, found in an answer under judgement, make it a quotation


def load_judge_prompt(name: str) -> str:
    """The text of a shipped judge prompt or of a file.

    Raises ValueError for an unknown name, a file that is not text, and one without a needed placeholder.
    """
    path = PROMPTS / f"{name}.txt"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.txt")))
        raise ValueError(f"--judge-prompt {name}: expected a text file or a shipped name ({shipped})")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--judge-prompt {name}: cannot be read as UTF-8 text: {error}") from None
    missing = [word for word in REQUIRED if f"{{{word}}}" not in text]
    if missing:
        raise ValueError(
            f"--judge-prompt {name}: lacks the placeholders {', '.join(f'{{{word}}}' for word in missing)}"
        )
    return text


def render_comparison(template: str, pair: Pair, order: str) -> str:
    """The judge's question for a pair: in order "ab" the first model's answer is shown as A, in "ba" as B.

    The mark that fences the material off is a digest of it, which no answer can know.
    """
    conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in pair.messages)
    shown = (pair.response_a, pair.response_b) if order == "ab" else (pair.response_b, pair.response_a)
    digest = hashlib.sha256("\0".join((conversation, *shown)).encode("utf-8", "surrogatepass")).hexdigest()
    values = dict(zip(PLACEHOLDERS, (conversation, *shown, digest[:8]), strict=True))
    text = re.sub(r"\{(" + "|".join(PLACEHOLDERS) + r")\}", lambda match: values[match[1]], template)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair cannot be sent


def parse_verdict(raw: str, answers: Sequence[str] = ()) -> str | None:
    """The final verdict of a judge's text: "a" or "b" as shown, "tie", or None when there is none or it is unclear.

    ``answers`` are the texts under judgement, whose own verdict-like passages do not count.
    """
    text = THOUGHT.sub("", raw).strip()
    if not text:
        return None
    last = text.splitlines()[-1].strip()
    alone = ALONE.fullmatch(last) if len(last) <= MAX_ALONE else None
    if alone:
        return WORD_OF[alone[2].lower()]
    for line in reversed(_blank_quotes(text, answers).splitlines()):
        found = {WORD_OF[match[1].lower()] for match in MARKER.finditer(line)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _blank_quotes(text: str, answers: Sequence[str]) -> str:
    """The text without what stands in quotation marks or code, and without verdicts copied from the answers."""

    def keep(match: re.Match) -> str:
        passage = text[max(match.start() - CONTEXT, 0) : match.end()]
        copied = len(passage) > len(match[0]) and any(passage in answer for answer in answers)
        return "" if copied else match[0]

    return QUOTES.sub("", MARKER.sub(keep, text))
