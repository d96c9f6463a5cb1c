"""What scripts that train in parts have in common: the rate, a step, and the log."""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def in_parts(
    args: argparse.Namespace,
    parts: Sequence[Any],
    model: nn.Module,
    processor: Any,
    train_part: Callable[..., None],
    accuracy: Callable[..., dict[str, float]],
) -> None:
    """Train part after part, those behind --go-on-after, and judge in the end. Every line goes to the log, with the minutes."""
    first = 1 + [part.name for part in parts].index(args.go_on_after) if args.go_on_after else 0
    start = time.time()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("a" if first else "w") as log:

        def tell(line: dict) -> None:
            line["minutes"] = round((time.time() - start) / 60, 2)
            for where in (sys.stdout, log):
                print(json.dumps(line), file=where, flush=True)

        for number, part in enumerate(parts[first:], first):
            train_part(part, model.train(), processor, random.Random(1000 * args.seed + number), args, tell)
        tell({"test": accuracy(model, processor, "test", 4000)})


def cosine(lr: float, step: int, horizon: int) -> float:
    """A rate that falls from `lr` and would reach zero after `horizon` steps, with a warm-up."""
    return lr * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / horizon))


def take_step(loss: torch.Tensor, weights: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, rate: float) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()


def save(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
