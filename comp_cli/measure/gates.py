"""The gates of `comp bench`: what a report must show, or the command ends with exit code 3.

A gate looks at every row of the compact model that was measured and takes the worst; --backend and --batch choose the rows.
"""

from dataclasses import dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Gates:
    """None asks for nothing.

    min_speedup: median latency of the stock model over that of the compact one, on the same backend at the same batch.
    max_latency_ms: median latency of the compact model, ms for a whole batch.
    max_memory_mb: peak memory of the compact model at the largest batch, MiB.
    """

    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None


def outcomes(asked: Gates, document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each gate that was asked for: its limit, the worst row, and whether that passes."""
    speedups = [row | {"found": row["speedup"]["value"]} for row in document["speedups"]]
    latencies = [row | {"found": row["median"]} for row in document["timings"] if row["side"] == "compact"]
    peaks = [row | {"found": row["bytes"] / MIB} for row in document["peak_memory_bytes"] if row["side"] == "compact"]
    rows = []
    for gate, seen in (("min_speedup", speedups), ("max_latency_ms", latencies), ("max_memory_mb", peaks)):
        limit = getattr(asked, gate)
        if limit is not None:
            least = gate.startswith("min")
            worst = (min if least else max)(seen, key=lambda row: row["found"])
            passed = worst["found"] >= limit if least else worst["found"] <= limit
            rows.append({"gate": gate, "limit": limit, "passed": passed} | {k: worst[k] for k in ("found", "backend", "batch")})
    return rows


def sentence(outcome: dict[str, Any]) -> str:
    """The outcome for people."""
    what, unit = {"min_speedup": ("speed-up", "x"), "max_latency_ms": ("latency", " ms"), "max_memory_mb": ("memory", " MiB")}[
        outcome["gate"]
    ]
    name = "--" + outcome["gate"].replace("_", "-")
    verdict = "passed" if outcome["passed"] else "not met"
    where = f"{outcome['backend']}, batch {outcome['batch']}"
    return f"{name} {outcome['limit']:g} {verdict}: the worst {what} is {outcome['found']:.2f}{unit} ({where})."
