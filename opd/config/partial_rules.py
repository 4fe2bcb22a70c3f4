"""Rules about answers that are set aside and continued in the next rollout."""

from __future__ import annotations

from collections.abc import Iterator

from opd.config.flags import flag_text
from opd.config.queries import given
from opd.config.schema import Config

NEEDS_PARTIAL = ("partial_rollout_tokens", "over_sampling_batch_size", "mask_offpolicy_in_partial_rollout")


def partial_rules(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not rollout.partial_rollout:
        for name, value in given(rollout).items():
            if name in NEEDS_PARTIAL:
                yield f"{flag_text(name, value)} needs `--partial-rollout`. Add it, or drop the flag."
        return
    tokens, longest, prompts = config.partial_tokens, rollout.rollout_max_response_len, rollout.rollout_batch_size
    if tokens is not None and tokens >= longest:
        yield (
            f"{flag_text('partial_rollout_tokens', tokens)} must be less than "
            f"{flag_text('rollout_max_response_len', longest)}: otherwise every answer is finished before the rollout "
            "looks. Lower it, or drop `--partial-rollout`."
        )
    if prompts is not None and config.prompts_set_aside < 1:
        yield (
            f"{flag_text('over_sampling_batch_size', rollout.over_sampling_batch_size)} must be greater than "
            f"{flag_text('rollout_batch_size', prompts)}: that many prompts are learned from in each rollout, so none "
            "could be set aside. Raise it, or leave it out for a quarter more."
        )
    if prompts is not None and rollout.mask_offpolicy_in_partial_rollout and config.prompts_set_aside >= prompts:
        yield (
            f"`--mask-offpolicy-in-partial-rollout` with "
            f"{flag_text('over_sampling_batch_size', prompts + config.prompts_set_aside)}: {config.prompts_set_aside} "
            f"prompts go on in the next rollout, so all {prompts} of a batch may have been written before it, and the "
            "step would learn nothing. Give less than twice `--rollout-batch-size`, or drop the mask."
        )
