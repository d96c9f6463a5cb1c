"""The gates of `comp bench`: what a report must show, or the command raises GateError.

A gate looks at every row of the compact model that was measured and takes the worst; --backend and --batch choose the rows.
"""

from collections.abc import Sequence

from ..options import Gates
from ..report.bench import GateOutcome, Latency, PeakMemory, Speedup

MIB = 2**20


def outcomes(
    asked: Gates, speedups: Sequence[Speedup], timings: Sequence[Latency], peaks: Sequence[PeakMemory]
) -> tuple[GateOutcome, ...]:
    """One outcome for each gate that was asked for: its limit, the worst row, and whether that passes."""
    measured = {
        "min_speedup": [(row.speedup.value, row.backend, row.batch) for row in speedups],
        "max_latency_ms": [(row.median, row.backend, row.batch) for row in timings if row.side == "compact"],
        "max_memory_mb": [(row.bytes / MIB, row.backend, row.batch) for row in peaks if row.side == "compact"],
    }
    found = []
    for gate, rows in measured.items():
        limit = getattr(asked, gate)
        if limit is not None:
            least = gate.startswith("min")
            value, backend, batch = (min if least else max)(rows, key=lambda row: row[0])
            passed = value >= limit if least else value <= limit
            found.append(GateOutcome(gate, limit, passed, value, backend, batch))
    return tuple(found)
