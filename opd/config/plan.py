"""What ``--dry-run`` prints: what would run where, on how much, and what it would need. Starts and loads nothing."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from opd.config.advice import warnings
from opd.config.assumptions import assumptions
from opd.config.file_rules import LATEST
from opd.config.memory import rank_memory
from opd.config.mixture_rules import prompt_of
from opd.config.model_facts import ModelFacts
from opd.config.model_rules import coloaded_teachers, student_facts
from opd.config.plan_cost import assumption_line, cost_table, traffic_table
from opd.config.plan_launch import launch_rows
from opd.config.plan_learning import learning_rows
from opd.config.plan_memory import memory_table, memory_title
from opd.config.plan_mixture import mixing_teacher_rows, mixture_line, prompt_line
from opd.config.plan_teacher import asking_rows
from opd.config.schema import Config
from opd.config.teachers import TeacherSpec, teachers

Rows = list[tuple[str, str]]


def plan(config: Config) -> RenderableType:
    """For rich's ``print``. The config must have passed ``check``.

    Raises:
        ConfigError: the model's config.json went away since.
    """
    student = student_facts(config)
    facts = {spec.name: facts for spec, facts in coloaded_teachers(config)}
    sections = {
        "Models": [
            ("student", _model_line(student, config)),
            ("starts from", _start_line(config)),
            *_teacher_rows(config, facts),
            *mixing_teacher_rows(config),
        ],
        "Processes": _process_rows(config),
        "Each rollout": _rollout_rows(config),
        "Learning": learning_rows(config),
        "Evaluation and files": _evaluation_rows(config) + _file_rows(config),
    }
    blocks: list[RenderableType] = []
    for title, rows in sections.items():
        blocks += [Text(title, style="bold"), _table(rows)]
    coloaded, assumed = list(facts.values()), assumptions(config, student)
    memory = rank_memory(config, student, coloaded)
    blocks += [Text(memory_title(config, student, memory), style="bold"), memory_table(memory)]
    blocks += [Text("A step, expected from sizes and stated speeds", style="bold")]
    blocks += [cost_table(config, student, coloaded, assumed), _table([("assumed", assumption_line(config, assumed))])]
    blocks += [Text("Moved per step", style="bold"), traffic_table(config, student, coloaded, assumed)]
    found = warnings(config)
    if found:
        blocks += [Text("Warnings", style="bold yellow"), _table([("-", message) for message in found])]
    blocks.append(Text("Dry run: nothing was started and no weights were loaded."))
    return Group(*blocks)


def _table(rows: Rows) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for left, right in rows:
        table.add_row(Text(left), Text(right))
    return table


def _model_line(facts: ModelFacts, config: Config) -> str:
    kind = "bf16" if config.model.bf16 else "fp32"
    tied = "untied" if facts.untie_embeddings_and_output_weights else "tied"
    return (
        f"{facts.parameter_count:,} parameters, {kind}: {facts.family}, {facts.num_layers} layers, hidden "
        f"{facts.hidden_size}, "
        f"ffn {facts.ffn_hidden_size}, {facts.num_attention_heads} heads in {facts.num_query_groups} groups of "
        f"{facts.kv_channels}, vocabulary {facts.vocab_size} ({tied}), {facts.max_position_embeddings} positions"
    )


def _start_line(config: Config) -> str:
    checkpoint = config.checkpoint
    if checkpoint.load is not None:
        iteration = _latest(checkpoint.load)
        if iteration is not None:
            what = "its weights only, from step 0" if checkpoint.finetune else "resumes there"
            return f"{checkpoint.load} (checkpoint {iteration}): {what}"
    first = checkpoint.ref_load or f"{checkpoint.hf_checkpoint} (Hugging Face weights)"
    return f"{first}; {checkpoint.load} holds no checkpoint yet" if checkpoint.load is not None else first


def _latest(folder: str) -> str | None:
    path = Path(folder) / LATEST
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _teacher_rows(config: Config, facts: dict[str, ModelFacts]) -> Rows:
    opd, found = config.opd, teachers(config)
    if not found:
        return [("teacher", "none")]
    if opd.opd_teachers is None:
        rows = [("teacher", _teacher_line(config, found[0], facts.get(found[0].name)))]
    else:
        rows = [(f"teacher {t.name}", _teacher_line(config, t, facts.get(t.name))) for t in found]
    if len(found) > 1:
        rows.append(("combined", _combination_line(config, found)))
    rows += asking_rows(config, found)
    if opd.opd_teacher_tokenizer is not None:
        rows.append(("teacher reads", f"the answer's text, in the tokens of {opd.opd_teacher_tokenizer}"))
    sees = prompt_line(prompt_of(config, "opd_teacher"))
    return [*rows, ("teacher sees", sees)] if sees else rows


def _teacher_line(config: Config, teacher: TeacherSpec, facts: ModelFacts | None) -> str:
    opd = config.opd
    if opd.opd_type == "custom":
        return f"function {teacher.location}, in the first training process"
    if facts is None:
        where = teacher.location or f"that the run starts for {opd.opd_teacher_serve}"
        return (
            f"server {'at ' if teacher.location else ''}{where}, {opd.opd_teacher_concurrency} requests in flight, "
            f"{opd.opd_teacher_retries} retries of {opd.opd_teacher_timeout:g} s"
        )
    if teacher.location is None:
        how = {"live": "as it is", "frozen": "as at the start", "ema": f"average, decay {opd.opd_teacher_ema_decay:g}"}
        return f"the student itself, {how[str(opd.opd_teacher_self)]}"
    step = opd.opd_teacher_ckpt_step if opd.opd_teacher_ckpt_step is not None else _latest(teacher.location)
    at = f", checkpoint {step}" if step is not None else ""
    return f"co-loaded from {teacher.location}{at}: {_model_line(facts, config)}"


def _combination_line(config: Config, found: list[TeacherSpec]) -> str:
    opd = config.opd
    if opd.opd_teacher_combine == "route":
        coefs = ", ".join(f"{t.name} x {t.kl_coef:g}" for t in found)
        return f"one per sample, by metadata field `{opd.opd_teacher_key}` ({coefs})"
    weights = ", ".join(f"{t.weight:.3g} {t.name}" for t in found)
    return f"weighted {'logits' if opd.opd_teacher_combine == 'logits' else 'probabilities'}: {weights}"


def _process_rows(config: Config) -> Rows:
    parallel, rollout = config.parallel, config.rollout
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    dp = parallel.world_size // parallel.model_parallel_size
    layout = f"tensor {tp} x pipeline {pp} x context {cp} x data {dp}"
    if parallel.sequence_parallel:
        layout += ", sequence parallel"
    if parallel.use_distributed_optimizer:
        layout += ", optimizer states sharded"
    decode = "torch engine inside the first training process"
    if rollout.rollout_engine == "sglang":
        size = rollout.rollout_num_gpus_per_engine
        engines = rollout.rollout_num_gpus // size
        decode = f"{engines} SGLang server{'s' if engines > 1 else ''} of tensor-parallel size {size}"
    elif rollout.rollout_engine == "speculative_kd":
        decode += f"; the teacher beside it replaces tokens outside its {rollout.skd_top_k} likeliest"
    elif rollout.rollout_engine == "mixture":
        decode += f"; {mixture_line(config)}"
    return [
        ("training", f"{parallel.world_size} rank{'s' if parallel.world_size > 1 else ''}: {layout}"),
        *launch_rows(config, os.environ),
        ("rollout", decode),
    ]


def _rollout_rows(config: Config) -> Rows:
    rollout = config.rollout
    total = config.samples_per_rollout
    top = f", top-p {rollout.rollout_top_p:g}" if rollout.rollout_top_p < 1 else ""
    top += f", top-k {rollout.rollout_top_k}" if rollout.rollout_top_k != -1 else ""
    return [
        ("samples", f"{rollout.rollout_batch_size} prompts x {rollout.n_samples_per_prompt} answers = {total} samples"),
        (
            "answers",
            f"at most {rollout.rollout_max_response_len:,} tokens each ({total * rollout.rollout_max_response_len:,} "
            f"in all), temperature {rollout.rollout_temperature:g}{top}",
        ),
        ("prompts", f"{config.data.prompt_data}{', shuffled' if config.data.rollout_shuffle else ''}"),
        *([("order", _ahead_row(config))] if config.rollouts_ahead else []),
        *([("set aside", _partial_row(config))] if rollout.partial_rollout else []),
    ]


def _ahead_row(config: Config) -> str:
    rollout, ahead = config.rollout, config.rollouts_ahead
    parts = [f"written in the background, {ahead} ahead: answers of weights up to {ahead} rollout(s) old"]
    if config.weighs_importance:
        parts.append("each token weighed by its importance ratio")
    if rollout.async_ratio_gate is not None:
        low, high = rollout.async_ratio_gate
        parts.append(f"left out where that is outside [{low:g}, {high:g}]")
    return "; ".join(parts)


def _partial_row(config: Config) -> str:
    rollout, aside = config.rollout, config.prompts_set_aside
    learned = rollout.rollout_batch_size or 0
    parts = [
        f"of {learned + aside} prompts in flight the first {learned} with all their answers are learned from, looked "
        f"for every {config.partial_tokens:,} tokens of an answer; {aside} go on in the next rollout"
    ]
    if rollout.mask_offpolicy_in_partial_rollout:
        parts.append("what an earlier rollout wrote is left out of every loss")
    elif config.weighs_importance and config.rollouts_ahead == 0:
        parts.append("each token weighed by its importance ratio")
    return "; ".join(parts)


def _evaluation_rows(config: Config) -> Rows:
    evaluation = config.eval
    if evaluation.eval_interval is None:
        return [("evaluation", "none")]
    how = "greedy" if evaluation.eval_temperature == 0 else f"temperature {evaluation.eval_temperature:g}"
    sets = ", ".join(f"{name} ({path})" for name, path in config.eval_sets)
    first = "" if evaluation.skip_eval_before_train else "before the first rollout and "
    return [
        (
            "evaluation",
            f"{sets}: {first}every {evaluation.eval_interval} rollouts, {evaluation.n_samples_per_eval_prompt} x {how}",
        )
    ]


def _file_rows(config: Config) -> Rows:
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        saves = "none"
    else:
        when = (
            "at the end"
            if checkpoint.save_interval is None
            else f"every {checkpoint.save_interval} rollouts and at the end"
        )
        saves = f"{checkpoint.save}, {when}{_save_details(config)}"
    return [("checkpoints", saves), ("output", config.output.output_dir or "none given")]


def _save_details(config: Config) -> str:
    checkpoint, details = config.checkpoint, ""
    if checkpoint.async_save:
        details += ", in the background"
    if checkpoint.save_retain is not None or checkpoint.save_retain_interval is not None:
        details += f"; kept: the newest {checkpoint.save_retain or 1}"
        if checkpoint.save_retain_interval is not None:
            details += f" and every {checkpoint.save_retain_interval}th step"
    return details if checkpoint.save_hf is None else f"{details}; exported to {checkpoint.save_hf}"
