"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state of theirs."""

import math

from training.config import ScheduleConfig


def lr_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Factor on every peak learning rate at `step` (from 0) of `steps`.

    The first step is never wasted on a learning rate of 0: a warm-up of w steps starts at 1/w.
    constant_linear is the schedule of the Polar Express runs (arXiv 2505.16932): there the line towards 0 starts
    after 40 % of the steps and is clipped at 0.1.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, steps - schedule.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - schedule.warmup_steps) / span)))
        return schedule.floor + (1 - schedule.floor) * cosine
    start = int((1 - schedule.decay_fraction) * steps)
    if step < start or start == steps:
        return 1.0
    line = 1 - (step - start) / (steps - start)
    if schedule.kind == "constant_linear":
        return max(schedule.floor, line)
    return schedule.floor + (1 - schedule.floor) * line
