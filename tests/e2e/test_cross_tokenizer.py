"""A real teacher with other token ids, on SGLang, over text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd.config.teachers import TeacherSpec
from opd.data.tokenizer import load_tokenizer
from opd.serving.server import SGLangServer
from opd.teachers.cross_tokenizer import CrossTokenizer
from opd.teachers.served_teachers import ServedTeachers, TeacherScore
from opd.teachers.sglang_teacher import SGLangTeacher
from opd.teachers.token_bytes import TokenBytes
from opd.types import Sample
from tests.e2e.renumbered import renumber
from tests.e2e.runs import TASK, rows, run, tiny_flags

pytestmark = pytest.mark.e2e

ANSWERS = ("18-4=14; 3*5=15; 14+15=29; # 29", "7", "1-1=0; # 0")
PROMPT = "Bob has 30 apples, gives 12 away. How many?"


def scores_over_text(url: str, folder: Path) -> list[tuple[Sample, TeacherScore]]:
    student, teacher = load_tokenizer(TASK / "student"), load_tokenizer(folder)
    text = CrossTokenizer(
        TokenBytes(student, shown="student"),
        TokenBytes(teacher, shown="teacher"),
        student_ends=[student.eos_token_id],
        teacher_end=teacher.eos_token_id,
    )
    prompt = student.encode(PROMPT)
    answers = [[*student.encode(answer), student.eos_token_id] for answer in ANSWERS]
    samples = [
        Sample(
            index=i,
            group_index=0,
            prompt=PROMPT,
            tokens=[*prompt, *answer],
            response_length=len(answer),
            teacher_prompt_ids=teacher.encode(PROMPT),
        )
        for i, answer in enumerate(answers)
    ]

    async def score() -> list[TeacherScore]:
        client = SGLangTeacher(url)
        served = ServedTeachers(specs=(TeacherSpec(name="teacher", location=url),), text=text)
        try:
            return list(await asyncio.gather(*(served.score(sample, lambda _: client) for sample in samples)))
        finally:
            await client.close()

    return list(zip(samples, asyncio.run(score()), strict=True))


def same_ids_logprobs(sample: Sample) -> list[float]:
    """Of the response, by transformers, of the teacher whose ids are the student's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TASK / "teacher", dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([sample.tokens])).logits[0, :-1].log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(sample.tokens[1:])[:, None])[-sample.response_length :, 0].tolist()


def test_a_renumbered_teacher_teaches_the_same(tmp_path: Path, start_teacher: Callable[[Path], SGLangServer]) -> None:
    folder = tmp_path / "renumbered"
    new_of = renumber(TASK / "teacher", folder)
    assert sum(new == old for old, new in enumerate(new_of)) < 10
    server = start_teacher(folder)
    for sample, score in scores_over_text(server.url, folder):
        assert score.spans == list(range(sample.response_length))
        assert score.logprobs == pytest.approx(same_ids_logprobs(sample), abs=1e-4)

    few = {"num_rollout": 2, "lr": 1e-3}
    run(tiny_flags(tmp_path / "coloaded", **few), log=tmp_path / "coloaded.log")
    flags = {"opd_type": "sglang", "opd_teacher_load": None, "rm_url": f"{server.url}/generate", **few}
    run(tiny_flags(tmp_path / "text", opd_teacher_tokenizer=folder, **flags), log=tmp_path / "text.log")
    table, expected = rows(tmp_path / "text"), rows(tmp_path / "coloaded")
    for row, same in zip(table, expected, strict=True):
        assert row["teacher_coverage"] == 1.0 and row["unscored_share"] == 0.0
        assert row["opd_reverse_kl"] == pytest.approx(same["opd_reverse_kl"], abs=1e-4)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)

    printed = run(tiny_flags(tmp_path / "without", **flags), log=tmp_path / "without.log", expect=1)
    assert "--opd-teacher-tokenizer" in printed
