"""`--push-to-hub`: what a command wrote goes to the hub, once it is whole and its gates are met."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ..checkpoint.publish import Target, check_name, look, push
from ..errors import CompError, UsageError
from ..progress import Progress
from ..report.export import ExportReport
from ..report.prune import PruneReport
from ..search.processes import is_main_process

R = TypeVar("R", PruneReport, ExportReport)


def check_single(options: Any) -> None:
    """Raises UsageError where several models would go to one repository."""
    check_name(options.push_to_hub, options.private)
    if options.push_to_hub is not None:
        hint = f"Look at what each ratio costs, and upload the one that you choose: hf upload {options.push_to_hub} FOLDER ."
        raise UsageError("--push-to-hub: several ratios make several models, and a repository holds one.", hint=hint)


def and_push(work: Callable[[], R], options: Any, progress: Progress, *, overwrite: bool, dry_run: bool = False) -> R:
    """Do work that writes a folder, and upload the folder where `options` (of the command) name a repository. What speaks
    against the upload is said before the work begins, as far as it is known then; of several processes one uploads.

    Where the upload fails the folder stays, and the error, which has the report, says how to upload it later."""
    check_name(options.push_to_hub, options.private, dry_run)
    if options.push_to_hub is None:
        return work()
    target = Target(options.push_to_hub, options.private, overwrite)
    if is_main_process():
        look(target)
    report = work()
    if report.output is None:  # of a process that does not write
        return report
    try:
        address = push(report.output, target, f"{report.output.name}, written by comp", progress)
    except CompError as error:
        own = f"The folder {report.output} is complete. Later: {target.later(report.output)}"
        error.hint = f"{error.hint} {own}" if error.hint else own
        error.report = report
        raise
    progress.say(f"pushed: {address}")
    return replace(report, pushed=address)
