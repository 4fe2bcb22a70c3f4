"""Expected operations and seconds of each part of a step, from sizes and stated speeds. Nothing is measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opd.config.assumptions import Assumptions
from opd.config.decoding_cost import Engine, answers_at_once, decoding_seconds
from opd.config.layout import RankLayout, student_layout
from opd.config.memory_rollout import writing_models
from opd.config.memory_training import tokens_per_micro_batch
from opd.config.memory_types import element_bytes
from opd.config.model_facts import ModelFacts
from opd.config.schema import Config
from opd.config.step_flops import planned_work, step_flops
from opd.config.traffic import gradient_bytes, model_bytes

DISK_BYTES_PER_SECOND = 2e9
_ORDER = ("rollout", "student log-probs", "reference", "teacher", "critic", "update")
_NOTES = {"critic": "values, and its own update"}


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """
    Args:
        flops: on all devices together.
        seconds: None: not known here.
    """

    name: str
    flops: float
    seconds: float | None
    note: str


def step_parts(config: Config, student: ModelFacts, teachers: list[ModelFacts], assumed: Assumptions) -> list[PartCost]:
    """In the order of a step. ``teachers``: the co-loaded ones."""
    work = planned_work(config, prompt=assumed.prompt, response=assumed.response)
    flops = step_flops(config, student, teachers, work)
    if config.opd.use_opd:
        flops.setdefault("teacher", 0.0)  # a server of unknown size
    layout = student_layout(config, student)
    bubble = 1 + (layout.pp - 1) / (layout.chunks * micro_batches_per_step(config, student, layout, assumed))
    speed = config.parallel.world_size * assumed.flops / bubble
    special = {
        "rollout": lambda done: _rollout(config, student, teachers, assumed, done),
        "teacher": lambda done: _teacher(config, teachers, assumed, done, speed),
        "update": lambda done: _update(config, student, assumed, done, speed, bubble),
    }
    parts = []
    for name in sorted(flops, key=_ORDER.index):
        plain = PartCost(name=name, flops=flops[name], seconds=flops[name] / speed, note=_NOTES.get(name, ""))
        parts.append(special[name](flops[name]) if name in special else plain)
    return [*parts, _sync(config, student, assumed)]


def step_seconds(config: Config, parts: list[PartCost]) -> float | None:
    """What overlaps is not counted twice: a served or custom teacher scores while answers are written, and with
    --async-rollout both go on during the update. None when a part that counts is not known."""
    seconds = {part.name: part.seconds for part in parts}
    rollout, teacher = seconds.pop("rollout"), seconds.pop("teacher", 0.0)
    known = [value for value in seconds.values() if value is not None]
    if rollout is None or len(known) < len(seconds):
        return None
    rest = sum(known)
    if config.scores_answers:
        rollout = max(rollout, teacher or 0.0)
    elif teacher is None:
        return None
    else:
        rest += teacher
    return max(rollout, rest) if config.rollouts_ahead else rollout + rest


def micro_batches_per_step(config: Config, student: ModelFacts, layout: RankLayout, assumed: Assumptions) -> int:
    """Of one data-parallel rank and optimizer step."""
    tokens = config.global_batch_size * (assumed.prompt + assumed.response) / layout.dp
    return max(1, math.ceil(tokens / (tokens_per_micro_batch(config, student) * layout.cp)))


def _rollout(
    config: Config, student: ModelFacts, teachers: list[ModelFacts], assumed: Assumptions, flops: float
) -> PartCost:
    rollout, samples = config.rollout, config.samples_per_rollout
    writers = writing_models(config, student, teachers)
    served = rollout.rollout_engine == "sglang"
    ranks = rollout.rollout_num_gpus_per_engine if served else 1
    engines = rollout.rollout_num_gpus // ranks if served else 1
    prompts = rollout.rollout_batch_size or 0 if served else samples  # a server reads a prompt once, for its group
    mine = math.ceil(samples / engines)
    limit = answers_at_once(config, student, assumed, devices=ranks) if served else rollout.rollout_max_running_requests
    running = min(mine, limit)
    if running < 1:
        note = "the model and one answer do not fit into an engine's devices: raise --rollout-num-gpus-per-engine"
        return PartCost(name="rollout", flops=flops, seconds=None, note=note)
    notes = [f"{engines} x {ranks} devices, {running} answers at once each" if served else "on rank 0"]
    if len(writers) > 1:
        notes.append("both models at every token")
    engine = Engine(devices=ranks, running=running, samples=mine, prompts=math.ceil(prompts / engines))
    element = element_bytes(config)
    seconds = sum(decoding_seconds(facts, assumed, engine, element=element) for facts in writers)
    return PartCost(name="rollout", flops=flops, seconds=seconds, note="; ".join(notes))


def _teacher(config: Config, teachers: list[ModelFacts], assumed: Assumptions, flops: float, speed: float) -> PartCost:
    opd = config.opd
    if config.scores_answers:
        if not flops:
            note = "its size is not known here; it scores while other answers are written"
            return PartCost(name="teacher", flops=0.0, seconds=None, note=note)
        note = f"on {opd.opd_teacher_num_gpus} devices of its own, while other answers are written"
        seconds = flops / (assumed.flops * opd.opd_teacher_num_gpus)
        return PartCost(name="teacher", flops=flops, seconds=seconds, note=note)
    moved = 0.0
    if opd.opd_teacher_self is None and not assumed.device.is_cpu:
        distinct = {facts.source: facts for facts in teachers}.values()
        moved = sum(model_bytes(config, facts) for facts in distinct) / config.parallel.world_size
    seconds = flops / speed + moved / assumed.device.host_bandwidth
    return PartCost(name="teacher", flops=flops, seconds=seconds, note="and its way to the device" if moved else "")


def _update(
    config: Config, student: ModelFacts, assumed: Assumptions, flops: float, speed: float, bubble: float
) -> PartCost:
    reduced = gradient_bytes(config, student) / assumed.network if config.parallel.actor_num_nodes > 1 else 0.0
    steps = config.optimizer_steps_per_rollout
    notes = [f"{steps} optimizer step{'s' if steps > 1 else ''}"]
    if config.parallel.recompute_granularity == "full":
        notes.append("layers run forward twice")
    if bubble > 1:
        notes.append(f"pipeline idle {1 - 1 / bubble:.0%}")
    if reduced:
        notes.append(f"{reduced:.2g} s of gradients between machines")
    return PartCost(name="update", flops=flops, seconds=flops / speed + reduced, note=", ".join(notes))


def _sync(config: Config, student: ModelFacts, assumed: Assumptions) -> PartCost:
    rollout, size = config.rollout, model_bytes(config, student)
    host = assumed.device.host_bandwidth
    if rollout.rollout_engine != "sglang":
        return PartCost(name="weight sync", flops=0.0, seconds=size / host, note="a copy in this process")
    engines = rollout.rollout_num_gpus // rollout.rollout_num_gpus_per_engine
    if rollout.sglang_weight_sync == "disk":
        return PartCost(name="weight sync", flops=0.0, seconds=2 * size / DISK_BYTES_PER_SECOND, note="by disk")
    if rollout.sglang_weight_sync == "distributed":
        return PartCost(name="weight sync", flops=0.0, seconds=engines * size / assumed.network, note="by broadcast")
    return PartCost(name="weight sync", flops=0.0, seconds=2 * size / host, note="through shared memory")
