"""The report as one HTML file: the pipeline pass by pass, what changed in the graph, and what that cost."""

from qcompiler.html.page import write_page as write_page
from qcompiler.html.report_page import html_report as html_report
