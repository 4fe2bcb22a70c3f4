"""Names: the seed manual's OPD flags, slime's and Megatron's, and how values come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opd.config import parse_config, warnings
from opd.config.flags import ConfigError, flag_text, parse_flags
from opd.config.schema import Config

MEGATRON_MODE = (
    "--use-opd --opd-type megatron --opd-kl-coef 1.0 --opd-teacher-load /ckpt/teacher --opd-teacher-ckpt-step 5"
)
SGLANG_MODE = (
    "--use-opd --opd-type sglang --opd-kl-coef 1.0 "
    "--custom-rm-path slime.rollout.on_policy_distillation.reward_func "
    "--custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards "
    "--rm-url http://10.0.0.1:13141/generate"
)
SLIME = (
    "--hf-checkpoint hf --ref-load ref --load run --save run --save-interval 20 "
    "--prompt-data p.jsonl --input-key prompt --label-key label --apply-chat-template --rollout-shuffle "
    "--num-rollout 300 --rollout-batch-size 16 --n-samples-per-prompt 4 --rollout-max-response-len 16384 "
    "--rollout-temperature 1 --rollout-top-p 0.9 --rollout-top-k 50 --rollout-seed 7 --global-batch-size 64 "
    "--rm-type math --eval-interval 20 --eval-prompt-data aime a.jsonl math500 m.jsonl --n-samples-per-eval-prompt 16 "
    "--eval-max-response-len 16384 --eval-top-p 0.7 "
    "--advantage-estimator grpo --normalize-advantages --eps-clip 0.2 --eps-clip-high 0.28 "
    "--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 "
    "--clip-grad 1.0 "
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1 --context-parallel-size 1 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    "--use-dynamic-batch-size --max-tokens-per-gpu 16384 --use-distributed-optimizer "
    "--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 "
    "--attention-backend flash --actor-num-nodes 1 --actor-num-gpus-per-node 2 "
    "--rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.4 --use-wandb --wandb-project p --wandb-group g"
)
MEGATRON_MODEL = (
    "--swiglu --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 "
    "--group-query-attention "
    "--num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm "
    "--norm-epsilon 1e-6 "
    "--rotary-base 1000000 --vocab-size 151936 --kv-channels 128 --qk-layernorm --untie-embeddings-and-output-weights"
)


def test_the_manuals_megatron_mode() -> None:
    opd = parse_flags(MEGATRON_MODE.split()).opd
    assert opd.use_opd
    assert (opd.opd_type, opd.opd_kl_coef) == ("megatron", 1.0)
    assert (opd.opd_teacher_load, opd.opd_teacher_ckpt_step) == ("/ckpt/teacher", 5)


def test_the_manuals_sglang_mode_with_slimes_own_paths(workplace: Path, command: Callable[..., list[str]]) -> None:
    config = parse_config(command("sglang", SGLANG_MODE))
    assert config.opd.opd_type == "sglang"
    assert config.reward.rm_url == "http://10.0.0.1:13141/generate"
    assert config.reward.custom_rm_path == "slime.rollout.on_policy_distillation.reward_func"


def test_slimes_names_and_values() -> None:
    config = parse_flags(SLIME.split())
    assert config.samples_per_rollout == config.global_batch_size == 64
    assert config.eval_sets == [("aime", "a.jsonl"), ("math500", "m.jsonl")]
    assert config.algorithm.eps_clip_high == 0.28
    assert config.parallel.world_size == 2
    assert config.rollout.rollout_top_k == 50
    assert config.output.wandb_group == "g"


def test_megatrons_model_flags() -> None:
    model = parse_flags(MEGATRON_MODEL.split()).model
    assert (model.num_layers, model.num_query_groups, model.rotary_base) == (36, 8, 1_000_000.0)
    assert model.qk_layernorm and model.untie_embeddings_and_output_weights


def test_one_path_is_an_evaluation_set_named_eval() -> None:
    assert parse_flags(["--eval-prompt-data", "held_out.jsonl"]).eval_sets == [("eval", "held_out.jsonl")]


def test_flags_that_default_to_true_can_be_turned_off() -> None:
    assert Config().output.use_tensorboard
    assert not parse_flags(["--no-use-tensorboard"]).output.use_tensorboard


def test_abbreviations_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown flag `--use-op`. Did you mean `--use-opd`"):
        parse_flags(["--use-op"])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("use_opd", True, "`--use-opd`"),
        ("use_tensorboard", False, "`--no-use-tensorboard`"),
        ("rollout_top_p", 2.0, "`--rollout-top-p=2.0`"),
        ("eval_prompt_data", ["a", "b"], "`--eval-prompt-data a b`"),
    ],
)
def test_how_messages_write_a_flag(name: str, value: object, text: str) -> None:
    assert flag_text(name, value) == text


@pytest.mark.parametrize(
    ("base", "add", "start"),
    [
        ("sglang", "--rollout-temperature 0.8", "the reverse KL is measured at temperature 1 on both sides"),
        (
            "megatron",
            "--rollout-top-p 0.9",
            "`--rollout-top-p=0.9` `--rollout-top-k=-1`: answers come from a truncated",
        ),
        (
            "megatron",
            "--rm-type exact --label-key label --n-samples-per-prompt 1",
            "the task reward is measured but teaches nothing",
        ),
        ("megatron", "--rm-type exact --label-key label --opd-kl-coef 0", "`--opd-kl-coef=0.0`: the teacher is asked"),
        ("sglang", "--opd-skip-teacher-selftest", "`--opd-skip-teacher-selftest`: a teacher with another tokenizer"),
        ("grpo", "--lr-warmup-iters 10", "`--lr-warmup-iters=10`: the run has 10 optimizer steps"),
        ("grpo", "--min-lr 1e-7", "`--min-lr` and `--lr-decay-iters` have no effect"),
        ("grpo", "--use-distributed-optimizer", "`--use-distributed-optimizer` shards over data-parallel ranks"),
        ("grpo", "--hf-checkpoint config_only --dry-run", "`--hf-checkpoint=config_only` holds no weights"),
        ("grpo", "--rollout-num-gpus 2", "`--rollout-num-gpus` and `--rollout-num-gpus-per-engine` are for"),
    ],
)
def test_warnings(workplace: Path, command: Callable[..., list[str]], base: str, add: str, start: str) -> None:
    quiet = warnings(parse_config(command(base, "--save run")))
    found = warnings(parse_config(command(base, f"--save run {add}")))
    assert quiet == []
    assert len(found) == 1
    assert found[0].startswith(start)


def test_a_run_that_saves_nothing_is_told_so(workplace: Path, command: Callable[..., list[str]]) -> None:
    assert warnings(parse_config(command("grpo"))) == ["no `--save`: the trained weights are lost when the run ends."]
