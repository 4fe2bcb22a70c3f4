"""What each rank runs for test_divergence_tp: its slice of the vocabulary, every kind, and what one process gets."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

COLUMNS = 8  # per rank; the last two of the whole vocabulary are padding
ROWS, HIDDEN, K = 6, 5, 3
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("gkd", 0.25)]
SUPPORTS: list[tuple[int | None, str]] = [(None, "teacher"), (K, "teacher"), (K, "student"), (K, "union")]


def run(megatron: bool) -> dict[str, float]:
    """Largest difference to one process by name, over values, gradients and diagnostics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    student, teacher = _logits(world * COLUMNS)
    differences: dict[str, float] = {}
    for kind, beta in KINDS:
        for top_k, support in [*SUPPORTS, (world * COLUMNS, "teacher")]:
            options = {"kind": kind, "beta": beta, "temperature": 2.0, "top_k": top_k, "support": support}
            name = f"{kind} top_k={top_k} {support}"
            differences[name] = _given_logits(student, teacher, mine, options)
            differences[f"head {name}"] = _head(world, mine, options)
        differences[f"{kind} sparse"] = _sparse(student, teacher, mine, kind, beta)
    differences["head custom"] = _head(world, mine, {"kind": _by_columns, "temperature": 2.0})
    if megatron:
        differences |= _megatron(student, mine)
    dist.destroy_process_group()
    return differences


def _by_columns(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The terms of a divergence of a user's own: a Hellinger distance and a reverse KL."""
    return ((student / 2).exp() - (teacher / 2).exp()).square() + student.exp() * (student - teacher)


def _logits(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(ROWS, columns, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student[:, -2:] = teacher[:, -2:] = torch.finfo(torch.float64).min
    return student, teacher


def _given_logits(student: torch.Tensor, teacher: torch.Tensor, mine: slice, options: dict[str, Any]) -> float:
    from opd.maths.divergence import divergence, divergence_and_grad

    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    whole, part = student.clone().requires_grad_(), student[:, mine].clone().requires_grad_()
    want = divergence(whole, teacher, **options)
    got = divergence(part, teacher[:, mine], group=dist.group.WORLD, **options)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    one = divergence_and_grad(student, teacher, need_grad=False, **options)
    us = divergence_and_grad(student[:, mine], teacher[:, mine], group=dist.group.WORLD, need_grad=False, **options)
    diagnostics = ("student_entropy_C", "teacher_entropy_C", "top1_agree_C", "tail_mass_C")
    pairs = [(got, want), (part.grad, whole.grad[:, mine])] + [(getattr(us, n), getattr(one, n)) for n in diagnostics]
    return _largest(pairs)


def _head(world: int, mine: slice, options: dict[str, Any]) -> float:
    """The hidden states' gradient is summed here, as the caller does."""
    from opd.maths.head import OutputHead
    from opd.maths.head_divergence import head_divergence

    generator = torch.Generator().manual_seed(4)
    columns = world * COLUMNS
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (ROWS, columns))
    teacher, weights = _logits(columns)[1], torch.rand(ROWS, generator=generator, dtype=torch.float64)
    results = []
    for rows, group in ((slice(0, columns), None), (mine, dist.group.WORLD)):
        leaves = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        head = OutputHead(weight_VH=leaves[1], vocab_size=columns - 2, group=group)
        loss, value, _ = head_divergence(
            leaves[0], head, lambda index, rows=rows: teacher[index][:, rows], weights, chunk=4, **options
        )
        loss.backward()
        if group is not None:
            dist.all_reduce(leaves[0].grad)
        results.append((loss, value, leaves[0].grad, leaves[1].grad))
    one, us = results
    return _largest([*zip(us[:3], one[:3], strict=True), (us[3], one[3][mine])])


def _sparse(student: torch.Tensor, teacher: torch.Tensor, mine: slice, kind: str, beta: float) -> float:
    from opd.maths.divergence import sparse_divergence_and_grad

    ids = teacher.topk(K).indices
    logprobs = teacher.log_softmax(-1).gather(1, ids)
    ids[0, 1] = -1
    one = sparse_divergence_and_grad(student, ids, logprobs, kind=kind, beta=beta)
    us = sparse_divergence_and_grad(student[:, mine], ids, logprobs, kind=kind, beta=beta, group=dist.group.WORLD)
    names = ("value_C", "student_entropy_C", "teacher_entropy_C", "top1_agree_C", "tail_mass_C")
    pairs = [(getattr(us, n), getattr(one, n)) for n in names]
    return _largest([*pairs, (us.grad_CV, one.grad_CV[:, mine])])


def _megatron(student: torch.Tensor, mine: slice) -> dict[str, float]:
    """Its cross-entropy is minus the log-prob of the target; float32, and it writes into the logits it is given.

    A forward KL towards a teacher that is certain of the target is that cross-entropy too.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    from opd.maths.divergence import divergence
    from opd.maths.logprobs import token_logprobs

    mpu.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    group = mpu.get_tensor_model_parallel_group()
    targets = torch.tensor([0, 3, 7, 8, 9, 13])
    leaves = [student[:, mine].float().clone().requires_grad_() for _ in range(3)]
    theirs = vocab_parallel_cross_entropy(leaves[0].clone()[:, None], targets[:, None])[:, 0]
    logprobs = -token_logprobs(leaves[1], targets, group=group)
    certain = torch.full_like(student, -1e9).scatter(1, targets[:, None], 0.0)[:, mine].float()
    forward_kl = divergence(leaves[2], certain, kind="forward_kl", group=group)
    for value in (theirs, logprobs, forward_kl):
        value.sum().backward()
    mpu.destroy_model_parallel()
    return {
        "megatron and token_logprobs": _largest([(logprobs, theirs), (leaves[1].grad, leaves[0].grad)]),
        "megatron and forward_kl": _largest([(forward_kl, theirs), (leaves[2].grad, leaves[0].grad)]),
    }


def _largest(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
