"""Our losses for sentence-transformers beside the two that they stand in for: time and memory.

    python -m bench.st_losses            # minutes
    python -m bench.st_losses --quick    # does it run; its figures mean nothing
    python -m bench.st_losses --rows 4096 --layers 1 --softmaxes gte

All sides embed the same rows of random token ids with one small Llama in float32, and go through
their `forward` and back to its weights; sides take turns in going first, in every round. Theirs are
MultipleNegativesRankingLoss and CachedMultipleNegativesRankingLoss with the same meaning and
mini-batches. How much of a step the loss is depends on rows, layers and tokens: few tokens and
layers show the loss, many the encoder, which both sides share. On a CPU the machine must be idle;
freed memory is kept, for all sides. Ours looks for equal texts, of which there are none, and takes a
workspace of 60 MiB where it is of use, or --workspace-mib; theirs holds logits of a mini-batch, or all.
Standard output is one line of JSON:

speedup, speedup_cached    their median time by ours, above 1 we are faster
memory_ratio, memory_ratio_cached    peak_bytes, ours by theirs, below 1 is less
rows                       one for each side. ms: median of one forward and backward, ms_rounds: all
                           of them. peak_bytes: beyond the weights, their gradients and the inputs,
                           in a call that is not timed; allocated on CUDA, tensors that operations
                           return on a CPU
difference                 of loss and gradient between ours and theirs, relative to the greatest
                           entry. Above 1e-3 standard error says so and the exit code is 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.device import Peak, elapsed_ms
from bench.harness import digits, in_turn, machine, median, print_line, say, versions
from lowmem_cft.machine import keep_freed_memory

MAX_DIFFERENCE = 1e-3
DIRECTIONS = {
    "one_way": ("query_to_doc",),
    "symmetric": ("query_to_doc", "doc_to_query"),
    "gte": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
}
"""Theirs; `symmetric` has a softmax for each, the others one for all."""

Outcome = tuple[Tensor, Tensor]
"""The loss, and the gradient of all weights as one vector."""

_VOCABULARY = 8192
_QUICK = {"rows": 64, "tokens": 4, "layers": 1, "width": 64, "rounds": 2, "mini_batch": 16}


class Embedder(nn.Module):
    """A Llama and the mean of its hidden states, called as a SentenceTransformer is."""

    def __init__(self, layers: int, width: int) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        torch.manual_seed(0)
        heads = width // 32
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
            )
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden_BTH = self.llama(**features, use_cache=False).last_hidden_state
        return {"sentence_embedding": hidden_BTH.mean(dim=1)}


def make_columns(options: argparse.Namespace, device: torch.device) -> list[dict[str, Tensor]]:
    """Random texts, no two equal; a row's share half of their tokens, so that positives are closer."""
    draw = torch.Generator().manual_seed(0)

    def ids() -> Tensor:
        return torch.randint(_VOCABULARY, (options.rows, options.tokens), generator=draw)

    shared, columns = ids(), []
    for _ in range(2 + options.negatives):
        column = ids()
        column[:, : options.tokens // 2] = shared[:, : options.tokens // 2]
        columns.append({"input_ids": column, "attention_mask": torch.ones_like(column)})
    return [{name: x.to(device) for name, x in column.items()} for column in columns]


def make_sides(options: argparse.Namespace, model: nn.Module) -> dict[str, nn.Module]:
    """Ours and theirs, without and with cached gradients."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    from lowmem_cft.integrations.sentence_transformers import CachedInfoNCELoss, InfoNCELoss

    mode = options.softmaxes
    ours: dict[str, Any] = {
        "temperature": options.temperature,
        "softmaxes": mode,
        "workspace_bytes": options.workspace_mib and options.workspace_mib * 2**20,
    }
    theirs: dict[str, Any] = {
        "scale": 1 / options.temperature,
        "directions": DIRECTIONS[mode],
        "partition_mode": "per_direction" if mode == "symmetric" else "joint",
    }
    size = {"mini_batch_size": options.mini_batch}
    return {
        "ours": InfoNCELoss(model, **ours),
        "st": MultipleNegativesRankingLoss(model, **theirs),
        "ours_cached": CachedInfoNCELoss(model, **ours, **size),
        "st_cached": CachedMultipleNegativesRankingLoss(model, **theirs, **size),
    }


def step(loss: nn.Module, columns: Sequence[dict[str, Tensor]]) -> Tensor:
    """One forward and backward, from no gradients; modules get features of their own."""
    loss.zero_grad()
    value: Tensor = loss([dict(column) for column in columns], None)
    torch.autograd.backward(value)
    return value.detach()


def peak_bytes(work: Callable[[], object], model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Peak of one call beyond the weights, their gradients and the inputs."""
    weights = list(model.parameters())
    model.zero_grad()
    with Peak(weights[0].device, [*weights, *model.buffers(), *inputs]) as peak:
        work()
    return max(0, peak.taken - sum(weight.nbytes for weight in weights))


def difference(ours: Outcome, theirs: Outcome) -> float:
    """Greatest of ours from theirs, in loss and gradient."""
    return max(
        float((x - y).abs().max() / y.abs().max()) for x, y in zip(ours, theirs, strict=True)
    )


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All sides; the values of the JSON line."""
    model = nn.Sequential(Embedder(options.layers, options.width)).to(device)
    columns = make_columns(options, device)
    inputs = [x for column in columns for x in column.values()]
    works = {
        name: partial(step, loss, columns) for name, loss in make_sides(options, model).items()
    }
    results, peaks = dict[str, Outcome](), {}
    for name, work in works.items():  # the first call warms up
        value = work()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[name] = value, gradient
        peaks[name] = peak_bytes(work, model, inputs)
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(options.rounds):
        for name in in_turn(list(works), index):
            times[name].append(elapsed_ms(works[name], device))
            say(f"round {index + 1}: {name}: {times[name][-1]:.1f} ms")
    ms = {name: median(values) for name, values in times.items()}
    apart = [difference(results[f"ours{kind}"], results[f"st{kind}"]) for kind in ("", "_cached")]
    return {
        "benchmark": "st_losses",
        "speedup": digits(ms["st"] / ms["ours"]),
        "speedup_cached": digits(ms["st_cached"] / ms["ours_cached"]),
        "memory_ratio": digits(peaks["ours"] / peaks["st"]),
        "memory_ratio_cached": digits(peaks["ours_cached"] / peaks["st_cached"]),
        "difference": digits(max(apart)),
        "rows": [
            {
                "side": name,
                "ms": digits(ms[name]),
                "ms_rounds": [digits(value) for value in times[name]],
                "peak_bytes": peaks[name],
                "loss": float(results[name][0]),
            }
            for name in works
        ],
        "settings": {name: value for name, value in vars(options).items() if name != "quick"},
        "machine": machine(device),
        "versions": versions(("lowmem-cft", "torch", "transformers", "sentence-transformers")),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1024, help="of the batch (default: %(default)s)")
    add("--negatives", type=int, default=1, help="of each row (default: %(default)s)")
    add("--tokens", type=int, default=8, help="of each text (default: %(default)s)")
    add("--layers", type=int, default=2, help="of the model (default: %(default)s)")
    add("--width", type=int, default=384, help="of the model (default: %(default)s)")
    add("--mini-batch", type=int, default=32, help="texts; 32 is their default")
    add("--softmaxes", choices=sorted(DIRECTIONS), default="one_way")
    add("--temperature", type=float, default=0.05)
    add("--workspace-mib", type=int, help="of our loss (default: its own)")
    add("--rounds", type=int, default=5)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="tiny: to see that it runs")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args(argv)
    least = {"rows": 2, "negatives": 0, "tokens": 4, "layers": 1, "mini_batch": 1, "rounds": 1}
    for name, value in least.items():
        if getattr(options, name) < value:
            given = getattr(options, name)
            parser.error(f"--{name.replace('_', '-')}: got {given}, wanted at least {value}")
    if options.width < 32 or options.width % 32:
        parser.error(f"--width: got {options.width}, wanted a multiple of 32")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    keep_freed_memory()
    values = measure(options, torch.device(options.device))
    print_line(values)
    if not values["difference"] <= MAX_DIFFERENCE:
        say(f"!!! NOT THE SAME WORK: {values['difference']} apart")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
