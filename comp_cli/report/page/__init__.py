"""Reports as pages: one self-contained HTML file each, without network and without script.

`pages.py` has a function for each report. Everything is made of the document that `--json` prints, which the page holds as
well.
"""
