"""The small book that tests turn into class notebooks, tamper with and publish: one of every kind of block."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

FRONT_MATTER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
CHAPTER = r"""(sums)=
# What do sums do?

```{admonition} Objectives
:class: tip
- Add {term}`numbers <number>`, as {cite:t}`known` does {cite:p}`known`.
- **Prerequisites**: {doc}`other`, {doc}`two words <words>`.
```

```{code-cell} ipython3
:tags: [parameters, remove-cell]

profile = "embedded"
device = "cpu"
```

```{prf:theorem} The sum
:label: thm-sum

In $\R$ it holds that

$$
1 + 1
= 2 .
$$ (eq-sum)
```

```{prf:proof}
By {eq}`eq-sum` and {eq}`eq-other`.
```

```text
{eq}`kept`
```

See {prf:ref}`thm-sum`, {ref}`sums`, {ref}`this section <sums>`, {ref}`ex-code` and {numref}`fig-sum`.
Write ``{eq}`eq-sum` `` for {eq}`eq-sum`.

```{code-cell} ipython3
:tags: [hide-input]

from llvlit.publishing.exercises import check_answer

two = 1 + 1
dict(name="fig-sum")
```

````{exercise} ★ In words
:label: ex-words

What is {math}`1 + 1`?
````

````{solution-start} ex-words
:class: dropdown
````

SECRET-WORDS by {eq}`eq-sum`.

````{solution-end}
````

````{exercise} In code ★★★
:label: ex-code

Compute it.
````

```{dropdown} Hint
Count, as $\R$ in {ref}`sums` does.
```

```{code-cell} ipython3
:tags: [check]

answer = None  # a whole number
check_answer(answer, lambda: two, hint="Count again.")
```

````{solution-start} ex-code
:class: dropdown
````

SECRET-BEFORE

```{code-cell} ipython3
secret_code = two
assert check_answer(secret_code, lambda: two)
```

SECRET-AFTER

````{solution-end}
````

## After

```{code-cell} ipython3
print(two)
```
"""
OTHER = """\
# Other?

```{code-cell} ipython3
:tags: [parameters, remove-cell]

profile = "embedded"
device = "cpu"
```

$$
x = x
$$ (eq-other)

```{list-table}
:header-rows: 1

* - a
  - b
* - {doc}`sums`
  - long
    cell
```
"""


def course_book(chapter: str = CHAPTER) -> dict[str, str]:
    """Its files: a page without code, a chapter with exercises, and another chapter that it refers to."""
    return {
        "_config.yml": (REPOSITORY / "_config.yml").read_text(encoding="utf-8"),
        "_toc.yml": "root: book/words\nchapters:\n- file: book/sums\n- file: book/other\n",
        "book/references.bib": "@misc{known, title={A}, author={Bell, Ann and de Boer, Cees}, year={2000}}\n",
        "book/words.md": "# Words\n\nNo chapter.\n",
        "book/sums.md": FRONT_MATTER + chapter,
        "book/other.md": FRONT_MATTER + OTHER,
    }
