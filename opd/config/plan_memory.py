"""The plan's table of memory."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from opd.config.layout import student_layout
from opd.config.memory import RankMemory
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config

GIB = 2**30
MIB = 2**20


def memory_title(config: Config, student: ModelFacts, memory: RankMemory) -> str:
    stages = student_layout(config, student).pp
    where = f" (pipeline stage {memory.stage + 1} of {stages})" if stages > 1 else ""
    return f"Memory of the heaviest training rank{where}, estimated"


def memory_table(memory: RankMemory) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for justify in ("left", "right", "left", "left"):
        table.add_column(justify=justify)
    for item in memory.items:
        host = "host" if item.on_host and not memory.device.is_cpu else ""
        table.add_row(Text(item.name), size(item.bytes), " ".join(filter(None, (item.phase, host))), Text(item.note))
    rest, peak = memory.at_rest, memory.peak
    table.add_row(Text("at rest", style="bold"), size(rest), "", "between the parts of a step")
    during = f"in the part that needs most: {memory.peak_phase}" if memory.peak_phase else ""
    table.add_row(Text("peak", style="bold"), size(peak), "", Text(f"{during}{_fit(memory)}"))
    if memory.host_peak:
        table.add_row(Text("main memory", style="bold"), size(memory.host_peak), "", "beside the device, at most")
    return table


def _fit(memory: RankMemory) -> str:
    device = memory.device
    if device.memory is None:
        return ""
    share = memory.peak / device.memory
    verdict = "" if share <= 0.9 else ": leaves little for what is not counted" if share <= 1 else ": DOES NOT FIT"
    return f"; {share:.0%} of the {device.shown}{verdict}"


def size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
