"""slime's rollout hook: what it reads from the flags, what it refuses, and groups that could not be written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd.data.tokenizer import load_tokenizer
from opd.errors import EngineError, UserError
from opd.plugins.slime_mixture import MixtureSettings, _whole_groups, tokenizer_of
from tests.unit.plugins.slime_objects import DataSource, Sample, slime_args

pytestmark = pytest.mark.unit

STUDENT = Path(__file__).parents[3] / "examples" / "on_policy_distillation" / "tiny_task" / "student"


def args(**changes: Any) -> Any:
    given = {
        "hf_checkpoint": str(STUDENT),
        "sglang_router_ip": "10.0.0.1",
        "sglang_router_port": 3000,
        "rm_url": "http://10.0.0.2:13141/generate",
    }
    return slime_args(**given | changes)


def settings(**changes: Any) -> MixtureSettings:
    return MixtureSettings.of(args(**changes), load_tokenizer(STUDENT))


def test_the_run_and_its_config_file_say_what_is_drawn() -> None:
    found = settings(mixture_alpha_scale=[2.0, 0.0], mixture_fixed_alpha=0.5, mixture_alpha_method="fixed")
    assert (found.student_url, found.teacher_url) == ("http://10.0.0.1:3000", "http://10.0.0.2:13141/generate")
    assert [found.schedule.at(i) for i in range(4)] == [2.0, 1.0, 0.0, 0.0]  # over --num-rollout 3
    assert (found.mixture.method, found.mixture.fixed_alpha) == ("fixed", 0.5)
    assert found.params.max_new_tokens == 8
    assert found.params.stop_token_ids == (load_tokenizer(STUDENT).eos_token_id,)
    assert found.context == 512


def test_code_in_the_students_folder_does_not_run_unasked(tmp_path: Path) -> None:
    folder, ran = tmp_path / "student", tmp_path / "ran"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(STUDENT) / name, folder / name)
    settings_of = json.loads((folder / "tokenizer_config.json").read_text())
    settings_of["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of))
    code = f"from transformers import PreTrainedTokenizerFast as Own\nopen({str(ran)!r}, 'w').close()\n"
    (folder / "own.py").write_text(code)
    tokenizer_of(args(hf_checkpoint=str(folder)))
    assert not ran.exists()


def test_further_stop_ids_and_another_teacher() -> None:
    found = settings(rollout_stop_token_ids=[7], mixture_teacher_url="http://10.0.0.3:1", rollout_max_context_len=64)
    assert 7 in found.params.stop_token_ids
    assert (found.teacher_url, found.context) == ("http://10.0.0.3:1", 64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_tis": False}, "Add --use-tis"),
        ({"use_rollout_logprobs": True}, "the engine's log-probs are the mixture's"),
        ({"mixture_alpha_method": "half"}, "`alpha_method='half'` is unknown"),
        ({"rm_url": None}, r"need one teacher's address \(got none\)"),
        ({"rm_url": "http://a:1/generate,http://b:1/generate"}, "need one teacher's address"),
        ({"partial_rollout": True}, "`--partial-rollout` does not go with answers from a mixture"),
        ({"rollout_stop": ["\n"]}, "give --rollout-stop-token-ids"),
        ({"dynamic_sampling_filter_path": "a.b"}, "every group that is finished is trained on"),
    ],
)
def test_what_would_learn_something_else_is_refused_before_a_server_is_asked(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        settings(**changes)


def test_a_group_that_failed_is_replaced_by_another() -> None:
    run = args(rollout_batch_size=3)
    source = DataSource(run, [Sample(prompt="1+1=")])
    written: list[int] = []

    def write(groups: list[list[Sample]]) -> None:
        for sample in (sample for group in groups for sample in group):
            written.append(sample.index)
            failed = sample.index == 2  # of the second group
            sample.status = Sample.Status.ABORTED if failed else Sample.Status.COMPLETED
            sample.response_length = 4

    groups = _whole_groups(run, source, write)
    assert [[sample.index for sample in group] for group in groups] == [[0, 1], [4, 5], [6, 7]]
    assert written == list(range(8))


def test_a_rollout_that_cannot_be_filled_ends() -> None:
    run = args(rollout_batch_size=2)
    source = DataSource(run, [Sample(prompt="1+1=")])
    with pytest.raises(EngineError, match="of 4 groups of answers only 0 could be written, and a rollout needs 2"):
        _whole_groups(run, source, lambda groups: None)  # every answer stays empty
