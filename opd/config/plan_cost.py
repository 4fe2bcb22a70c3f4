"""The plan's tables of time and traffic per step."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from opd.config.assumptions import Assumptions
from opd.config.model_facts import ModelFacts
from opd.config.plan_memory import size
from opd.config.schema import Config
from opd.config.step_cost import PartCost, step_parts, step_seconds
from opd.config.traffic import step_traffic

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def cost_table(config: Config, student: ModelFacts, teachers: list[ModelFacts], assumed: Assumptions) -> Table:
    parts = step_parts(config, student, teachers, assumed)
    table = _table()
    for part in parts:
        flops = f"{flop_text(part.flops)}" if part.flops else ""
        table.add_row(Text(part.name), flops, seconds_text(part.seconds), Text(part.note))
    table.add_row(Text("step", style="bold"), flop_text(sum(p.flops for p in parts)), *_total(config, parts, assumed))
    return table


def assumption_line(config: Config, assumed: Assumptions) -> str:
    device, kind = assumed.device, "bf16" if config.model.bf16 else "fp32"
    peak = device.flops(bf16=config.model.bf16)
    return (
        f"{device.shown}: {assumed.flops / peak:.0%} of {flop_text(peak)}/s in {kind}, "
        f"{assumed.bandwidth / device.bandwidth:.0%} of {device.bandwidth / 1e9:,.0f} GB/s in decoding, "
        f"{device.host_bandwidth / 1e9:.0f} GB/s to main memory, {assumed.network / 1e9:.0f} GB/s between machines; "
        f"prompts of {assumed.prompt:,} and answers of {assumed.response:,} tokens, all alike (--plan-* flags)"
    )


def traffic_table(config: Config, student: ModelFacts, teachers: list[ModelFacts], assumed: Assumptions) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for row in step_traffic(config, student, teachers, response=assumed.response):
        table.add_row(Text(row.name), size(row.bytes), Text(row.note))
    return table


def flop_text(flops: float) -> str:
    for unit, prefix in _PREFIXES:
        if flops >= unit:
            return f"{flops / unit:.3g} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s"


def _total(config: Config, parts: list[PartCost], assumed: Assumptions) -> tuple[str, Text]:
    seconds = step_seconds(config, parts)
    if seconds is None:
        return "?", Text("a part of it is not known here")
    tokens = config.samples_per_rollout * assumed.response
    rate = f"{tokens / seconds:,.0f} answer tokens per second" if seconds else ""
    if config.rollouts_ahead:
        rate += "; the next rollout is written meanwhile"
    elif config.scores_answers:
        rate += "; the teacher beside the rollout"
    return seconds_text(seconds), Text(rate)


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)
    return table
