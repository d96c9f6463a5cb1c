"""The exit codes of the command line, in one table. Exceptions carry theirs as `exit_code`."""

from ..errors import CompError, DeviceError, GateError, RefusedError, UsageError

DONE, FAILED, USAGE = 0, CompError.exit_code, UsageError.exit_code
GATE, REFUSED, DEVICE = GateError.exit_code, RefusedError.exit_code, DeviceError.exit_code
MEANING = {
    DONE: "done",
    FAILED: "failed",
    USAGE: "wrong usage",
    GATE: "a gate was not met (parity, accuracy, speed, memory)",
    REFUSED: "input refused (unsafe, corrupt, unsupported)",
    DEVICE: "device or provider missing",
    129: "SIGHUP",
    130: "Ctrl-C",
    143: "SIGTERM",
}
