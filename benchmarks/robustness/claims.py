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
    gain = drops([row for row in rows if row.study == "gain"]).items()
    with_it = [abs(drop.mean) for (_, s), drop in gain if s.method in (PATCH_PRIOR, BUNDLED)]
    without = [-drop.mean for (_, s), drop in gain if s.method == NO_INVARIANCE]
    over_tv = [
        d.psnr.mean
        for d in between
        if (d.prior.method, d.rival.estimate) == (BUNDLED, ORACLE) and d.place.shift in MEDICAL
    ]
    adapted = [d.psnr.mean for d in between if (d.prior.method, d.rival.method) == (BUNDLED, ADAPTED)]
    few = [
        d.drop.mean
        for d in between
        if (d.place.study, d.prior.method) == ("content", PATCH_PRIOR)
        and d.prior.training_images in (10, 100)
        and d.rival.method in (UNET, DDPM)
        and d.drop is not None
    ]
    table = [["expected", "measured", "so"]]

    def add(text: str, found: str, holds: bool, *trained: str) -> None:
        table.append([text, found, _verdict(holds, trained, rows, budgets)])

    if with_it:
        worst = max(with_it)
        text = "gain and offset cost the patch priors at most 0.01 dB"
        add(text, f"{worst:+.4f} dB", worst <= EXACT)
    if without:
        worst = max(without)
        text = "without the invariances, more than 2 dB somewhere"
        add(text, f"{worst:+.4f} dB", worst > 2, NO_INVARIANCE)
    if over_tv:
        worst = min(over_tv)
        add("natural-gray over TV with an oracle weight, medical", f"{worst:+.4f} dB", worst > 0)
    if adapted:
        worst = max(adapted)
        text = "adaptation costs at most 0.05 dB under any shift"
        add(text, f"{worst:+.4f} dB", worst <= HARMLESS)
    if few:
        smaller = sum(difference > 0 for difference in few)
        text = "with 10 and 100 images a smaller drop under content than U-Net and DDPM"
        found = f"{smaller} of {len(few)}, by {np.mean(few):+.2f} dB on average"
        add(text, found, smaller == len(few), PATCH_PRIOR, UNET, DDPM)
    return table


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
