"""Configurations survive the way to JSON and back, and say what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from re2tal.backbones import BackboneConfig
from re2tal.config import (
    DataConfig,
    RecognitionConfig,
    RunConfig,
    build_detector,
    flatten,
    load_config,
    load_run,
    save_config,
    to_json,
)
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.options import names_with
from re2tal.recipes import RECIPES, find_recipe
from re2tal.rewire import RewiringConfig
from re2tal.rewire.config import SAVING

FILES = Path(__file__).parent / "config_files"
"""Written by save_config before a file named the kinds that it holds."""


def test_every_recipe_survives_its_json(tmp_path):
    for name in RECIPES:
        recipe = with_shards(find_recipe(name), tmp_path)
        save_config(tmp_path / "config.json", recipe)
        assert load_run(tmp_path / "config.json") == recipe, name


def with_shards(run, shards):
    return replace(run, data=replace(run.data, shards=shards))


def test_a_file_has_absolute_paths_and_names_from_a_hub_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for weights, written in (
        ("w.safetensors", tmp_path / "w.safetensors"),
        ("folder", tmp_path / "folder"),
        ("facebook/vjepa2-vitl-fpc64-256", "facebook/vjepa2-vitl-fpc64-256"),
        (None, None),
    ):
        save_config(tmp_path / "config.json", RunConfig(backbone=BackboneConfig(weights=weights)))
        run = load_config(tmp_path / "config.json")
        assert run.data.shards == tmp_path / "shards"
        assert run.backbone.weights == (None if written is None else str(written))


def test_a_recognizers_run_is_told_from_a_detectors(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"task": "recognition", "recognizer": {"dropout": 0.1}}')
    default = RecognitionConfig()
    assert load_run(path) == replace(default, recognizer=replace(default.recognizer, dropout=0.1))
    with pytest.raises(ValueError, match=r"config.json is of a recognizer, .*--backbone.weights .*model.safetensors"):
        load_config(path)
    run = with_shards(RunConfig(), tmp_path)
    save_config(path, run)
    assert load_run(path) == load_config(path) == run


@pytest.mark.parametrize(
    "windowing", [ResizeWhole(num_frames=600), Slide(num_frames=600)], ids=lambda one: type(one).__name__
)
def test_what_a_union_held_is_what_comes_back(windowing, tmp_path):
    config = RunConfig(data=DataConfig(clips=ClipConfig(windowing=windowing)))
    save_config(tmp_path / "config.json", config)
    assert load_config(tmp_path / "config.json").data.clips.windowing == windowing


@pytest.mark.parametrize("name", ["demo", "activitynet_re2swin_tiny", "demo_clips"])
def test_a_file_written_before_kinds_were_named_loads_as_it_did(name):
    recipe = find_recipe(name)
    # Recipes ran branches whole then, drew no augmentation, and shuffled fewer videos together; a run goes on as it
    # began.
    backbone = replace(recipe.backbone, chunk_mebibytes=None)
    data = replace(recipe.data, clips=replace(recipe.data.clips, augmentation="none", shuffle_span=1024))
    # Nor did they say for how many clips a step they were made.
    optimizer = replace(recipe.optimizer, made_for_clips=None)
    # And all reported the last weights.
    training = replace(recipe.training, keep_best=False, evaluate_from_epoch=0)
    recipe = replace(recipe, backbone=backbone, data=data, optimizer=optimizer, training=training)
    assert load_run(FILES / f"{name}.json") == recipe


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"kind": "resize_whole"}, ResizeWhole()),
        ({"kind": "slide", "num_frames": 600}, Slide(num_frames=600)),
        ({"overlap": 0.25, "num_frames": 600}, Slide(num_frames=600, overlap=0.25)),
        ({"shortest_action": 0.0}, ResizeWhole(shortest_action=0.0)),
    ],
)
def test_a_tag_or_keys_of_one_kind_alone_say_which_kind_is_meant(values, meant, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"clips": {"windowing": values}}}))
    assert load_config(tmp_path / "config.json").data.clips.windowing == meant


def test_a_file_names_the_kinds_and_what_identifies_a_run_does_not(tmp_path):
    save_config(tmp_path / "config.json", RunConfig())
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["data"]["clips"]["windowing"].pop("kind") == "slide"
    assert document["localizer"]["name"] == "actionformer"
    assert document == to_json(RunConfig())


def test_what_a_file_does_not_mention_keeps_its_default(tmp_path):
    (tmp_path / "config.json").write_text('{"optimizer": {"weight_decay": 0.1}}')
    default = RunConfig()
    assert load_config(tmp_path / "config.json") == replace(
        default, optimizer=replace(default.optimizer, weight_decay=0.1)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"optimzer": {}}', "config.json: unknown key optimzer; did you mean optimizer"),
        ('{"engine": {"batchsize": 2}}', "unknown key engine.batchsize; did you mean engine.batch_size"),
        ('{"engine": {"batch_size": "many"}}', "engine.batch_size is 'many': .*integer"),
        ('{"engine": {"precision": "fp8"}}', "engine.precision is 'fp8': .*'fp32', 'bf16' or 'fp16'"),
        ('{"engine": {"batch_size": 0}}', "engine.batch_size is 0; give 1 or more"),
        ('{"engine": {"gradient_clipping": -1}}', "engine.gradient_clipping is -1.0; give 0 or more"),
        ('{"engine": {"timeout_minutes": 0}}', "engine.timeout_minutes is 0.0; give a positive number"),
        ('{"backbone": {"beta": 2}}', r"config.json: backbone.beta is 2.0; it lies in \[0, 1\]"),
        ('{"backbone": {"unit": "block", "known": 1}}', "config.json: backbone.known is 1, but whole blocks, unit"),
        ('{"backbone": {"offload": true, "recompute": false}}', "backbone.offload is set with recompute False"),
        ('{"backbone": {"known": 2, "recompute": false}}', "backbone.known is 2, but backbone.recompute is off, which"),
        ('{"backbone": {"grid": -1}}', "backbone.grid is -1.0; give a positive step"),
        ('{"backbone": {"drop_path": 1}}', "backbone.drop_path is 1.0; give a rate of at least 0 and below 1"),
        ('{"backbone": {"frames_per_step": 0}}', "backbone.frames_per_step is 0; give at least 1, or None"),
        ('{"training": {"epochs": 0}}', "training.epochs is 0"),
        ('{"training": {"average_decay": 1.0}}', "training.average_decay is 1.0; give a number from 0 to below 1"),
        ('{"optimizer": {"learning_rate": -1}}', "optimizer.learning_rate is -1.0"),
        ('{"schedule": {"warmup_epochs": -1}}', "schedule.warmup_epochs is -1.0"),
        ('{"schedule": {"warmup_epochs": "inf"}}', "schedule.warmup_epochs is inf; give 0 or more"),
        ('{"engine": {"gradient_clipping": "inf"}}', "engine.gradient_clipping is inf; give 0 or more"),
        ('{"training": {"epochs": true}}', "config.json: training.epochs is true; if 1 is meant, write 1$"),
        ('{"data": {"shards": ""}}', "config.json: data.shards is an empty path; name a file or a folder$"),
        ('{"evaluation": {"blocked_videos": ""}}', "evaluation.blocked_videos is an empty path"),
        ('{"training": {"epochs": "7"}}', 'training.epochs is "7"; if 7 is meant, write 7$'),
        ('{"backbone": {"rewired": "off"}}', 'backbone.rewired is "off"; if False is meant, write false$'),
        ('{"backbone": {"rewired": 0}}', "backbone.rewired is 0; if False is meant, write false$"),
        ('{"data": {"clips": {"crop_area": [0.5, true]}}}', r"data.clips.crop_area.1 is true; if 1.0 is meant"),
        (
            '{"data": {"clips": {"windowing": {"kind": "slide", "num_frames": "600"}}}}',
            'config.json: data.clips.windowing.num_frames is "600"; if 600 is meant, write 600$',
        ),
        ('{"num_steps": 2000}', "num_steps is 2000 and data.clips.windowing.num_frames 1024"),
        (
            '{"localizer": {"name": "actionformer", "position_encoding": true, "max_num_steps": 256}}',
            "max_num_steps = 256; raise the latter",
        ),
        ('{"name": "../elsewhere"}', "give one plain name"),
        (
            '{"task": "recognition", "annealing": {"epochs": 2}, "backbone": {"rewired": false}}',
            "annealing.epochs is 2.*, but the backbone is not rewired",
        ),
        ('{"task": "segmentation"}', "task is 'segmentation'; known: .'localization', 'recognition'"),
        ('{"task": "recognition", "num_steps": 4}', "unknown key num_steps"),
        ('{"task": "recognition", "data": {}}', "data.clips.windowing is Slide, which may cut an action off"),
        (
            '{"data": {"clips": {"windowing": {"num_views": 4}}}}',
            "is Trimmed, whose clips say what happens but not when",
        ),
        (
            '{"data": {"clips": {"windowing": {"num_frames": 64}}}}',
            "the keys of data.clips.windowing, num_frames, could be those of resize_whole or slide or trimmed; give "
            "data.clips.windowing.kind, one of resize_whole, slide, trimmed$",
        ),
        (
            '{"data": {"clips": {"windowing": {"overlap": 0.5, "shortest_action": 0.1}}}}',
            "overlap, shortest_action, are of no one kind of data.clips.windowing; give data.clips.windowing.kind",
        ),
        (
            '{"data": {"clips": {"windowing": {"overlp": 0.5, "num_frames": 64}}}}',
            "config.json: unknown key data.clips.windowing.overlp; did you mean data.clips.windowing.overlap.$",
        ),
        (
            '{"data": {"clips": {"windowing": {"kind": "resize_whole", "num_frame": 64}}}}',
            "config.json: unknown key data.clips.windowing.num_frame; did you mean data.clips.windowing.num_frames.$",
        ),
        (
            '{"data": {"clips": {"windowing": {"kind": "slide", "num_views": 4}}}}',
            "config.json: unknown key data.clips.windowing.num_views; ",
        ),
        (
            '{"data": {"clips": {"windowing": {"kind": "slides"}}}}',
            "data.clips.windowing.kind is 'slides'; known: resize_whole, slide, trimmed$",
        ),
        ('{"data": {"clips": {"windowing": "slide"}}}', "data.clips.windowing is 'slide'; give an object, its kind"),
        (
            '{"data": {"clips": {"windowing": {"kind": "slide", "num_frames": "few"}}}}',
            "config.json: data.clips.windowing.num_frames is 'few': [^;]*$",
        ),
        (
            '{"localizer": {"name": "actionformer", "channels": 15}}',
            "config.json: localizer.channels=15 must be a multiple of num_heads=4",
        ),
        ('{"localizer": {"name": "vsgn", "first_stride": 3}}', "config.json: localizer.first_stride=3 must be even"),
        ('{"evaluation": {"tiou_thresholds": []}}', r"evaluation.tiou_thresholds is \(\); give at least one"),
        ('{"evaluation": {"tiou_thresholds": [30]}}', r"evaluation.tiou_thresholds is \(30.0,\); give .* in \(0, 1\]"),
        ('{"localizer": {"name": "afsd"}}', "localizer.name is 'afsd'; known: actionformer, .*vsgn$"),
        ('{"localizer": {"channels": 64}}', "could be those of actionformer or .*vsgn; give localizer.name, one of"),
        (
            '{"localizer": {"name": "vsgn", "anchor_scale": [1]}}',
            "config.json: unknown key localizer.anchor_scale; did you mean localizer.anchor_scales.$",
        ),
        ('{"localizer": {"name": "actionformer", "num_heads": 0}}', "localizer.num_heads is 0; give 1 or more$"),
        ('{"data": {"clips": {"colour_jitter": -1}}}', "data.clips.colour_jitter is -1.0; give a number from 0 to 1$"),
        ('{"training": {"seed": -1}}', "config.json: training.seed is -1; give 0 or more$"),
        ('{"traning": {"epochs": 3}}', "config.json: unknown key traning; did you mean training.$"),
        ('{"task": "recognition", "localizer": {"name": "vsgn"}}', "unknown key localizer"),
        ('{"name": 1', "not usable JSON"),
    ],
)
def test_a_faulty_file_names_key_value_and_remedy(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize("run", [RunConfig(), RecognitionConfig()], ids=lambda run: run.task)
def test_what_may_change_on_resume(run):
    scores = {name for name, _ in flatten(to_json(run)) if name.startswith(("suppression.", "evaluation."))}
    assert set(names_with(run, "resumable")) == scores | {
        "data.validation_subset",
        "optimizer.learning_rate",
        "optimizer.backbone_learning_rate",
        "schedule.shape",
        "schedule.warmup_epochs",
        "schedule.final_factor",
        "training.epochs",
        "name",
        "backbone.monitor_every",
        "backbone.offload",
        "backbone.keep_nonresidual",
        "backbone.stored",
        "data.shards",
        "data.decoder",
        "data.clips.workers",
        "data.clips.prefetch",
        "data.clips.timeout_seconds",
        "optimizer.made_for_clips",
        "engine.memory_budget_gb",
        "engine.timeout_minutes",
        "training.log_every_steps",
        "training.evaluate_every_epochs",
        "training.evaluate_from_epoch",
        "training.keep_best",
        "training.checkpoint_every_steps",
        "training.keep_checkpoints",
        "training.max_non_finite",
        "training.trackers",
    }


@pytest.mark.parametrize("run", [RunConfig(), RecognitionConfig()], ids=lambda run: run.task)
def test_a_plan_depends_on_what_a_step_is_made_of_but_not_on_who_feeds_it_or_waits(run):
    parts = ("task", "num_steps", "data.clips.", "backbone.", "localizer.", "recognizer.", "optimizer.", "engine.")
    of_parts = {name for name, _ in flatten(to_json(run)) if name.startswith(parts)}
    assert set(names_with(run, "planned")) == of_parts - {
        "backbone.monitor_every",
        "backbone.offload",
        "backbone.keep_nonresidual",
        "backbone.stored",
        "backbone.weights",
        "data.clips.augmentation",
        "data.clips.workers",
        "data.clips.prefetch",
        "data.clips.timeout_seconds",
        "optimizer.made_for_clips",
        "optimizer.follow_batch",
        "engine.timeout_minutes",
    }


def test_a_backbone_is_rewired_as_rewiring_alone_would_do_it():
    assert BackboneConfig().rewiring() == RewiringConfig()
    changed = RewiringConfig(merge="extrapolate", segment=2, stored=1, monitor_every=None)
    assert BackboneConfig(merge="extrapolate", segment=2, stored=1, monitor_every=None).rewiring() == changed
    with pytest.raises(ValueError, match=r"^backbone.unit is 'layer'; known: \['block', 'branch'\]"):
        BackboneConfig(unit="layer")
    with pytest.raises(ValueError, match=r"^backbone: int32 states count steps of a grid"):
        BackboneConfig(states="int32", grid=None)


def test_the_wiring_of_a_backbone_and_what_only_a_rewired_one_has():
    assert set(names_with(BackboneConfig(), "wiring")) == {"unit", "merge", "segment", "beta"}
    assert set(names_with(BackboneConfig(), "of_rewired")) == {
        "beta",
        "segment",
        "chunk_mebibytes",
        "known",
        "keep_nonresidual",
        "offload",
        "saved_attention",
        "states",
        "stored",
    }


def test_settings_of_memory_are_of_rewired_backbones_and_not_of_the_wiring():
    config = BackboneConfig()
    assert set(SAVING) < set(names_with(config, "of_rewired")) - set(names_with(config, "wiring"))


def test_an_unknown_recipe_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"'thumos14_swintiny'; nearest: \['thumos14_swin_tiny', 'thumos14_re2"):
        find_recipe("thumos14_swintiny")


def test_flattened_keys_are_those_of_the_command_line():
    flat = dict(flatten(to_json(find_recipe("demo"))))
    assert flat["data.clips.windowing.num_frames"] == find_recipe("demo").data.clips.windowing.num_frames
    assert json.loads(json.dumps(flat)) == flat


def test_the_demo_detector_has_the_classes_it_is_built_for():
    detector = build_detector(find_recipe("demo"), ["a", "b", "c"])
    assert detector.localizer.classes == ("a", "b", "c")
    assert detector.num_steps == find_recipe("demo").num_steps
