"""What a person sees of a run: console, metrics.jsonl, TensorBoard, W&B, curves, saved samples."""

from opd.report.reporter import Reporter

__all__ = ["Reporter"]
