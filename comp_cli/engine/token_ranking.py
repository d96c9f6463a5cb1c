"""How a plan ranks tokens: by which rule, over how many query rows."""

from dataclasses import replace

from ..errors import UsageError
from ..families import Family, Stream
from ..plan import Plan
from ..runtime.modeling_comp import TOKEN_RULES


def fits(rule: str, stream: Stream) -> bool:
    """Whether the tokens of a stream can be ranked so: some rules ask [CLS]."""
    return not TOKEN_RULES[rule].class_token or stream.class_token is not None


def with_score_rule(plan: Plan, rule: str | None, family: Family) -> Plan:
    """Images are ranked by another rule, if any, and what goes by it is dropped; texts, which have no patches, by their own as
    ever. Raises UsageError where that is no rule for the model."""
    images = [stream for _, stream in family.streams.values() if stream.source == "image"]
    if rule is None or (rule == "attention" and not images):
        return plan
    if not images or not all(fits(rule, stream) for stream in images):
        lacks = "has no [CLS] to ask" if images else "has no images to rank so"
        raise UsageError(f"token scores by {rule}: a {family.name} model {lacks}.", hint="Use --method token.")
    others = [stream.name for stream in images if stream.rule != rule]
    return plan.with_streams({name: replace(plan.streams[name], score_rule=rule, fuse=False) for name in others})


def with_score_rows(plan: Plan, rows: int, family: Family) -> Plan:
    """Images are scored with a bounded number of query rows (0 for all); texts with all: short, and of varying length."""
    rows_of = {name: rows if stream.source == "image" else 0 for name, (_, stream) in family.streams.items()}
    return plan.with_streams({name: replace(ranked, score_rows=rows_of[name]) for name, ranked in plan.streams.items()})
