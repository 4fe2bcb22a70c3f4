"""Flags of what a run shows, plans and takes over from slime."""

from __future__ import annotations

from dataclasses import dataclass

from opd.config.schema_flag import flag


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    output_dir: str | None = flag(None, "folder for report.html, metrics.jsonl, curves.png, tensorboard/ and samples/")
    dry_run: bool = flag(False, "parse, validate, print the plan and exit; starts nothing and loads no weights")
    use_tensorboard: bool = flag(True, "write TensorBoard event files under OUTPUT_DIR/tensorboard")
    use_wandb: bool = flag(False, "log to Weights & Biases (needs the wandb package)")
    wandb_project: str | None = flag(None, "W&B project")
    wandb_group: str | None = flag(None, "W&B group")
    wandb_mode: str = flag("online", "W&B mode", choices=("online", "offline", "disabled"))
    prometheus_port: int | None = flag(None, "serve the metrics to Prometheus at http://127.0.0.1:PORT/metrics while the run lasts")
    prometheus_host: str | None = flag(None, "address on which --prometheus-port listens; 127.0.0.1 without it, 0.0.0.0 for every network")
    num_saved_samples: int = flag(8, "samples per rollout written to OUTPUT_DIR/samples/ with their per-token values")
    num_saved_alternatives: int = flag(5, "likeliest tokens of the student and of its teacher recorded at each token of a saved sample; 0: none")
    trust_remote_code: bool = flag(False, "run code that comes with a Hugging Face folder")
    distributed_timeout_minutes: int = flag(10, "time-out of collectives; waiting for a rollout has none")


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What --dry-run assumes for the step time and the memory that it prints; a run itself reads none of them."""

    plan_device: str | None = flag(None, "device of the step time: cpu is one core. Without it h100 with --bf16, else cpu", choices=("a100", "h100", "h200", "b200", "cpu"))
    plan_prompt_len: int | None = flag(None, "tokens of a prompt; --rollout-max-prompt-len without it, else 512")
    plan_response_len: int | None = flag(None, "tokens of an average answer; --rollout-max-response-len without it")
    plan_compute_share: float | None = flag(None, "share of the device's peak that training and scoring reach; 0.4 on a GPU without it")
    plan_bandwidth_share: float | None = flag(None, "share of the device's memory bandwidth that decoding reaches; 0.6 on a GPU without it")
    plan_network_gbps: float = flag(200.0, "gigabits per second that one rank sends to another machine")


@dataclass(frozen=True, kw_only=True)
class SlimeFlags:
    """For launch scripts written for slime: docs/from_slime.md."""

    slime_defaults: bool = flag(False, "what is not given is as in slime: SGLang engines, 8 GPUs per machine, bf16, sharded optimizer states, Megatron's AdamW, evaluation sampled like the rollout, --output-dir SAVE/opd")
    translated_flags: list[str] | None = flag(None, "filled in from flags of slime's that are read in another way or not at all; each gives a warning", nargs="+")
