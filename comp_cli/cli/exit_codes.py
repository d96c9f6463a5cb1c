"""The exit codes of the command line, in one table. Exceptions carry theirs as `exit_code`."""

DONE, FAILED, USAGE, GATE, REFUSED, DEVICE = range(6)
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
