"""Flags of prompts, answers and their rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from opd.config.schema_flag import flag


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    prompt_data: str | None = flag(None, "JSONL or parquet file of training prompts")
    input_key: str = flag("input", "field with the prompt: a string, or a list of chat messages")
    label_key: str | None = flag(None, "field with the reference answer")
    metadata_key: str = flag("metadata", "field with a dict handed to reward functions")
    apply_chat_template: bool = flag(False, "render the prompt with the tokenizer's chat template")
    apply_chat_template_kwargs: str | None = flag(None, "variables of the chat template, as a JSON object: '{\"enable_thinking\": false}'")
    rollout_shuffle: bool = flag(False, "shuffle the prompts anew in each epoch")
    rollout_max_prompt_len: int | None = flag(None, "skip (and count) prompts longer than this many tokens")

    @property
    def chat_template_variables(self) -> dict[str, Any]:
        return json.loads(self.apply_chat_template_kwargs or "{}")


@dataclass(frozen=True, kw_only=True)
class RolloutFlags:
    rollout_engine: str = flag("torch", "who generates: torch (in this process), sglang (server processes), speculative_kd (in this process; the co-loaded teacher replaces tokens outside its top k) or mixture (in this process; student and teacher together)", choices=("torch", "sglang", "speculative_kd", "mixture"))
    skd_top_k: int = flag(25, "speculative_kd: a proposed token stays when it is among the teacher's k likeliest")
    num_rollout: int | None = flag(None, "training steps of the whole run, a rollout and its updates each, including those before a resume")
    rollout_batch_size: int | None = flag(None, "prompts per rollout")
    n_samples_per_prompt: int = flag(1, "answers per prompt: the group of GRPO")
    rollout_max_response_len: int = flag(1024, "tokens per answer at most")
    rollout_max_context_len: int | None = flag(None, "tokens of prompt and answer at most; the model's limit without it")
    rollout_temperature: float = flag(1.0, "sampling temperature")
    rollout_top_p: float = flag(1.0, "nucleus sampling")
    rollout_top_k: int = flag(-1, "sample from the k likeliest tokens; -1: off")
    rollout_seed: int = flag(42, "seed of prompt order and sampling")
    rollout_stop_token_ids: list[int] | None = flag(None, "token ids that end an answer besides the model's own", nargs="+")
    rollout_max_running_requests: int = flag(256, "answers decoded at the same time, by each SGLang engine")
    rollout_num_gpus: int = flag(1, "devices for SGLang engines")
    rollout_num_gpus_per_engine: int = flag(1, "tensor-parallel size of one SGLang engine")
    sglang_server_timeout: float = flag(1800.0, "seconds to wait for an SGLang server to come up, a teacher's of --opd-teacher-serve too; one that ends meanwhile is noticed at once")
    sglang_request_timeout: float = flag(14400.0, "seconds for an answer of an SGLang engine, waiting in its queue included; after that it counts as aborted")
    sglang_mem_fraction_static: float | None = flag(None, "SGLang's --mem-fraction-static (GPU)")
    sglang_port: int | None = flag(None, "port of the rollout engine; a free one without it")
    sglang_server_args: str | None = flag(None, "further flags of every SGLang engine, in quotes: --sglang-server-args='--cuda-graph-max-bs 64'; slime's --sglang-NAME flags end up here")
    sglang_max_restarts: int = flag(3, "how often a run starts each SGLang engine again after its death, with the current weights, of which a copy is kept for that: in this process's memory, or on disk where they go through disk; 0: never, and no copy")
    sglang_weight_sync: str = flag("auto", "how weights reach the SGLang engines: memory (shared memory), disk (a folder in --output-dir), distributed (broadcast over gloo, NCCL on CUDA) or auto (memory where it can hold them, else disk)", choices=("auto", "memory", "disk", "distributed"))
    use_sglang_router: bool = flag(False, "put sglang-router in front of the SGLang engines; without it each prompt goes to the engine with the fewest requests")
    async_rollout: bool = flag(False, "write the next rollout in the background while this one is trained on: answers come from weights that are a little older")
    async_max_staleness: int = flag(1, "with --async-rollout: rollouts written ahead, hence how many updates old the weights of an answer are at most; 0: the synchronous order")
    async_correction: str = flag("tis", "with --async-rollout or --partial-rollout, what the policy loss does about answers of older weights: tis (weigh each token by the clamped ratio of the trainer's to the writer's probability, as --use-tis) or none", choices=("tis", "none"))
    async_ratio_gate: list[float] | None = flag(None, "LOW HIGH: with --async-rollout or --partial-rollout, leave a token out of the policy loss and its penalty where the trainer's over the writer's probability is outside", nargs="+")
    partial_rollout: bool = flag(False, "set answers aside that are not finished when --rollout-batch-size prompts have all of theirs, and continue them in the next rollout, from what is written: a long answer does not hold up a step")
    partial_rollout_tokens: int | None = flag(None, "with --partial-rollout: tokens that each unfinished answer gets before the rollout looks whether enough prompts are complete; a quarter of --rollout-max-response-len without it")
    over_sampling_batch_size: int | None = flag(None, "with --partial-rollout: prompts in flight in each rollout, of which --rollout-batch-size are learned from and the others go on in the next; a quarter more than --rollout-batch-size without it")
    mask_offpolicy_in_partial_rollout: bool = flag(False, "with --partial-rollout, leave out of every loss what was written in an earlier rollout")
    max_logprob_mismatch: float | None = flag(None, "stop when, after a weight sync, the engine's log-probs of a probe text are off by more than this on average, in nats; 1e-3 without it, 0.1 with --bf16")


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    rm_type: str | None = flag(None, "rule for the task reward, 1 or 0: exact (the whole answer is the label), final_answer (what follows its last # is) or math (its last \\boxed{} or expression means the same)", choices=("exact", "math", "final_answer"))
    custom_rm_path: str | None = flag(None, "a reward of your own: module.function, async (args, sample) -> float")
    custom_reward_post_process_path: str | None = flag(None, "has the last word on a rollout's rewards: module.function, (args, samples) -> (raw rewards, rewards)")
    rm_url: str | None = flag(None, "the teacher server's /generate address for --opd-type sglang; several servers of the same teacher with commas between them, each with *WEIGHT behind it (its share of the load) or without")


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    eval_interval: int | None = flag(None, "evaluate before the first and after every this many rollouts, and at the end")
    eval_prompt_data: list[str] | None = flag(None, "NAME PATH pairs of evaluation sets, or one PATH", nargs="+")
    n_samples_per_eval_prompt: int = flag(1, "answers per evaluation prompt")
    eval_max_response_len: int | None = flag(None, "tokens per answer; as in training without it")
    eval_temperature: float = flag(0.0, "sampling temperature of evaluations; 0: greedy")
    eval_top_p: float = flag(1.0, "nucleus sampling of evaluations")
    eval_top_k: int = flag(-1, "sample from the k likeliest tokens; -1: off")
    eval_input_key: str | None = flag(None, "as --input-key without it")
    eval_label_key: str | None = flag(None, "as --label-key without it")
    skip_eval_before_train: bool = flag(False, "no evaluation before the first rollout")


@dataclass(frozen=True, kw_only=True)
class OffPolicyFlags:
    """Answers from a file (a teacher's, usually) instead of the student's own: warm-up, and a share of each batch."""

    sft_data: str | None = flag(None, "JSONL or parquet file of prompts with answers")
    sft_response_key: str = flag("response", "field of --sft-data with the answer; prompts are read as --prompt-data's")
    sft_steps: int = flag(0, "the first this many of --num-rollout steps learn from --sft-data alone")
    opd_off_policy_fraction: float = flag(0.0, "share of each later batch that comes from --sft-data")
    lambda_sft: float = flag(1.0, "weight of the log-likelihood of --sft-data beside the other losses")


@dataclass(frozen=True, kw_only=True)
class MixtureFlags:
    """--rollout-engine mixture: answers come from q, proportional to student^(1 - a) * teacher^a at every token."""

    mixture_alpha_method: str = flag("kl_symmetry", "how the teacher's weight a is found at every token: kl_symmetry (q is as far from either model, in KL), ess_balance (a = 0.5), ess_weights (its importance weights towards either have the same variance), entropy (by the models' uncertainties) or fixed", choices=("kl_symmetry", "ess_balance", "ess_weights", "entropy", "fixed"))
    mixture_fixed_alpha: float | None = flag(None, "a itself, with --mixture-alpha-method fixed: 0 is the student alone, 1 the teacher alone")
    mixture_alpha_scale: list[float] | None = flag(None, "START END: the weight in use is min(1, scale * a), and scale goes from START (first rollout) to END in equal steps; 2 is nearly the teacher alone, 0 the student alone; 1 throughout without it", nargs="+")
    mixture_schedule_steps: int | None = flag(None, "rollouts until --mixture-alpha-scale is at END; all of --num-rollout without it")
    mixture_teacher_load: str | None = flag(None, "Hugging Face folder of the teacher that helps to write; --opd-teacher-load without it, or the student itself with --opd-teacher-self live")
    mixture_teacher_prompt_key: str | None = flag(None, "field with the prompt that this teacher reads")
    mixture_teacher_prompt_template: str | None = flag(None, "the prompt that this teacher reads, made from {prompt}, {label} and the row's other fields; without any of these three flags that of --opd-teacher-prompt-*, else the student's")
    mixture_teacher_system_prompt: str | None = flag(None, "system message that this teacher reads, with --apply-chat-template")
    mixture_decoding: str = flag("speculative", "speculative (the student drafts, the teacher judges several tokens at once) or lockstep (both models at every token); the same distribution", choices=("speculative", "lockstep"))
    mixture_draft_tokens: int | None = flag(None, "tokens per draft of speculative decoding; chosen by measured acceptance and cost without it")
