"""What changes along a training run and depends on the number of the step alone.

Learning rates, as a share of their peak, by the names that `fit` takes as `schedule`:

- `warmup_cosine`: a linear warm-up, then a cosine to zero;
- `two_stages`: a linear warm-up, then a straight line to zero, two thirds of it in the second half.

And the share of quantization in a model that is trained for few bits, lambda (Hugging Face, "Fine-tuning LLMs to
1.58bit"): weights and activations go from what they are at 0 to what they will be stored as at 1,

    x + lambda * (quantized(x) - x)

linearly, exponentially (steep first) or along a sigmoid (steep in the middle). The authors found the linear one best
for large models, and no gain from any over abrupt quantization in a model of 135M parameters.
"""

import math


SECOND_STAGE = 2 / 3  # learning rate of the second stage, of that of the first
STEEPNESS = {"linear": None, "exponential": 4.0, "sigmoid": 100.0}  # by default


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step: Transformers' `get_cosine_schedule_with_warmup`.

    Written out here because Transformers' module of schedules imports the optional packages peft and bitsandbytes.
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def two_stages(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step of a run in two stages, as BitNet b1.58 was trained.

    After a linear warm-up the rate falls linearly to zero, and in the second half of the run it is two thirds of that
    (1.5e-3 and 1e-3, 1.2e-3 and 8e-4 in the paper's models).
    """
    if step < warmup:
        return step / warmup
    return (SECOND_STAGE if 2 * step >= steps else 1.0) * (steps - step) / max(1, steps - warmup)


SCHEDULES = {"cosine": warmup_cosine, "two_stage": two_stages}


def quantized_share(step: int, steps: int, schedule: str = "linear", steepness: float | None = None) -> float:
    """Lambda at a step of training, in [0, 1].

    With t = step / steps and k the steepness: `"linear"` is t, `"exponential"` 1 - (1 - t)^k and `"sigmoid"`
    1 / (1 + exp(-k (t - 1/2))).

    Args:
        step: optimizer steps done.
        steps: those after which everything is quantized; 0 quantizes abruptly.
        schedule: one of the three names.
        steepness: k, by default 4 and 100; `"linear"` has none.
    """
    if step >= steps:
        return 1.0
    t, k = step / steps, STEEPNESS[schedule] if steepness is None else steepness
    match schedule:
        case "linear":
            return t
        case "exponential":
            return 1 - (1 - t) ** k
        case _:
            return 1 / (1 + math.exp(-k * (t - 0.5)))
