"""The table of `comp export`."""

from .export import ExportReport, ParityRow, jumped
from .numbers import Printer, mib, percent


def print_export(report: ExportReport, out: Printer) -> None:
    """The largest errors, and what was written."""
    worst: dict[str, ParityRow] = {}
    for row in report.parity:
        counted = {"image": row.images, "text": row.batch if row.text_tokens else 0}
        given = ", ".join(f"{number} {what}{'s' * (number > 1)}" for what, number in counted.items() if number)
        name = f"{row.output}{'' if row.judged is not None else ' (not judged)'}, {row.inputs} inputs, {given}"
        if name not in worst or row.max_error > worst[name].max_error:
            worst[name] = row
    rows = [[name, row.text_tokens, f"{row.max_error:.1e}", f"{row.mean_error:.1e}"] for name, row in worst.items()]
    out.table("Parity with PyTorch", ["", "text tokens", "max abs. error", "mean abs. error"], rows)
    out.line(f"Tolerance: {report.allowed.atol:.0e}. Prediction agreement on real pairs: {percent(report.agreement)}.")
    beyond, samples = jumped(report.parity, report.allowed.atol)
    if beyond:
        out.line(f"{beyond} of {samples} samples differ by more: rounding changes which tokens stay.")
    if report.quantization:
        kind = "int8 dynamic quantization" if report.quantization.weights == "int8" else "int4 weights"
        out.line(f"{kind}; {len(report.quantization.left_out)} layers stay in float.")
    if report.fused:
        out.line(f"Fused: {', '.join(f'{count} {name}' for name, count in report.fused.items())}.")
    size = f"{', '.join(report.graphs)}, {mib(report.size_bytes)}, opset {report.opset}"
    size += f", ONNX Runtime {report.min_onnxruntime} or newer"
    out.line(f"Wrote {report.output} ({size}). {report.seconds or 0:.0f} s on {report.threads}.")
