"""What is expected of the robustness study, and whether it was found.

A verdict on networks needs networks that have learned something: with fewer than 600 steps of training
there is none, only a note.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.robustness.contenders import ADAPTED, BUNDLED, ORACLE
from benchmarks.robustness.summary import differences, drops
from benchmarks.robustness.table import Budget, Row
from benchmarks.robustness.training import DDPM, NETWORKS, NO_INVARIANCE, PATCH_PRIOR, UNET

EXACT = 0.01  # dB, below which a cost is called nothing
HARMLESS = 0.05  # dB, that adaptation may cost
LEAST_STEPS = 600  # of training, before a verdict on a network means something
MEDICAL = "mri_brain", "mri_t1_native", "ct_chest", "oct_retina", "em_isbi2012"


def claims(rows: Sequence[Row], budgets: Sequence[Budget]) -> list[list[str]]:
    """Lines for a table: what is expected of the study, what was measured, and whether it is so.

    There is no verdict where a network was trained for less than ``LEAST_STEPS``.
    """
    between = differences(rows)
    gain = [
        (series.method, drop.mean)
        for (place, series), drop in drops(rows).items()
        if place.study == "gain"
    ]
    with_it = [abs(drop) for method, drop in gain if method in (PATCH_PRIOR, BUNDLED)]
    without = [-drop for method, drop in gain if method == NO_INVARIANCE]
    over_tv = [
        d.psnr.mean
        for d in between
        if (d.prior.method, d.rival.estimate) == (BUNDLED, ORACLE) and d.place.shift in MEDICAL
    ]
    few = [
        d.drop.mean
        for d in between
        if (d.place.study, d.prior.method) == ("content", PATCH_PRIOR)
        and d.prior.training_images in (10, 100)
        and d.rival.method in (UNET, DDPM)
        and d.drop is not None
    ]
    adapted = [d.psnr.mean for d in between if (d.prior.method, d.rival.method) == (BUNDLED, ADAPTED)]
    lines = [
        (
            "gain and offset cost the patch priors at most 0.01 dB",
            with_it,
            max,
            lambda x: x <= EXACT,
            (),
        ),
        (
            "without the invariances, more than 2 dB somewhere",
            without,
            max,
            lambda x: x > 2,
            (NO_INVARIANCE,),
        ),
        ("natural-gray over TV with an oracle weight, medical", over_tv, min, lambda x: x > 0, ()),
        ("adaptation costs at most 0.05 dB under any shift", adapted, max, lambda x: x <= HARMLESS, ()),
    ]
    table = [
        [text, f"{worst(values):+.4f} dB", _verdict(holds(worst(values)), trained, rows, budgets)]
        for text, values, worst, holds, trained in lines
        if values
    ]
    if few:
        smaller = [difference for difference in few if difference > 0]
        text = "with 10 and 100 images a smaller drop under content than U-Net and DDPM"
        found = f"{len(smaller)} of {len(few)}, by {np.mean(few):+.2f} dB on average"
        verdict = _verdict(smaller == few, (PATCH_PRIOR, UNET, DDPM), rows, budgets)
        table.append([text, found, verdict])
    return [["expected", "measured", "so"], *table]


def no_verdict(budgets: Sequence[Budget]) -> str:
    """What to say in the place of verdicts if a network has learned too little; "" if none has."""
    fewest = min((budget.steps for budget in budgets if budget.method in NETWORKS), default=LEAST_STEPS)
    if fewest >= LEAST_STEPS:
        return ""
    return (
        f"No verdict: a network has learned for {fewest} steps only, and {LEAST_STEPS} are needed. "
        "These numbers show that the study works, and do not compare networks."
    )


def _verdict(holds: bool, trained: Sequence[str], rows: Sequence[Row], budgets: Sequence[Budget]) -> str:
    """Yes or no, unless one of the networks it is about was not trained for long enough."""
    steps = {budget[:3]: budget.steps for budget in budgets}
    learned = {(r.method, r.train_set, r.training_images) for r in rows if r.method in trained}
    fewest = min((steps.get(one, 0) for one in learned), default=LEAST_STEPS)
    if fewest < LEAST_STEPS:
        return f"not known: {fewest} steps of training, and {LEAST_STEPS} are needed"
    return "yes" if holds else "no"
