"""The recipe's optimizer and learning-rate schedule: torch's, bitsandbytes' and transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowmem_cft.recipe.schema import TrainSection


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    section: TrainSection,
    device: torch.device,
    *,
    undecayed: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer the recipe names.

    Args:
        undecayed: more parameters, without weight decay.

    Raises:
        ValueError: a paged optimizer without CUDA, whose unified memory it pages with.
    """
    common: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": section.betas,
        "eps": section.epsilon,
        "weight_decay": section.weight_decay,
    }
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if undecayed:
        groups.append({"params": list(undecayed), "weight_decay": 0.0})
    if section.optimizer == "adamw":
        # fused: after the first step an update allocates nothing, so it cannot run out of memory
        return torch.optim.AdamW(groups, fused=True, **common)
    if section.optimizer.startswith("paged") and device.type != "cuda":
        raise ValueError(
            f"train.optimizer: got {section.optimizer}, which needs a CUDA device; "
            "use adamw or adamw_8bit here"
        )
    from bitsandbytes import optim

    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    optimizer: torch.optim.Optimizer = classes[section.optimizer](groups, **common)
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, section: TrainSection, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then the recipe's schedule to zero over the rest of the steps."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if section.schedule == "constant" else section.schedule
    scheduler: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        name, optimizer, num_warmup_steps=section.warmup_steps, num_training_steps=num_steps
    )
    return scheduler


def set_rates(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    base_rates: Sequence[float],
) -> None:
    """Give the optimizer the schedule's rates at the step that the scheduler has reached.

    Args:
        base_rates: each group's rate where the schedule's factor is 1; they replace the
            scheduler's.
    """
    scheduler.base_lrs = list(base_rates)
    scheduler._last_lr = [
        base_rate * factor(scheduler.last_epoch)
        for base_rate, factor in zip(base_rates, scheduler.lr_lambdas, strict=True)
    ]
    for group, base_rate, rate in zip(
        optimizer.param_groups, base_rates, scheduler._last_lr, strict=True
    ):
        group["initial_lr"], group["lr"] = base_rate, rate
