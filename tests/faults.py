"""A server that runs comp's commands in forks of itself, each of which fails before a chosen file operation.

python faults.py WORDS...: runs a command line here, which warms everything up: then a command takes a second. Then it reads
requests, one JSON object a line, and answers in kind. A request: {"words": command line, "root": the folder whose operations
count, "point": number of the operation or null, "how": "kill", "term" or "full"}. The answer: {"code": exit code or minus the
signal, "seen": the operations, "out", "err"}.
"""

import errno
import json
import os
import signal
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
FILLS = ("open", "os.mkdir", "native.write")  # what a full disk can refuse


class Faults:
    """An audit hook: counts the operations that change files below `root`, and fails before one of them."""

    def __init__(self, root: str, point: int | None, how: str, log: int):
        self.root, self.point, self.how, self.log = root, point, how, log
        self.number = 0

    def __call__(self, event: str, given: tuple) -> None:
        if event == "open":
            path, _, flags = given
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event not in CHANGES and event != "native.write":
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], (str, bytes, os.PathLike)) else ""
        within_tree = event in ("os.remove", "os.rmdir") and given[1] not in (None, -1)  # of shutil.rmtree
        if not within_tree and not os.path.abspath(path).startswith(self.root + os.sep):
            return
        if self.how == "full" and event not in FILLS:
            return
        number, self.number = self.number, self.number + 1
        os.write(self.log, f"{event} {os.path.basename(path)}\n".encode())
        if number == self.point:
            self.fail()

    def fail(self) -> None:
        if self.how == "full":
            self.point += 1  # a disk stays full for what is tried next
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGTERM)


def show_native_writes() -> None:
    """What no Python code opens: safetensors'."""
    import safetensors.torch

    save_file = safetensors.torch.save_file

    def audited(tensors, path, **options):
        sys.audit("native.write", os.fspath(path))
        save_file(tensors, path, **options)

    safetensors.torch.save_file = audited


def remember_graphs() -> None:
    """torch.onnx.export takes seconds: the graphs of a model are made once, and are written again from memory."""
    from comp_cli.commands import export

    made, write_graphs = {}, export.write_graphs
    cache = Path(tempfile.mkdtemp())

    def remembered(model, task, family, folder, **layout):
        place = cache / json.dumps(layout, sort_keys=True).replace("/", "_")
        if not place.exists():
            place.mkdir()
            (place / "names").write_text(json.dumps(write_graphs(model, task, family, place, **layout)))
        made[str(place)] = json.loads((place / "names").read_text())
        for path in place.iterdir():
            if path.name != "names":
                (folder / path.name).write_bytes(path.read_bytes())
        return made[str(place)]

    export.write_graphs = remembered


def run(request: dict) -> dict:
    log, said, errors = (tempfile.TemporaryFile() for _ in range(3))
    pid = os.fork()
    if pid == 0:
        child(request, log.fileno(), said.fileno(), errors.fileno())
    _, status = os.waitpid(pid, 0)
    texts = []
    for file in (log, said, errors):
        file.seek(0)
        texts.append(file.read().decode())
    return {"code": os.waitstatus_to_exitcode(status), "seen": texts[0].splitlines(), "out": texts[1], "err": texts[2]}


def child(request: dict, log: int, said: int, errors: int) -> None:
    from comp_cli import signals
    from comp_cli.cli import streams
    from comp_cli.cli.app import run_command

    os.dup2(said, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["comp", *request["words"]]
    os.chdir(request["root"])
    signals.install()
    streams.settle()
    sys.addaudithook(Faults(request["root"], request["point"], request["how"], log))
    code = 1
    try:
        run_command()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import torch

    from comp_cli.cli.app import app

    torch.set_num_threads(1)
    show_native_writes()
    remember_graphs()
    with redirect_stdout(sys.stderr):
        app(sys.argv[1:], standalone_mode=False)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
