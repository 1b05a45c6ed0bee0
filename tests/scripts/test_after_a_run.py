"""What is done with a finished run: sampling, export to Transformers."""

import json
import shutil

import pytest
import torch

import train_gpt2
from scripts import export, sample
from training.finished_run import load_run


@pytest.fixture(scope="module")
def run(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    sizes = ["model.preset=nano", "model.layers=2", "model.heads=2", "model.width=32", "model.context=64"]
    train = ["train.steps=4", "train.batch_tokens=512", "train.device=cpu", "sample.tokens=0", "optim.adamw.lr=0.005"]
    assert train_gpt2.main([f"data.path={tokens}", f"run_dir={path}", *sizes, *train]) == 0
    return path


def test_sample_continues_the_prompt_and_follows_the_seed(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert sample.main([str(run), "--prompt", "The people", "--tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The people") for text in texts)


@pytest.mark.parametrize("arguments", [["nowhere"], ["--temperature=-1"], ["--top-k=0"], ["--tokens=-3"]])
def test_sample_says_what_is_wrong_in_one_sentence(run, capsys, arguments):
    place = [] if arguments == ["nowhere"] else [str(run)]
    assert sample.main([*place, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_an_export_gives_transformers_the_same_logits_and_tokens(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    ours, text, _ = load_run(run)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    sentence = "We the people — of 1790, naïve?"
    ids = text.encode(sentence)
    assert names(sentence)["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4, rtol=0)
    summary = json.loads((run / "summary.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{summary['val_loss']:.4f}" in card and "polar_express" in card
    assert "{" not in card.split("## Configuration")[0] and summary["source"] in card


def test_an_export_never_replaces_a_run(run, capsys):
    assert export.main([str(run), str(run)]) == 2
    assert "holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "{", ""])
def test_a_damaged_run_is_told_in_one_sentence(run, tmp_path, capsys, name, content):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / name).write_text(content)
    assert export.main([str(copy), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and name in error


def test_push_uploads_the_exported_folder(run, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))
            return "address"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert export.main([str(run), str(tmp_path / "out"), "--push", "me/model"]) == 0
    assert calls[0] == ("create", "me/model", True)
    assert {"README.md", "config.json", "model.safetensors", "vocab.json", "merges.txt"} <= set(calls[1][2])


def test_push_that_fails_says_where_the_model_lies(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert export.main([str(run), str(tmp_path / "out"), "--push", "me/model"]) == 2
    assert f"the exported model lies in {tmp_path / 'out'}" in capsys.readouterr().err
