"""The laptop task as benchmarks of whole runs use it: its flags, and the phases of a step in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

TASK = Path(__file__).resolve().parents[1] / "examples" / "on_policy_distillation" / "tiny_task"
PHASES = ("rollout", "teacher", "train", "sync")
# A learning rate of 1e-12, so that all arms write the same answers.
FLAGS = [
    "--hf-checkpoint", str(TASK / "student"), "--prompt-data", str(TASK / "train.jsonl"), "--input-key", "prompt",
    "--label-key", "label", "--rm-type", "final_answer", "--rollout-batch-size", "16", "--n-samples-per-prompt", "8",
    "--rollout-max-response-len", "56", "--lr", "1e-12", "--no-use-tensorboard",
]  # fmt: skip
