"""What is done with a trained model, of a finished run or a checkpoint: sampling, export to Transformers."""

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
    keep = ["train.eval_every=2", "checkpoint.every=1", "checkpoint.keep_every=1", "checkpoint.keep_best=true"]
    assert train_gpt2.main([f"data.path={tokens}", f"run_dir={path}", *sizes, *train, *keep]) == 0
    return path


@pytest.fixture
def unfinished(run, tmp_path):
    """The same run before it came to its end."""
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    for name in ("summary.json", "model.safetensors"):
        (copy / name).unlink()
    return copy


def evaluated(run) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "val"}


def one_error(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


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
    one_error(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_the_best_of_this_run_is_its_last_and_has_its_weights(run):
    losses = evaluated(run)
    assert min(losses, key=losses.__getitem__) == 4
    assert (run / "checkpoints" / "best").resolve().name == "step_00000004"
    (best, *_), (last, *_), (other, *_) = (
        load_run(place) for place in (run / "checkpoints" / "best", run, run / "checkpoints" / "step_00000003")
    )
    assert all(torch.equal(best.state_dict()[name], tensor) for name, tensor in last.state_dict().items())
    assert not torch.equal(best.wte.weight, other.wte.weight)


@pytest.mark.parametrize("name", ["step_00000002", "latest", "best"])
def test_text_from_a_checkpoint_of_a_run_that_is_not_finished(name, unfinished, capsys):
    assert sample.main([str(unfinished / "checkpoints" / name), "--prompt", "The people", "--tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith("The people")


def test_an_unfinished_run_names_its_newest_checkpoint(unfinished, capsys):
    assert sample.main([str(unfinished)]) == 2
    newest = unfinished / "checkpoints" / "latest"
    assert f"has no model.safetensors: the run was not completed; its newest checkpoint is {newest}" in one_error(
        capsys
    )


@pytest.mark.parametrize("program", [sample, export])
@pytest.mark.parametrize(
    "place",
    ["..", "config.yaml", "checkpoints/step_00000009", "checkpoints/step_00000002/manifest.json"],
)
def test_what_is_neither_run_nor_checkpoint(place, program, run, tmp_path, capsys):
    assert program.main([str(run / place), *([str(tmp_path / "out")] if program is export else [])]) == 2
    expected = (
        f"error: {run / place} is neither a run directory nor a checkpoint in one (RUN/checkpoints/step_N, latest"
    )
    assert one_error(capsys).startswith(expected)


def test_a_damaged_checkpoint_is_told_in_one_sentence(unfinished, capsys):
    (unfinished / "checkpoints" / "step_00000002" / "rank_0.safetensors").write_bytes(b"")
    assert sample.main([str(unfinished / "checkpoints" / "step_00000002")]) == 2
    assert "step_00000002 is damaged: rank_0.safetensors has 0 bytes" in one_error(capsys)


def test_weights_of_another_model_are_told_in_one_sentence(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("width: 32", "width: 16"))
    for place in (copy, copy / "checkpoints" / "best"):
        assert sample.main([str(place)]) == 2
        assert "does not hold the weights of its config: " in one_error(capsys)


@pytest.mark.parametrize("step", [2, 3])
def test_the_card_of_a_checkpoint_has_its_own_numbers(step, unfinished, tmp_path):
    pytest.importorskip("transformers")
    assert export.main([str(unfinished / "checkpoints" / f"step_0000000{step}"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text().split("## Configuration")[0]
    loss = f"{evaluated(unfinished)[2]:.4f}" if step == 2 else "not evaluated"
    rows = {cells[1].strip(): cells[2].strip() for line in card.splitlines() if len(cells := line.split("|")) > 3}
    assert rows["validation loss (nats per token)"] == loss and rows["steps"] == f"{step} of 4"
    assert f"on {step * 512:,} tokens (test)" in card and "{" not in card


# ---------------------------------------------------------------------------------------------------------------------
# Export


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
    assert name in one_error(capsys)


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
