"""The ZeRO file against the run: filled, checked, contradicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from re2tal.training.config import EngineConfig
from re2tal.training.zero_file import resolve_deepspeed_config

RUN = EngineConfig(batch_size=2, gradient_accumulation=3, gradient_clipping=0.5, precision="bf16")
ZERO1 = {"zero_optimization": {"stage": 1}}
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_filled_from_the_run(path):
    settings = resolve_deepspeed_config(path, RUN, world_size=4)
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 24
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is True
    assert settings["fp16"]["enabled"] is False
    assert "auto" not in json.dumps(settings)
    # With offload, torch's AdamW steps on the CPU: DeepSpeed's own would need a compiler.
    assert ("offload" in path.stem) == (settings.get("zero_force_ds_cpu_optimizer") is False)


def test_the_shipped_files_are_the_five_promised():
    assert [path.stem for path in SHIPPED] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_what_the_file_leaves_out_is_filled_too(tmp_path):
    settings = resolve_deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": 1}}), RUN, world_size=1)
    assert settings["train_batch_size"] == 6
    assert settings["bf16"] == {"enabled": True}


def test_no_offload_may_be_written_as_null(tmp_path):
    zero = {"stage": 2, "offload_optimizer": None, "offload_param": None}
    settings = resolve_deepspeed_config(write(tmp_path, {"zero_optimization": zero}), RUN, world_size=2)
    assert settings["zero_optimization"] == {"stage": 2}
    assert "zero_force_ds_cpu_optimizer" not in settings


def test_a_literal_that_agrees_with_the_run_stays(tmp_path):
    path = write(tmp_path, {"zero_optimization": {"stage": 2}, "train_batch_size": 12, "gradient_clipping": 0.5})
    assert resolve_deepspeed_config(path, RUN, world_size=2)["train_batch_size"] == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            "ds.json: gradient_clipping is 1.0, but the run has engine.gradient_clipping = 0.5",
        ),
        ({"train_batch_size": 8}, "train_batch_size is 8, .* x ranks = 2 x 3 x 2 = 12; make them agree, or write"),
        ({"gradient_accumulation_steps": 1}, "the run has engine.gradient_accumulation = 3"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, but the run has engine.precision = 'bf16'"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1, but"),
        ({"bf16": True}, "bf16 is True; it must be an object"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        (
            {"zero_optimization": {"stage": 2, "reduce_buket_size": 1}},
            "unknown key 'zero_optimization.reduce_buket_size'; did you mean 'zero_optimization.reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "'zero_optimization.offload_param.devise'; did you mean 'zero_optimization.offload_param.device'",
        ),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer'; the run's own config decides it"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "stage 0 .* use stage 1"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            'reduce_bucket_size is "auto", but a run does not',
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, '"nvme", which is not supported'),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}},
            'ds.json: zero_optimization.reduce_bucket_size is "large": Input should be a valid integer.*; correct it',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "ds.json: zero_optimization.offload_optimizer.device is \"gpu\": Input should be .*'cpu'.*; correct it",
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": "yes"}},
            "ds.json: zero_optimization.round_robin_gradients is true: .* a wrong model is exported.*; leave the key",
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'ds.json: .* old name; write "offload_optimizer": '),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
            'is an old name; write "offload_param": {"device',
        ),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "legacy_stage1 is true: DeepSpeed has no such"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "elastic_checkpoint is true: .* resumes; "),
        ({"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}}, "is false: .* from rounded weights"),
        ({**ZERO1, "bf16": {"check_grad_overflow": False}}, "check_grad_overflow is false: steps that are not finite"),
        ({**ZERO1, "bf16": {"bf16_master_weights_and_grads": True}}, "grads is true: .* moving average .* 16 bits"),
        ({"zero_optimization": None}, "ds.json: zero_optimization is None; it must be an object"),
        ({"bf16": None}, "bf16 is None; it must be an object"),
        ([], "holds a list; a DeepSpeed config is one JSON object"),
    ],
)
def test_a_contradiction_names_file_key_value_and_remedy(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resolve_deepspeed_config(write(tmp_path, content), RUN, world_size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_clipping": NaN}', "NaN"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' appears twice"),
        ('{"zero_optimization": ', "not usable JSON"),
    ],
)
def test_a_file_that_is_not_strict_json_is_refused(text, message, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve_deepspeed_config(tmp_path / "ds.json", RUN, world_size=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zero9\.json"):
        resolve_deepspeed_config(tmp_path / "zero9.json", RUN, world_size=1)


def write(folder: Path, content: object) -> Path:
    (folder / "ds.json").write_text(json.dumps(content))
    return folder / "ds.json"
