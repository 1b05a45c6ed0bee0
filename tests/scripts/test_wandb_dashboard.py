"""The workspace as it would be sent: its panels name keys that runs really have."""

import dataclasses
import json
import sys

import pytest

from scripts import wandb_dashboard
from training.config import Config, flatten

workspaces = pytest.importorskip("wandb_workspaces.workspaces")


def sent(group=None):
    return json.loads(wandb_dashboard.build("me", "mine", group)._to_model().model_dump_json())


def test_runs_are_grouped_by_method_and_learning_rate_and_filtered_by_sweep():
    keys = flatten(dataclasses.asdict(Config()))
    (runs,) = sent("quickstart")["spec"]["section"]["run_sets"]
    method, *grouped = [(key["section"], key["name"].replace(".value", "", 1)) for key in runs["grouping"]]
    assert method == ("run", "jobType")
    assert {section for section, _ in grouped} == {"config"} and {name for _, name in grouped} <= keys.keys()
    assert grouped[-1][1] == "optim.matrix.lr"
    (chosen,) = runs["filters"]["filters"]
    assert (chosen["key"]["name"], chosen["op"], chosen["value"]) == ("group", "=", "quickstart")
    assert not sent()["spec"]["section"]["run_sets"][0]["filters"]["filters"]


def test_loss_is_drawn_against_the_learning_rate_on_a_logarithmic_axis():
    losses, updates = sent()["spec"]["section"]["panel_bank_config"]["sections"]
    scatter = losses["panels"][0]["config"]
    assert (scatter["x_axis"], scatter["y_axis"]) == ("config:optim.value.matrix.lr", "summary:val_loss")
    assert scatter["x_axis_log_scale"]
    accessors = [column["accessor"] for column in losses["panels"][3]["config"]["columns"]]
    assert (accessors[0], accessors[-1]) == ("run:jobType", "summary:val_loss")
    assert {tuple(p["config"]["metrics"]) for p in losses["panels"][1:3]} == {("val.loss",)}
    assert all(p["config"]["use_metric_regex"] for p in updates["panels"])


def test_what_wandb_raises_and_its_absence_are_one_sentence(monkeypatch, capsys):
    def refuse(self):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(workspaces.Workspace, "save", refuse)
    assert wandb_dashboard.main(["--entity", "me"]) == 1
    assert capsys.readouterr().err == "error: the workspace was not saved: no network; is `wandb login` done?\n"
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert wandb_dashboard.main(["--entity", "me"]) == 2
    assert "needs wandb-workspaces; install it" in capsys.readouterr().err
