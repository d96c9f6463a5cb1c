"""The trade-off between ratio and accuracy: a table for the terminal, and the same in Markdown."""

from collections.abc import Iterator

from .base import Sizes
from .numbers import Printer, gflops, mib, millions, percent
from .prune_tables import metric_value
from .sweep import Point, SweepReport


def trade_off(report: SweepReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, the dense model first. Columns of what was not measured are left out."""
    columns = ["ratio", "FLOPs per pair", "parameters", "weights on disk", report.metric or "metric", "agreement", "folder"]
    rows = [_dense(report), *(_row(point, report) for point in report.points)]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in used], [[row[index] or "-" for index in used] for row in rows]


def _dense(report: SweepReport) -> list[str]:
    known = next((point for point in report.points if point.flops is not None), None)
    if known is None:
        return ["dense", "", "", "", "", "", ""]
    sized = next((point.size_bytes for point in report.points if point.size_bytes is not None), None)
    measured = next((point.metric for point in report.points if point.metric is not None), None)
    return ["dense", *_sizes(known, sized, "dense"), "" if measured is None else _metric(report, measured.dense), "", ""]


def _row(point: Point, report: SweepReport) -> list[str]:
    return [
        f"{point.ratio:g}",
        *_sizes(point, point.size_bytes, "compact"),
        "" if point.metric is None else _metric(report, point.metric.compact),
        "" if point.agreement is None else percent(point.agreement),
        point.folder or ("failed" if point.failed else ""),
    ]


def _sizes(point: Point, size: Sizes | None, side: str) -> Iterator[str]:
    for found, shown in (point.flops, gflops), (point.params, millions), (size, mib):
        yield "" if found is None else shown(getattr(found, side))


def _metric(report: SweepReport, value: float) -> str:
    return metric_value(report.metric or "", value)


def print_sweep(report: SweepReport, out: Printer) -> None:
    """The trade-off, on what it was measured, and what failed."""
    columns, rows = trade_off(report)
    out.table(f"{report.base_model}: what each ratio costs", columns, rows)
    for line in remarks(report):
        out.line(line)
    if report.output is None:
        out.line("Nothing was written (--dry-run): these are estimates.")
    else:
        out.line(f"{report.seconds or 0:.0f} s on {report.threads}.")
        out.line(f"Wrote {report.output}, the table in tradeoff.md, to look at in tradeoff.html.")


def remarks(report: SweepReport) -> list[str]:
    """What the numbers were measured on, and why a ratio has no folder."""
    said = [] if report.samples is None else [f"Quality on {report.samples} pairs of {report.data}."]
    return said + [f"Ratio {point.ratio:g}: {point.failed}" for point in report.points if point.failed]


def markdown(report: SweepReport) -> str:
    """The table as a file beside the folders."""
    columns, rows = trade_off(report)
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"# {report.base_model}: what each ratio costs"
    made = f"Method {report.options.method}, comp {report.comp_version}."
    return "\n\n".join([title, table, *remarks(report), made]) + "\n"
