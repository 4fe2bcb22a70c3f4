"""What compare-objectives.sh found: a Markdown table, and two pictures with the objectives' curves.

    python examples/experiments/objectives.py outputs/objectives

The table goes to standard output, accuracy.png and reverse_kl.png into the folder (or --pictures). A run that is not
complete, or whose name is not one of the script's, is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import draw_accuracy, draw_reverse_kl
from results import Run, runs_in, table

STEPS = 40  # of every run but the longer GRPO
REFERENCE = "OPD penalty"  # drawn in grey in every panel but its own

# Panel -> name in compare-objectives.sh -> how it is called here.
PANELS = {
    "Policy gradient": {
        "opd": REFERENCE,
        "hybrid": "penalty + reward",
        "grpo": "GRPO, reward only",
    },
    "Distribution losses": {
        "reverse_kl": "reverse KL",
        "forward_kl": "forward KL",
        "jsd": "JSD 0.5",
        "top_k": "reverse KL, top 8",
        "hybrid_kl": "reverse KL + reward",
    },
    "Other teachers (reverse KL)": {
        "routed": "routed: good / sloppy",
        "mixed": "mixed: good + sloppy",
        "privileged": "told the answer",
        "self_ema": "itself, told: EMA",
        "self_live": "itself, told: live",
    },
    "Controls without a teacher": {
        "null": "null teacher",
        "null_wide": "null teacher, p < 0.9",
        "grpo": "GRPO, reward only",  # third, as above: the same colour
        "null_hybrid": "null teacher + reward",
        "null_faint": "0.1 null teacher + reward",
    },
}
LONGER = {"grpo_long": "GRPO, 120 steps"}  # in the table alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of the runs NAME-SEED")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; that of the runs without it")
    arguments = parser.parse_args()
    runs = [run for run in runs_in(arguments.folder) if run.last_step >= STEPS]
    labels = {name: label for names in (*PANELS.values(), LONGER) for name, label in names.items()}
    groups = by_label(runs, labels)
    if not groups:
        parser.error(f"{arguments.folder} holds no run NAME-SEED that has done {STEPS} steps")
    print(table(groups))
    panels = {title: by_label(runs, names) for title, names in PANELS.items()}
    reference = REFERENCE if REFERENCE in groups else ""
    pictures = arguments.pictures or arguments.folder
    draw_accuracy(panels, pictures / "accuracy.png", reference=reference, last_step=STEPS)
    draw_reverse_kl(panels, pictures / "reverse_kl.png", reference=reference, last_step=STEPS)


def by_label(runs: list[Run], labels: dict[str, str]) -> dict[str, list[Run]]:
    """In the order of ``labels``, without those that have no run."""
    grouped = {label: [run for run in runs if run.name == name] for name, label in labels.items()}
    return {label: of_label for label, of_label in grouped.items() if of_label}


if __name__ == "__main__":
    main()
