"""What a call of `fit` did."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class FitReport:
    """What a training run did.

    Args:
        steps: optimizer steps run, fewer than asked for if patience ended.
        best_step: the step whose parameters the model ended with; 0 stands for those it came with.
        tokens: tokens trained on, repeats counted.
        seconds: wall-clock time, that of earlier, killed runs up to their last journal entry included.
        resumed_from: the step at which the journal was taken up, or `None`.
        held_out_before, held_out_after: loss on the held-out samples before training and of the parameters the model
            ended with; `None` without held-out samples.
        history: one row per evaluation: `step`, `loss` (mean training loss since the row before), `held_out`,
            `learning_rate` (of the last step).
    """

    steps: int = 0
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed_from: int | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def outcome(self) -> str:
        """How it went, in a line for a report."""
        held = ""
        if self.held_out_before is not None:
            held = f", held-out loss {self.held_out_before:.4g} -> {self.held_out_after:.4g}"
        resumed = f", resumed from step {self.resumed_from}" if self.resumed_from else ""
        return f"{self.steps} steps, {self.tokens:,} tokens{held} (best at step {self.best_step}){resumed}"
