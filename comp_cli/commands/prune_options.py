"""What `comp prune` cannot be asked for: options that contradict one another, or change nothing. Nothing is read for it."""

from dataclasses import fields, replace

from ..checkpoint.hub import DEMOS
from ..engine.methods import DECODER, ENCODER, METHODS, find_method, methods_for
from ..errors import UsageError
from ..options import EFFORTS, SALIENCIES, TOKEN_METHOD, PruneOptions, Target, TargetOptions, TokenOptions, flag
from ..search.trainer import check_training

AMOUNTS = "--tokens, --tokens-share or --token-stages"
# What image tokens of a decoder are removed by, and what of it is for measuring only.
READ = ("model", "ratio", "method", "task", "text_tokens", "device", "data", "image_tokens", "max_memory")
MEASURING = ("effort", "eval_samples", "batch_size")
PUBLISHING = ("push_to_hub", "private")


def check(options: PruneOptions, max_drop: float | None, only: str | None) -> None:
    """Raises UsageError where options are no numbers, no names, or contradict one another. Before anything is downloaded. only:
    the option with which no model is made."""
    method = find_method(options.method)
    check_effort(options)
    if ENCODER not in method.drops_in:
        hint = f"Say how many image tokens stay: {AMOUNTS}."
        raise UsageError(f"--ratio: --method {options.method} removes image tokens of a decoder, by number.", hint=hint)
    if options.ratio is None:
        other = " For an image-text decoder: --tokens." * (DECODER in method.drops_in)
        hint = f"It is the FLOPs reduction: --ratio 0.5 removes half. Or name a target, such as --target-speedup 2.{other}"
        raise UsageError("--ratio is missing.", hint=hint)
    if not 0 < options.ratio < 1:
        raise UsageError(
            f"--ratio {options.ratio}: expected a number between 0 and 1.",
            hint="It is the FLOPs reduction: 0.5 removes half.",
        )
    check_training(options.training, options.data.data)
    if not options.cip and method.params not in ("cip", "obs"):
        raise UsageError(f"--no-cip changes nothing for --method {options.method}.", hint="It is for comp and comp-paper.")
    in_stages = method.phases is None and not method.compares_plans
    if not in_stages and not (options.explore and options.history):
        raise UsageError("--no-explore and --no-history are for --method comp-paper.")
    if options.stages is not None and not in_stages and not (method.phases and options.training.stage_share):
        raise UsageError(f"--stages: --method {options.method} has none.", hint="Use --method comp-paper.")
    if method.compares_plans and options.training.stage_share:
        hint = "Use --method comp-paper, or leave --stage-share out: the plan is trained when it is found."
        raise UsageError(f"--stage-share: --method {options.method} has no stages.", hint=hint)
    if options.looks is not None and not method.compares_plans:
        raise UsageError(f"--looks: --method {options.method} compares no plans.", hint="Use --method comp.")
    if not options.sequential and not options.recover:
        raise UsageError("--no-sequential changes nothing with --no-recover.")
    if not options.cit and not (options.training.stage_share and method.removes("tokens")):
        hint = "CIT weighs heads that fade; without --stage-share heads go at once. Give --steps and --stage-share 0.5."
        raise UsageError("--no-cit changes nothing here.", hint=hint)
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(f"--max-drop {max_drop:g}: expected points from 0 to 100.")
    if max_drop is not None and only:
        raise UsageError(f"--max-drop needs a model to judge, which {only} does not make.")
    if options.stage_samples and options.num_samples and options.stage_samples > options.num_samples:
        raise UsageError("--stage-samples are some of the --num-samples, not more.")


def check_ways(
    options: PruneOptions,
    targets: TargetOptions,
    *,
    several: bool,
    link: bool,
    plan: object | None,
    plan_only: bool,
    dry_run: bool,
) -> None:
    """Raises UsageError where the ways to a plan contradict one another. several: ratios; plan: a file."""
    given = [name for name, said in (("--dry-run", dry_run), ("--plan-only", plan_only), ("--plan", plan is not None)) if said]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: expected one of them.")
    if plan_only and several:
        raise UsageError("--plan-only makes one plan, of one --ratio.")
    if not dry_run and given and (link or options.image_tokens is not None or by_number(options, link)):
        hint = "--dry-run shows the stages; the command itself takes seconds."
        raise UsageError(f"{given[0]}: image tokens that go by their number need no search.", hint=hint)
    if plan_only and options.push_to_hub is not None:
        raise UsageError("--push-to-hub needs a model, which --plan-only does not make.")
    if plan is not None and targets.given:
        raise UsageError(f"{flag(next(iter(targets.given)))}: a --plan has a ratio.", hint="Leave one of them out.")
    if plan is not None and several:
        raise UsageError("--ratio: a --plan has one of its own.", hint="Leave --ratio out.")


def check_effort(options: PruneOptions) -> None:
    """Raises UsageError for an effort of another name."""
    if options.effort not in EFFORTS:
        raise UsageError(f"--effort {options.effort}: expected {', '.join(EFFORTS)}.")


def choose_target(
    targets: TargetOptions, options: PruneOptions, max_drop: float | None, only: str | None, link: bool
) -> Target | None:
    """What decides the ratio, where no ratio is given; None where one is, or where image tokens go by number. Raises UsageError
    where several things decide, and for a target that cannot be. only: see `check`."""
    given = targets.given
    names = [flag(name) for name in given]
    if given and by_number(options, link):
        hint = f"Leave it out, and say how many stay: {AMOUNTS}; or prune parameters too, by --method comp."
        raise UsageError(f"{names[0]} finds a ratio, and image tokens of a decoder go by number here.", hint=hint)
    if len(given) > 1 or (given and options.ratio is not None):
        both = " and ".join([*(["--ratio"] if options.ratio is not None else []), *names])
        hint = "Give one of them; --max-drop beside it is a gate. What else is reached, the report and comp bench say."
        raise UsageError(f"{both}: one decides how much is removed.", hint=hint)
    if not given and (max_drop is None or options.ratio is not None or by_number(options, link)):
        return None
    found = Target(*next(iter(given.items()), ("max_drop", max_drop or 0.0)))
    if found.kind == "target_speedup" and found.wanted <= 1:
        raise UsageError(f"{found.option}: expected a number above 1.", hint="2 is twice as fast as the dense model.")
    if found.kind == "target_latency_ms" and found.wanted <= 0:
        raise UsageError(f"{found.option}: expected milliseconds above 0.")
    check(replace(options, ratio=0.5), found.wanted if found.kind == "max_drop" else max_drop, only)  # any ratio
    if only == "--plan-only":
        hint = "--dry-run says the ratio that it takes; --ratio has a plan."
        raise UsageError(f"--plan-only: {flag(found.kind)} is measured on models.", hint=hint)
    if options.max_memory is not None:
        said = f"--max-memory: {flag(found.kind)} tries several ratios with one calibration in memory."
        raise UsageError(said, hint="Give a --ratio, or leave --max-memory out.")
    if options.training.stage_share:
        said = f"--stage-share: {flag(found.kind)} tries several ratios, and the stages of each would be trained."
        raise UsageError(said, hint="Leave --stage-share out, or give a --ratio.")
    if not found.is_least and options.training.tunes:
        said = "--max-drop alone chooses the ratio on pairs that fine-tuning would have seen."
        raise UsageError(said, hint="Find the ratio without --steps, then give it: --ratio R --steps N --max-drop X.")
    return found


def by_number(options: PruneOptions, link: bool) -> bool:
    """Whether image tokens of a decoder are asked for, by their number or by a method that knows nothing else."""
    known = METHODS.get(options.method)
    nothing_else = known is not None and known.drops_in == (DECODER,) and options.ratio is None
    return options.image_tokens is not None or link or nothing_else


def has_pairs(options: PruneOptions) -> bool:
    """Whether there is something to measure on: pairs of the user's, or the scenes that a built-in model was trained on."""
    return options.data.data is not None or options.model in DEMOS


def check_tokens(options: PruneOptions, max_drop: float | None, dry_run: bool, link: bool) -> None:
    """The same where image tokens of a decoder go, by number."""
    method, wanted = find_method(options.method), options.image_tokens or TokenOptions()
    check_effort(options)
    if DECODER not in method.drops_in or not method.only_tokens:
        given = [*wanted.amounts, *["--link"] * link, *["--compat"] * wanted.compat, *["--saliency"] * bool(wanted.saliency)]
        given += ["--refit"] * wanted.refit
        hint = f"They are {', '.join(methods_for(DECODER, only_tokens=True))}; --tokens N alone takes {TOKEN_METHOD}."
        raise UsageError(
            f"{given[0]} is for methods of image tokens in a decoder; --method {options.method} is none.", hint=hint
        )
    if options.ratio is not None:
        said = f"--ratio is not for --method {options.method} in a decoder, which removes image tokens by number."
        raise UsageError(said, hint=f"Leave it out, and say how many stay: {AMOUNTS}.")
    if len(wanted.amounts) != 1:
        found = f"found {' and '.join(wanted.amounts)}" if wanted.amounts else "found none"
        raise UsageError(f"--method {options.method}: expected one of {AMOUNTS}; {found}.")
    if wanted.tokens_share is not None and not 0 < wanted.tokens_share < 1:
        hint = "It is a share of an image's tokens: 0.11 keeps one of nine."
        raise UsageError(f"--tokens-share {wanted.tokens_share}: expected a number between 0 and 1.", hint=hint)
    if wanted.saliency not in (None, *SALIENCIES):
        raise UsageError(f"--saliency {wanted.saliency}: expected {' or '.join(SALIENCIES)}.")
    for name in ("saliency", "compat"):
        if getattr(wanted, name) and options.method != "vitcop":
            raise UsageError(f"{flag(name)} is for --method vitcop.")
    check_training(options.training, options.data.data)
    if options.training.stage_share:
        said = "--stage-share: image tokens leave by their number, in no stages of a search."
        raise UsageError(said, hint="Leave it out: --steps tunes the model that they leave.")
    if (changing := changes_weights(options)) and link:
        said = f"{changing[0]} changes weights, and --link leaves them those of the model."
        raise UsageError(said, hint="Leave one of them out.")
    if changing and not has_pairs(options):
        raise UsageError(f"{changing[0]} needs pairs to {changing[1]} on.", hint="Name them with --data.")
    if idle := unused(options):
        why = "with weights that are fitted or trained" if changing else "which keeps the weights of the model"
        said = f"{', '.join(idle)}: nothing changes for --method {options.method}, {why}."
        raise UsageError(said, hint="Leave it out" + ("." if changing else "; --data measures the quality on pairs of yours."))
    if max_drop is not None and not has_pairs(options):
        raise UsageError("--max-drop needs pairs to measure on.", hint="Name them with --data.")
    if max_drop is not None and (dry_run or not 0 <= max_drop <= 100):
        said = "needs a model to judge, which --dry-run does not make" if dry_run else "expected points from 0 to 100"
        raise UsageError(f"--max-drop {max_drop:g}: {said}.")


def changes_weights(options: PruneOptions) -> tuple[str, str] | None:
    """The first option that changes weights where image tokens go by their number, and what it does to them."""
    found = [("--refit", "fit")] * options.refits
    found += [("--steps" if options.training.steps else "--epochs", "train")] * options.training.tunes
    return found[0] if found else None


def unused(options: PruneOptions) -> list[str]:
    """Options that were given, and that nothing of a decoder's image tokens depends on."""
    read = (*READ, *PUBLISHING, *(MEASURING if has_pairs(options) else ()))
    read = (*read, *["num_samples"] * options.refits, *["training"] * options.training.tunes)
    read = (*read, *["seed"] * (options.refits or options.training.tunes or options.method == "random-token"))
    given = [one.name for one in fields(options) if one.name not in read and getattr(options, one.name) != one.default]
    return [one for name in given for one in (_of_training(options) if name == "training" else [flag(name)])]


def _of_training(options: PruneOptions) -> list[str]:
    tuned = options.training
    changed = (one.name for one in fields(tuned) if getattr(tuned, one.name) != one.default)
    return [flag(tuned.NAMES.get(name, name)) for name in changed]
