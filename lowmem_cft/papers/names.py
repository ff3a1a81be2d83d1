"""Names of stages, which every paper chooses its own from, and the set of development."""

DATA, BASE, TRAIN, EVALUATE = "data", "base", "train", "evaluate"
SEARCH, WITH_DEMONSTRATION = "icl-search", "evaluate-icl"
TRANSFER_BASE, TRANSFER_TRAINED = "transfer-base", "transfer-trained"

# by this set ablations and curves are scored, and a demonstration is chosen
DEV_SET, DEV_PAIRS = "STSBenchmark-dev", 1500


def evaluation_of(ablation: str) -> str:
    """The stage that scores an ablation, which is named as what trains it."""
    return f"evaluate-{ablation}"
