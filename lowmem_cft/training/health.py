"""Whether steps still teach: what a batch's figures say is wrong, and what to do about it."""

from __future__ import annotations

from lowmem_cft.progress import Says
from lowmem_cft.recipe.schema import LossSection
from lowmem_cft.training.records import Progress, StepLine

MOST_HIDDEN = 0.95
"""Share of the negatives that masks hide from which on a step teaches next to nothing."""

PATIENCE = 3
"""Steps in a row without a negative after which a run stops."""


class NegativesWatch:
    """Warns where masks hide nearly all negatives, and stops a run that has none left.

    A step without negatives has loss 0 and accuracy 1, and its gradient is 0: it looks perfect and
    trains nothing.

    Args:
        loss: the recipe's.
        progress: the run's; steps in a row without negatives are counted there.
    """

    def __init__(self, loss: LossSection, observer: Says, progress: Progress) -> None:
        self.loss, self.observer, self.progress = loss, observer, progress
        self._warned = False

    def reason_to_stop(self, line: StepLine, visible_share: float) -> str | None:
        """Look at a step; gives a message where the run has to stop.

        Args:
            visible_share: share of the other documents that an anchor would see without masks, 0
                to 1; below 1 where hard negatives are seen by their own row only.
        """
        if line.masked_share is None:
            return None
        hidden = 1 - (1 - line.masked_share) / visible_share
        if hidden >= MOST_HIDDEN and not self._warned:
            self._warned = True
            self.observer.say(
                f"WARNING: in step {line.step} masks hide {hidden:.1%} of the negatives, so that it "
                f"teaches next to nothing, whatever loss and accuracy say; {self._way_out()}"
            )
        none_left = line.mean_negative is None
        self.progress.steps_without_negatives = (
            self.progress.steps_without_negatives + 1 if none_left else 0
        )
        if self.loss.on_no_negatives == "warn" or self.progress.steps_without_negatives < PATIENCE:
            return None
        return (
            f"no negative was left in {PATIENCE} steps in a row, up to step {line.step}: masks hide "
            f"them all, and nothing is learned; {self._way_out()}; or go on all the same with "
            "`resume` and loss.on_no_negatives=warn"
        )

    def _way_out(self) -> str:
        margin = self.loss.false_negative_margin
        if margin is not None:
            return (
                f"lower loss.false_negative_margin (it is {margin:g}; below 0 spares negatives a "
                "little more similar than the positive), or set it once the model tells texts apart"
            )
        return (
            "the step's rows share their texts: they have one anchor, or copies of it and its positives; "
            "look at the data"
        )
