"""The report of a run: its records, as a JSON file, a self-contained HTML page, and a table for a terminal."""

from optframe.report.as_json import to_json, write_json
from optframe.report.page import render_html, write_html
from optframe.report.record import Change, EngineRun, PassRow, RunReport, count_provenance
from optframe.report.table import summary_table
from optframe.report.verdict import all_warnings, gains, headline, summary_lines

__all__ = [
    "Change",
    "EngineRun",
    "PassRow",
    "RunReport",
    "all_warnings",
    "count_provenance",
    "gains",
    "headline",
    "render_html",
    "summary_lines",
    "summary_table",
    "to_json",
    "write_html",
    "write_json",
]
