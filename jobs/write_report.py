"""One self-contained HTML page, and one table for the terminal, about everything a run has made so far.

    python -m jobs.write_report --output run/report.html --tokenizer run/tokenizer --backbone run/backbone

Any subset of the inputs will do; what is not there is said, not guessed.
"""

from __future__ import annotations

from jobs.report.findings import ReportConfig, collect, summary_rows, summary_text
from jobs.report.html import page
from jobs.report.sections import report_sections
from pipeline import storage
from pipeline.config import absolute_places, run_job
from pipeline.errors import InputError

MARK = "<!-- written by jobs.write_report -->"
"""Second line of every report, by which a later run knows a file that it may replace."""


def write_report(config: ReportConfig) -> None:
    """Put the page and print its summary; InputError if there is nothing to report or the URL is taken."""
    config = absolute_places(config)
    url = config.output if config.output.endswith(".html") else storage.join(config.output, "report.html")
    older = storage.read_or_none(url)
    if older is not None and MARK.encode() not in older[:200]:
        raise InputError(f"{url} is there already and is no report; choose another --output")
    findings = collect(config)
    lead = "What the tokenizer tells apart, what the backbone predicts, and what its features are worth."
    storage.put(url, page(config.title, lead, report_sections(config, findings), mark=MARK))
    print(summary_text(summary_rows(findings)))
    print(f"\nreport: {url}", flush=True)


if __name__ == "__main__":
    run_job(write_report, ReportConfig)
