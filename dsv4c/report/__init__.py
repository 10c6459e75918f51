"""The report: everything that the compiler did to a model, as one HTML file that needs nothing else.

with report_file(Path("out.html")) as file:
    file.write(render(report_of_model(FLASH, "flash", Target("sm_90a"), Options())))

pipeline --stages--> Stage a pass: sides (the text), sublayers (the graph), figures (the work)
manifest --segmented, pools--> segments and calls, memory          all of it: gathering.Report --rendering--> HTML
"""

from __future__ import annotations

from dsv4c.report.gathering import Report
from dsv4c.report.making import Load, report_file, report_of_artifact, report_of_model
from dsv4c.report.measured import Measured, read_measured
from dsv4c.report.rendering import render

__all__ = [
    "Load",
    "Measured",
    "Report",
    "read_measured",
    "render",
    "report_file",
    "report_of_artifact",
    "report_of_model",
]
