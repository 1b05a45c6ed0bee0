import re
from pathlib import Path

import pytest
import yaml

from training.config import Config, ConfigError
from training.config_files import all_keys, key_help, load_config, to_yaml
from training.same_run import settings

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configs_load_and_their_resolved_form_gives_the_same_run(path, tmp_path):
    config = load_config(path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.name == path.stem


def test_paper_config_holds_the_published_settings():
    config = load_config("configs/paper_gpt2_large_1B.yaml")
    assert config.train.batch_tokens * config.train.steps == pytest.approx(1e9, rel=1e-3)
    assert (config.model.preset, config.model.context) == ("large", 1024)
    assert config.optim.matrix.momentum_form == "sum" and config.optim.adamw.lr is None
    assert config.optim.adamw.betas == (0.95, 0.95) and config.optim.matrix.weight_decay == 0.1


def test_controlled_configs_differ_from_the_published_ones_in_name_only():
    # the published Polar Express line has the spectral scale and decay 0.1; control means giving them to every method
    published, controlled = (load_config(f"configs/paper_gpt2_small_{kind}.yaml") for kind in ("1B", "controlled"))
    assert published.optim == controlled.optim and published.train == controlled.train


def test_overrides_come_last():
    config = load_config("configs/quickstart.yaml", ["optim.matrix.lr=1e-3", "seed=7", "optim.adamw.lr=null"])
    assert (config.optim.matrix.lr, config.seed, config.optim.adamw.lr) == (1e-3, 7, None)


def test_numbers_yaml_reads_as_text_are_numbers_here(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {matrix: {lr: 1e-3}}\n")
    assert load_config(tmp_path / "c.yaml").optim.matrix.lr == 0.001


def test_a_base_lies_below_the_file_that_names_it(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain: {steps: 5, log_every: 2}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {steps: 6}\n")
    config = load_config(tmp_path / "b.yaml")
    assert (config.seed, config.train.steps, config.train.log_every) == (1, 6, 2)


def test_bases_that_go_round_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="base"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.matrix.learning_rate=1", "unknown key optim.matrix.learning_rate"),
        ("optim.matrix.lrr=1", "did you mean optim.matrix.lr"),
        ("lr=1", "did you mean optim.matrix.lr"),
        ("optim.matrix.lr=fast", "optim.matrix.lr.*float.*fast"),
        ("train.steps=7.5", "train.steps.*int.*7.5"),
        ("train.steps=0", "train.steps must be positive, got 0"),
        ("train.save_gradients_at=[0,400]", r"save_gradients_at must name steps from 0 to .* = 399, got \[0, 400\]"),
        ("name=../elsewhere", "name must be that of a folder in logs/, got '../elsewhere'"),
        ("name=/elsewhere", "name must be that of a folder in logs/"),
        ("name=..", "name must be that of a folder in logs/"),
        ("train.save_gradients_at=[-1]", "save_gradients_at must name steps"),
        ("seed=true", "seed.*int"),
        ("optim.matrix.orthogonalizer=polar_expres", "did you mean polar_express"),
        ("optim.matrix.shape_scale=x", "shape_scale.*spectral"),
        ("optim.adamw.betas=[0.9]", "betas.*2 elements"),
        ("train.batch_tokens=1000", "train.batch_tokens=1000 must be a multiple of model.context=256"),
        ("schedule.floor=2", "schedule.floor must lie between 0 and 1"),
        ("train.compile=maybe", r"train.compile: Expected one of .*bool. Got value: maybe$"),
        ("sample.temperature=-1", "sample.temperature"),
        ("sample.top_k=0", "sample.top_k must be positive, got 0"),
        ("sample.top_p=2", "sample.top_p must be at most 1"),
        ("sample.tokens=-5", "sample.tokens"),
        ("optim.grad_clip=0", "optim.grad_clip must be positive"),
        ("optim.grad_clip=nan", "optim.grad_clip.*nan"),
        ("seed=-1", "seed must lie between"),
        ("seed=100000000000000000000000", "seed must lie between"),
        ("model.context=-256", "model.context must be positive, got -256"),
        ("model.context=0", "model.context must be positive"),
        ("model.heads=0", "model.heads must be positive, got 0"),
        ("data.epochs=0", "data.epochs must be positive"),
        ("data.val_tokens=-1", "data.val_tokens must be positive"),
        ("optim.matrix=3", "optim.matrix in the command line is a section.*matrix.lr"),
        ("foo", "key=value"),
    ],
)
def test_mistakes_are_told_in_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("configs/quickstart.yaml", [override])
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value) and "class '" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {matrix: {lrr: 1}}", "unknown key optim.matrix.lrr in .*c.yaml; did you mean optim.matrix.lr"),
        ("- 1", "must hold keys and values, found list"),
        ("a: [", "not valid YAML"),
        ("optim: {rules: [{pattern: x, optimizr: y}]}", "optimizr"),
        ("data: {path: null}", "data.path in .*c.yaml must not be null"),
        ("train: null", "train in .*c.yaml must not be null"),
        ("train: 3", "train in .*c.yaml is a section.*train.steps"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_broken_files_are_told_in_one_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"cannot read configs/quikstart.yaml.*quickstart.yaml"):
        load_config("configs/quikstart.yaml")


def test_every_key_has_help_and_a_default():
    text = key_help()
    plain = yaml.safe_load(to_yaml(Config()))
    for key in all_keys():
        value = plain
        for part in key.split("."):
            value = value[part]
        if not isinstance(value, dict):
            assert re.search(rf"^{re.escape(key)}: .+ = .+\n    \S.{{8}}", text, re.MULTILINE), key


def test_a_rule_younger_than_a_run_has_its_default():
    config = load_config(None)
    older = yaml.safe_load(to_yaml(config))
    for rule in older["optim"]["rules"]:
        del rule["tensors"]
    assert settings(older) == settings(config)
