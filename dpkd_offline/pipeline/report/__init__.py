"""The page of a run: what its folder holds, as sections of text, tables and figures, in HTML and in Markdown.

`run.py` reads a folder, `sections.py` says what the page shows of it, `page.py` and `markdown.py` write that.
"""
