"""This trainer beside sentence-transformers' cached contrastive loss, on the same work.

    python -m bench.train            # about 8 minutes on two CPU cores
    python -m bench.train --quick    # does it run; its figures mean nothing

Both sides train the same 4-bit base and LoRA from the same start on the same batches in the same
order, with the same loss, optimizer, schedule and arithmetic. Theirs goes through
SentenceTransformerTrainer and CachedMultipleNegativesRankingLoss. Each side of each run has a
process of its own; the sides take turns at going first. Standard output is one line of JSON:

ours, st         triplets_per_s: trained rows by the summed time of the steps. Loading and reading
                 are not in it, nor is tokenising: ours is done once before training, theirs
                 between the steps.
                 peak_bytes: the process's peak until training ended, loading included (resident
                 memory; allocated device memory on CUDA). base_bytes: what was held when training
                 began (libraries, model, allocator slack); training_bytes: how far its peak rose
                 above that.
                 sts_dev: Spearman after training, by our evaluator on either side's weights;
                 sts_dev_before: the same with the adapter set back to where it started.
                 first_loss, last_loss: of the first and last step.
speedup          ours by theirs, triplets per second; above 1 is faster
memory_ratio     ours by theirs, peak_bytes; below 1 is less. training_memory_ratio: the same of
                 training_bytes.
comparable       the first losses agree within 2 %, both adapters started the same. If false, the
                 sides did not do the same work, standard error says so and the exit code is 1.

Duplicates of a positive are not masked here, since their loss does not mask them. Theirs takes
`--mini-batch` texts at a time, by default as many as is its own default: on a CPU its token budget
(`--mini-batch-tokens`) and larger mini-batches were slower and took more memory. Ours takes the
chunks it finds to fit, or `--token-budget`. On a GPU memory means little unless those two are
chosen to match. On a CPU the machine must be idle: a second busy process slows two threads that
wait for each other by far more than its share.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.harness import print_line, say
from bench.train.compare import compare, parse


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.side is not None:
        from bench.train.sides import run_side

        with tempfile.TemporaryDirectory() as folder:
            result = run_side(options, Path(folder))
        options.result.write_text(json.dumps(asdict(result)), encoding="utf-8")
        return 0
    try:
        values, wrong = compare(options, argv)
    except RuntimeError as error:  # its own process has said why
        say(str(error))
        return 1
    say(f"first loss: ours {values['ours']['first_loss']}, st {values['st']['first_loss']}")
    for text in wrong:
        say(f"!!! NOT THE SAME WORK, DO NOT USE THE FIGURES: the sides differ in {text}")
    print_line(values)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
