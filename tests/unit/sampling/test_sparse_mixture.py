"""Blocks judged on K likely tokens of each model: exact in distribution, and what is reported of each token."""

import math

import pytest
import torch

from opd.sampling import sparse_mixture
from opd.sampling.sparse_mixture import DraftedBlock, LikelyTokens
from opd.types import Mixture
from tests.unit.sampling.sparse_enumeration import CONTROLS, chi_square, likely, looks_uniform, sparse_q

VOCABULARY, TOP_K, TEMPERATURE = 12, 6, 0.7
SEEDS = range(12)
BLOCKS = 1500


def make_pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1 + V, V] of student and teacher: what follows the prompt, and what follows each first token."""
    generator = torch.Generator().manual_seed(seed)
    student = 1.2 * torch.randn(1 + VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    return student, student + torch.randn(student.shape, generator=generator, dtype=torch.float64)


def judge(student: torch.Tensor, teacher: torch.Tensor, seed: int) -> list[sparse_mixture.JudgedBlock]:
    """Blocks of two drafts each, drawn from the whole student."""
    generator = torch.Generator().manual_seed(1000 + seed)
    probabilities = (student / TEMPERATURE).softmax(-1)
    first_N = torch.multinomial(probabilities[0], BLOCKS, replacement=True, generator=generator)
    second_N = torch.multinomial(probabilities[1 + first_N], 1, generator=generator)[:, 0]
    noise = torch.rand(2, BLOCKS, 2, generator=generator, dtype=torch.float64)
    of_student, of_teacher = likely(student / TEMPERATURE, TOP_K), likely(teacher, TOP_K)
    blocks = []
    for i, drafts in enumerate(zip(first_N.tolist(), second_N.tolist(), strict=True)):
        rows = [0, 1 + drafts[0]]
        blocks.append(
            DraftedBlock(
                student=LikelyTokens(of_student.ids_BK[rows], of_student.logprobs_BK[rows]),
                teacher=LikelyTokens(of_teacher.ids_BK[rows], of_teacher.logprobs_BK[rows]),
                drafts=list(drafts),
                verdict_noise_B=noise[0, i],
                replacement_noise_B=noise[1, i],
            )
        )
    return sparse_mixture.judge_blocks(blocks, Mixture(), temperature=TEMPERATURE, top_p=1.0)


def p_values(seed: int) -> list[float]:
    """Of the first tokens, and of the second ones after the first draft that was kept most often."""
    student, teacher = make_pair(seed)
    judged = judge(student, teacher, seed)
    first = torch.tensor([block.ids[0] for block in judged])
    kept = torch.tensor([block.ids for block in judged if block.accepted >= 1])
    most = int(kept[:, 0].mode().values)
    found = []
    for tokens, row in ((first, 0), (kept[kept[:, 0] == most, 1], 1 + most)):
        q = sparse_q(student[row] / TEMPERATURE, teacher[row] / TEMPERATURE, TOP_K)
        found.append(chi_square(tokens.bincount(minlength=VOCABULARY), q))
    return found


def test_the_frequencies_are_those_of_the_mixture_of_both_top_k():
    found = [p for seed in SEEDS for p in p_values(seed)]
    assert looks_uniform(found), found


@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_judgement_is_found_out(control):
    with CONTROLS[control]():
        found = [p_values(seed)[0] for seed in SEEDS[:6]]
    assert sorted(found)[len(found) // 2] < 1e-6
    assert not looks_uniform(found)


def one_block(student: dict[int, float], teacher: dict[int, float], draft: int, **changes):
    """A block of one draft; the dicts are probabilities of the K."""
    sides = [
        LikelyTokens(torch.tensor([list(side)]), torch.tensor([list(side.values())], dtype=torch.float64).log())
        for side in (student, teacher)
    ]
    verdict, replacement = changes.pop("noise", (0.5, 0.5))
    block = DraftedBlock(
        student=sides[0],
        teacher=sides[1],
        drafts=[draft],
        verdict_noise_B=torch.tensor([verdict], dtype=torch.float64),
        replacement_noise_B=torch.tensor([replacement], dtype=torch.float64),
    )
    options = {"mixture": Mixture(method="fixed", fixed_alpha=0.5), "temperature": 1.0, "top_p": 1.0} | changes
    (judged,) = sparse_mixture.judge_blocks([block], **options)
    return judged


def test_hand_worked_numbers():
    # Common: 7 and 9. sqrt(.4 * .1) = .2 and sqrt(.1 * .9) = .3, so q(7) = .4 and q(9) = .6.
    student, teacher = {7: 0.4, 3: 0.2, 9: 0.1}, {9: 0.9, 7: 0.1, 5: 0.0001}
    kept = one_block(student, teacher, draft=7, noise=(0.99, 0.5))
    assert kept.ids == [7] and kept.accepted == 1  # q(7) = s(7): always kept
    assert kept.log_probs == pytest.approx([math.log(0.4)])
    assert kept.student_log_probs == pytest.approx([math.log(0.4)])
    assert kept.teacher_log_probs == pytest.approx([math.log(0.1)])
    assert kept.alphas == [0.5]

    replaced = one_block(student, teacher, draft=3)  # likely to the student alone: q(3) = 0
    assert replaced.ids == [9] and replaced.accepted == 0  # (q - s)+ is .5 at 9 and nothing at 7
    assert replaced.log_probs == pytest.approx([math.log(0.6)])
    assert (replaced.outside, replaced.alone) == (0, 0)


def test_a_draft_outside_the_students_k_is_replaced():
    student, teacher = {7: 0.4, 9: 0.1}, {9: 0.9, 7: 0.1}
    judged = one_block(student, teacher, draft=11, noise=(0.0, 0.5))
    assert judged.ids == [9] and judged.outside == 1


def test_without_a_common_token_the_student_writes_alone():
    judged = one_block({7: 0.6, 3: 0.2}, {5: 0.5, 2: 0.25}, draft=7, noise=(0.9999, 0.5))
    assert judged.ids == [7] and judged.alone == 1
    assert judged.log_probs == pytest.approx([math.log(0.75)])
    assert judged.student_log_probs == pytest.approx([math.log(0.6)])
    assert judged.teacher_log_probs == pytest.approx([math.log(0.25)])  # a bound: 7 is no likelier than the K-th


def test_the_teachers_temperature_and_top_p_apply_within_its_k():
    # At temperature 1/2 the teacher's K weigh .64 : .04 : .0004.
    student, teacher = {7: 0.5, 9: 0.25, 4: 0.2}, {7: 0.8, 9: 0.2, 4: 0.02}
    judged = one_block(student, teacher, draft=7, noise=(0.0, 0.5), temperature=0.5)
    assert judged.teacher_log_probs == pytest.approx([math.log(0.64 / 0.6804)])
    assert judged.student_log_probs == pytest.approx([math.log(0.5)])
    root = [math.sqrt(s * t) for s, t in ((0.5, 0.64), (0.25, 0.04), (0.2, 0.0004))]
    assert judged.log_probs == pytest.approx([math.log(root[0] / sum(root))])

    # .64 / .6804 = .94: with top-p .9 the teacher has nothing but 7; the student keeps .5 and .25 and .2 of .95.
    judged = one_block(student, teacher, draft=9, noise=(0.0, 0.5), temperature=0.5, top_p=0.9)
    assert judged.ids == [7] and judged.log_probs == pytest.approx([0.0], abs=1e-9)


def test_blocks_of_different_lengths_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(3)
    blocks = []
    for length in (1, 4, 2, 3, 4):
        student = torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64)
        teacher = student + torch.randn(student.shape, generator=generator, dtype=torch.float64)
        noise = torch.rand(2, length, generator=generator, dtype=torch.float64)
        blocks.append(
            DraftedBlock(
                student=likely(student, TOP_K),
                teacher=likely(teacher, TOP_K),
                drafts=torch.multinomial(student.softmax(-1), 1, generator=generator)[:, 0].tolist(),
                verdict_noise_B=noise[0],
                replacement_noise_B=noise[1],
            )
        )
    options = {"mixture": Mixture(), "temperature": 0.8, "top_p": 0.95}
    together = sparse_mixture.judge_blocks(blocks, **options)
    alone = [sparse_mixture.judge_blocks([block], **options)[0] for block in blocks]
    assert {len(block.ids) for block in together} != {1}
    for one, other in zip(together, alone, strict=True):
        assert one.ids == other.ids and one.accepted == other.accepted
        assert one.log_probs == pytest.approx(other.log_probs)
        assert one.alphas == pytest.approx(other.alphas, abs=1e-5)
