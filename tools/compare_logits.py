"""Are the logits of a torch_dist checkpoint in Megatron those of the Hugging Face model in transformers?

    python tools/compare_logits.py --hf-checkpoint Qwen3-0.6B --torch-dist Qwen3-0.6B_torch_dist

Both run in fp32 on the CPU, on one text. Exits 0 when no logit differs by more than --tolerance, else 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opd.config.flags import exit_with_error  # noqa: E402
from opd.errors import UserError  # noqa: E402
from tools.arguments import ToolParser  # noqa: E402

if TYPE_CHECKING:
    import torch

TEXT = (
    "Tom has 18 apples, gives 4 away, loses 6. How many?\n"
    "Water boils at 100 degrees; that is 212 in Fahrenheit.\n"
    'def area(radius):\n    return 3.14159 * radius ** 2  # "π r²"\n'
    "Le café est fermé, mais la boulangerie d'à côté ouvre à six heures."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    num_tokens: int
    max_difference: float  # of any logit at any position
    max_logprob_difference: float  # nats, of the token that follows
    same_argmax: int  # positions where both expect the same next token


def main(argv: list[str]) -> None:
    try:
        options = _parse(argv)
        comparison = compare(options.hf_checkpoint, options.torch_dist, text=options.text, step=options.step)
    except (UserError, OSError) as error:
        exit_with_error(error)
    is_close = comparison.max_difference <= options.tolerance
    print(
        f"{comparison.num_tokens} tokens: largest difference of a logit {comparison.max_difference:.2e}, of a log-prob "
        f"{comparison.max_logprob_difference:.2e} nats; same likeliest token at {comparison.same_argmax} positions. "
        f"{'Within' if is_close else 'NOT within'} {options.tolerance:g}."
    )
    sys.exit(0 if is_close else 1)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser("compare_logits.py", __doc__)
    add, folder = parser.add_argument, "FOLDER"
    add("--hf-checkpoint", type=Path, required=True, metavar=folder, help="Hugging Face folder: weights and tokenizer")
    add("--torch-dist", type=Path, required=True, metavar=folder, help="torch_dist folder")
    add("--step", type=int, metavar="N", help="step of the torch_dist checkpoint (the latest)")
    add("--tolerance", type=float, default=1e-3, metavar="X", help="largest difference of a logit that passes (0.001)")
    add("--text", default=TEXT, metavar="TEXT", help="text to compare on (four lines of prose and code)")
    return parser.parse_args(argv)


def compare(hf_checkpoint: Path, torch_dist: Path, *, text: str = TEXT, step: int | None = None) -> Comparison:
    """Runs one model after the other, so that memory holds one at a time.

    Raises:
        UserError: a folder or checkpoint that cannot be used.
    """
    from opd.megatron_backend import device

    rank_device = device.install()  # before megatron is imported
    import torch

    from opd.data.tokenizer import load_tokenizer

    token_ids_1L = torch.tensor([load_tokenizer(hf_checkpoint)(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected_LV = _transformers_logits(hf_checkpoint, token_ids_1L)
        gc.collect()
        found_LV = _megatron_logits(hf_checkpoint, torch_dist, step, token_ids_1L.to(rank_device), rank_device)
        return _differences(expected_LV, found_LV.cpu(), token_ids_1L[0])


def _transformers_logits(folder: Path, token_ids_1L: torch.Tensor) -> torch.Tensor:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(input_ids=token_ids_1L).logits[0]


def _megatron_logits(
    hf_checkpoint: Path, torch_dist: Path, step: int | None, token_ids_1L: torch.Tensor, rank_device: torch.device
) -> torch.Tensor:
    import torch

    from opd.megatron_backend import checkpoint, groups, hf_bridge

    sizes = groups.ParallelSizes()
    config = hf_bridge.read_hf_config(hf_checkpoint)
    groups.init_distributed(sizes, device=rank_device)
    try:
        model = hf_bridge.build_model(config, sizes, dtype=torch.float32)
        checkpoint.load(torch_dist, model=model, step=step)
        positions_1L = torch.arange(token_ids_1L.size(1), device=rank_device)[None]
        logits_LV = model.eval()(token_ids_1L, positions_1L, None)[0]
        return logits_LV[:, : config.vocab_size].float()
    finally:
        groups.shutdown()


def _differences(expected_LV: torch.Tensor, found_LV: torch.Tensor, token_ids_L: torch.Tensor) -> Comparison:
    next_L1 = token_ids_L[1:, None]
    expected_logprobs = expected_LV.log_softmax(-1)[:-1].gather(-1, next_L1)
    found_logprobs = found_LV.log_softmax(-1)[:-1].gather(-1, next_L1)
    return Comparison(
        num_tokens=len(token_ids_L),
        max_difference=(expected_LV - found_LV).abs().max().item(),
        max_logprob_difference=(expected_logprobs - found_logprobs).abs().max().item(),
        same_argmax=int((expected_LV.argmax(-1) == found_LV.argmax(-1)).sum()),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
