"""Pages people want to show: score tables, curves and picture grids as one self-contained HTML file.

Plain functions that take numbers and return HTML; nothing here knows which benchmark it shows.
"""

from vlm2vec.files.report.curve import Series, curve
from vlm2vec.files.report.grids import Answer, Card, Query, grid, inline_image, picture_strip
from vlm2vec.files.report.page import facts, page, section, tiles, write_page
from vlm2vec.files.report.table import Score, mean_by_meta_task, score_lines, score_table

__all__ = [
    "Answer",
    "Query",
    "Score",
    "Series",
    "Card",
    "curve",
    "facts",
    "grid",
    "inline_image",
    "mean_by_meta_task",
    "page",
    "picture_strip",
    "score_lines",
    "score_table",
    "section",
    "tiles",
    "write_page",
]
