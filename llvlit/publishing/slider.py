"""A text that changes with a slider: texts written in advance, one for each strength; without JavaScript, a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llvlit import checks
from llvlit.errors import InputError

SLIDER = """\
<div class="llvlit-slider" data-label="Push">
{items}
</div>
"""


def slider_html(texts: Mapping[str, Sequence[str]], *, start: str) -> str:
    """The element that ``slider.js`` turns into a slider over strengths, from left to right as they are given.

    Parameters
    ----------
    texts
        For the name of every strength, such as ``"twice as strong"``, some paragraphs.
    start
        The strength that the slider shows first.

    Raises
    ------
    InputError
        If ``start`` is none of them, or one has no paragraph.

    Examples
    --------
    >>> from llvlit.publishing.slider import slider_html
    >>> print(slider_html({"against": ["It was bad."], "none": ["It was."]}, start="none"))
    <div class="llvlit-slider" data-label="Push">
    <dl><dt>against</dt><dd>It was bad.</dd></dl>
    <dl data-start><dt>none</dt><dd>It was.</dd></dl>
    </div>
    <BLANKLINE>
    """
    texts = checks.instance("texts", texts, Mapping, "paragraphs by strength")
    if checks.text("start", start) not in texts:
        raise InputError(f"start={start!r} is none of the strengths {', '.join(map(repr, texts))}. Pass one of them.")
    items = []
    for name, paragraphs in texts.items():
        several = [checks.text("texts", each) for each in checks.sequence("texts", paragraphs, "paragraphs")]
        if not several:
            raise InputError(f"texts[{name!r}] has no paragraph. Pass at least one.")
        body = "".join(f"<dd>{escape(each)}</dd>" for each in several)
        items.append(f"<dl{' data-start' * (name == start)}><dt>{escape(checks.text('texts', name))}</dt>{body}</dl>")
    return SLIDER.format(items="\n".join(items))
