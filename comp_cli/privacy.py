"""No telemetry: libraries report to their makers unless the environment, when they are imported, tells them not to.

Whoever sets one of these variables decides; processes that comp starts inherit them.
"""

import os
import sys

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: an identity and queued events below ~/.cache/Microsoft, sent to its maker
    "HF_HUB_DISABLE_TELEMETRY": "1",  # the hub client: who calls it, and a request for the list of known agents
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets: counts each load, that of a file of one's own as well
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers: asks the hub for a conversion of pickled weights that it loads
    "DO_NOT_TRACK": "1",  # the convention that other libraries ask for
}


def be_silent() -> None:
    """Set what is not set. An ONNX Runtime that was imported before is asked to stop what it can still stop."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    stop = getattr(sys.modules.get("onnxruntime"), "disable_telemetry_events", None)
    if stop and os.environ["ORT_DISABLE_TELEMETRY"] == "1":
        stop()
