"""Print docs/METHODS.md: the published methods, from the tables that the package itself works with.

`make docs` writes the page; a test compares the two. What was measured is read from
`eval/results/demo.json`, which `eval/results/README.md` describes.
"""

from __future__ import annotations

from eval.methods_page.page import page

if __name__ == "__main__":
    print(page(), end="")
