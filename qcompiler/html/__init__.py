"""The report as one HTML file: what each pass changed in the graph, how layers were quantized, and the errors."""

from qcompiler.html.page import write_page as write_page
from qcompiler.html.report_page import html_report as html_report
