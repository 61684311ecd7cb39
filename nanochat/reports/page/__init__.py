"""Self-contained HTML pages: charts as inline SVG, and the document around them.

No page loads anything: style, script and figures are inside, and its own policy forbids the rest.
"""

from nanochat.reports.page.chart import Dot, Interval, Series, intervals, lines, scatter
from nanochat.reports.page.document import Section, columns, details, document, facts, legend, paragraph, verbatim

__all__ = [
    "Dot",
    "Interval",
    "Section",
    "Series",
    "columns",
    "details",
    "document",
    "facts",
    "intervals",
    "legend",
    "lines",
    "paragraph",
    "scatter",
    "verbatim",
]
