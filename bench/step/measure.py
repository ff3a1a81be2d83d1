"""The measured processes: each row's step, and what is measured around it.

A row is a name: `plain`, `plain_chunks`, `st_N`, `st_tokens_N`, `ours_*` or `loss`. `ROW-FACTOR` is
the row with one of the factors turned off.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.device import release, reset_peak, timed
from bench.harness import in_turn, machine, median, say
from bench.step.ours import ours_side, switched_off
from bench.step.task import Prepared, Side, Skipped, Task, make_task
from bench.step.theirs import load_st, st_criterion, st_side
from lowmem_cft.machine import peak_bytes
from lowmem_cft.model import backbone
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft_kernels import Candidates, LossOptions, info_nce
from lowmem_cft_kernels.reference import reference_loss

_WARM_UP_ROWS = 16
_ADAPTER_STD = 0.02
_LOSS_REPEATS = 7


# -- the adapter, the same on both sides --------------------------------------------------------


def adapter(model: nn.Module) -> list[nn.Parameter]:
    """All that is trained, in an order that does not depend on who attached it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named, "nothing is trained"
    assert all("lora_" in name for name in named), "something else is trained"
    return [named[name] for name in sorted(named, key=lambda name: name[name.index("layers.") :])]


def fill_adapter(model: nn.Module) -> None:
    """The same numbers on every side; lora_B not zero, which would leave lora_A no gradient."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * _ADAPTER_STD)


def gradient(model: nn.Module) -> npt.NDArray[np.float32]:
    """The adapter's gradient as one vector; the model forgets it."""
    parts = []
    for parameter in adapter(model):
        assert parameter.grad is not None, "a step left an adapter weight without gradient"
        parts.append(parameter.grad.float().flatten().cpu().numpy())
        parameter.grad = None
    return np.concatenate(parts)


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Weights, buffers, and the scales of 4-bit weights."""
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def watched_step(side: Side, step: Prepared) -> dict[str, int]:
    """One step under a counter of live bytes, and of the tokens that get a graph."""
    counts = {"texts": 0, "padded_tokens": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            counts["texts"] += args[0].shape[0]
            counts["padded_tokens"] += args[0].numel()

    # Not of the whole model: theirs calls its `forward`, past all hooks.
    hook = side.transformer.get_input_embeddings().register_forward_pre_hook(count)
    with LiveBytes(known=[*model_tensors(side.model), *step.held]) as live:
        step.run()
    hook.remove()
    return {"live_bytes": live.peak, **counts}


def trim() -> None:
    """Give back what the allocators hold of loading, so that the base is what is in use."""
    release()
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return


def measure_side(task: Task, side: Side, gradient_file: Path | None) -> dict[str, Any]:
    """Warm up, time the steps, and watch one more."""
    device, steps = task.device, task.options.steps
    fill_adapter(side.model)
    trim()
    reset_peak(device)
    base = peak_bytes(device)  # a peak just reset is what is held now
    # A whole step: a heap is grown and its pages are zeroed once in a run.
    side.prepare(task.rows(steps)[: _WARM_UP_ROWS if task.options.quick else None]).run()
    gradient(side.model)
    seconds, losses = [], []
    for index in range(steps):
        taken, loss = timed(side.prepare(task.rows(index)).run, device)
        seconds.append(taken)
        losses.append(float(loss))
        grad = gradient(side.model)
        if index == 0 and gradient_file is not None:
            np.save(gradient_file, grad)
    rss = peak_bytes(device) - base
    watched = watched_step(side, side.prepare(task.rows(0)))
    return {
        "seconds": seconds,
        "loss": losses[0],
        "rss_bytes": rss,
        "base_bytes": base,
        **watched,
        "how": side.how,
        "plan": side.plan.to_json() if side.plan else None,
    }


def measure_row(task: Task, name: str) -> dict[str, Any]:
    """One row, or why it was skipped."""
    row, _, off = name.partition("-")
    file = task.options.gradients and task.options.gradients / f"{name}.npy"
    try:
        if row == "loss":
            return {"row": name, **measure_losses(task)}
        with tempfile.TemporaryDirectory() as folder, switched_off(off):
            if row.startswith("st_"):
                side = st_side(task, row, off, Path(folder) / "base")
            else:
                side = ours_side(task, row, off)
            return {"row": name, **measure_side(task, side, file)}
    except Skipped as error:
        return {"row": name, "skipped": str(error)}


def measure_losses(task: Task) -> dict[str, Any]:
    """Value and gradient of the loss alone, each side on the same embeddings, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_st(task, Path(folder) / "base")
    criterion = st_criterion(model, task.recipe, "st_32")
    rows, dim = task.recipe.train.logical_batch, model[0].get_embedding_dimension()
    draw = torch.Generator().manual_seed(0)
    emb_SD = nn.functional.normalize(torch.randn(3 * rows, dim, generator=draw), dim=1)
    emb_SD = emb_SD.to(task.device)
    sides = loss_sides(emb_SD, rows, criterion, task.recipe.loss.temperature)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses, peaks = {}, {}
    for index in range(_LOSS_REPEATS + 1):
        for side in in_turn(list(sides), index):
            taken, loss = timed(sides[side], task.device)
            losses[side] = float(loss)
            if index:  # the first round warms up
                seconds[side].append(taken)
    for side, run in sides.items():
        with LiveBytes(known=[emb_SD]) as live:
            run()
        peaks[side] = live.peak
    return {
        "ms": {side: round(median(times) * 1e3, 3) for side, times in seconds.items()},
        "losses": losses,
        "live_bytes": peaks,
    }


def loss_sides(
    emb_SD: Tensor, rows: int, criterion: Any, temperature: float
) -> dict[str, Callable[[], Tensor]]:
    """The loss and its gradient by us, by them and by its formula; queries are the first rows."""
    candidates = Candidates(target=torch.arange(rows, device=emb_SD.device))

    def ours() -> Tensor:
        d_emb_SD = torch.empty_like(emb_SD)
        out = d_emb_SD[:rows], d_emb_SD[rows:]
        return info_nce(
            emb_SD[:rows], emb_SD[rows:], candidates, temperature=temperature, out=out
        ).loss

    def st() -> Tensor:
        size = criterion.mini_batch_size
        columns = [emb_SD[i * rows : (i + 1) * rows] for i in range(len(emb_SD) // rows)]
        reps = [[part.detach().requires_grad_() for part in torch.split(c, size)] for c in columns]
        loss: Tensor = criterion.calculate_loss(reps, None, with_backward=True)
        return loss

    def formula() -> Tensor:
        leaf_SD = emb_SD.detach().requires_grad_()
        loss, _ = reference_loss(
            leaf_SD[:rows], leaf_SD[rows:], candidates, LossOptions(temperature=temperature)
        )
        torch.autograd.backward(loss)
        return loss.detach()

    return {"ours": ours, "st": st, "formula": formula}


def shown(row: dict[str, Any]) -> str:
    """One row for people."""
    if "skipped" in row:
        return f"{row['row']}: skipped: {row['skipped']}"
    if "ms" in row:
        return f"{row['row']}: {row['ms']} ms"
    return (
        f"{row['row']}: {median(row['seconds']):.3f} s, {row['live_bytes'] / 2**20:.0f} MiB live, "
        f"{row['rss_bytes'] / 2**20:.0f} MiB resident, loss {row['loss']:.6f}; {row['how']}"
    )


def measure_rows(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of this process, with what is the same for all of them."""
    backbone.quiet_libraries()
    task = make_task(options)
    results = []
    for name in options.row:
        results.append(measure_row(task, name))
        say(shown(results[-1]))
    recipe = task.recipe
    return {
        "results": results,
        "machine": machine(task.device),
        "settings": {
            "model": recipe.model.id,
            "keep_layers": recipe.model.keep_layers,
            "dtype": recipe.model.dtype,
            "lora": recipe.lora.model_dump(include={"rank", "alpha", "dropout", "targets"}),
            "max_tokens": recipe.text.max_tokens,
            "pooling": recipe.embedding.pooling,
            "temperature": recipe.loss.temperature,
            "mask_duplicates": recipe.loss.mask_duplicates,
            "data": Path(recipe.data.sources[0].path).name,
            "steps": options.steps,
        },
    }
