"""Where a run begins, by what is there already."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from training import resume, run_directory
from training.checkpoints import CheckpointError, Checkpoints, split
from training.config import CheckpointConfig, Config, ConfigError
from training.config_files import load_config
from training.resume import FinishedError, begin, how_to_go_on, resumed_config, take_up
from training.runtime import Runtime
from training.same_run import settings

RT = Runtime(torch.device("cpu"), 0, 1, None, False)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """In an empty folder, and without the archive of the source, which is not the point here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "_write_source", lambda path: None)


@pytest.fixture
def config(tiny):
    """A configuration with changes; run_dir is null unless it is one of them."""
    return lambda *changes: load_config(None, [*tiny, "run_dir=null", *changes])


def start(config: Config, place: str | None = resume.AUTO) -> tuple[Path, int | None]:
    """The run directory and the step of the checkpoint it goes on from, with the lock given back."""
    with ExitStack() as held:
        beginning = begin(config, place, RT, held)
        take_up(beginning, RT)
    return beginning.run, beginning.checkpoint and beginning.checkpoint.step


def checkpoint(run: Path, config: Config, *steps: int) -> None:
    writer = Checkpoints(run, CheckpointConfig(keep_last=9), RT)
    for step in steps:
        writer.save({"step": step, "val_loss": None, "settings": settings(config)}, {"x": torch.ones(2)}, bool)
        writer.finish()


def finish(run: Path, status: str) -> None:
    run_directory.write_json(run / "summary.json", {"status": status})


# ---------------------------------------------------------------------------------------------------------------------
# auto


@pytest.mark.parametrize("named", [False, True])
def test_auto_begins_goes_on_and_repeats_nothing(named, config, tmp_path):
    ours = config(*([f"run_dir={tmp_path / 'here'}"] if named else []))
    run, step = start(ours)
    assert step is None and (run / "config.yaml").exists()
    assert run == tmp_path / "here" if named else run.parent == Path("logs/tiny")
    assert start(ours) == (run, None)  # cut off before its first checkpoint
    checkpoint(run, ours, 3, 6)
    assert start(ours) == (run, 6)
    finish(run, "interrupted")
    assert start(ours) == (run, 6)
    assert not (run / "summary.json").exists() and len((run / "resumed.jsonl").read_text().splitlines()) == 3
    for status in ("completed", "diverged"):
        finish(run, status)
        with pytest.raises(FinishedError) as caught:
            start(ours)
        assert (caught.value.run, caught.value.status) == (run, status)


def test_auto_takes_the_latest_run_with_these_settings(config, monkeypatch):
    moments = iter(f"20260101-00000{i}" for i in range(9))
    monkeypatch.setattr(run_directory.time, "strftime", lambda form: next(moments) if "%Y%m%d" in form else "")
    ours, other = config("train.log_every=3"), config("seed=1")
    first, second = start(ours, None)[0], start(ours, None)[0]
    third, step = start(other)
    assert len({first, second, third}) == 3 and step is None
    assert start(config())[0] == second  # what does not touch the result may differ
    (second / "config.yaml").write_text("seed: [")
    assert start(ours)[0] == first


def test_auto_with_a_folder_that_holds_no_run_begins_one_there(config, tmp_path):
    """As a process leaves it that was killed while it made the run directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "environment.json").write_text("{")
    assert start(config(f"run_dir={tmp_path / 'here'}")) == (tmp_path / "here", None)


def test_without_resume_a_run_is_never_gone_on_with(config, tmp_path):
    ours = config(f"run_dir={tmp_path / 'here'}")
    assert start(ours, None) == (tmp_path / "here", None)
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume"):
        start(ours, None)


# ---------------------------------------------------------------------------------------------------------------------
# A place


def test_a_run_and_a_checkpoint_in_it(config, tmp_path):
    ours = config()
    run = start(ours)[0]
    checkpoint(run, ours, 3, 6, 9)
    folder = run / "checkpoints"
    assert start(ours, str(run)) == (run, 9)
    assert start(ours, str(folder / "latest")) == (run, 9)
    assert start(ours, str(folder / "step_00000006") + "/") == (run, 6)
    assert start(ours, str(run)) == (run, 6)  # the later one is set aside
    assert (folder / "step_00000009.aside").is_dir()
    with pytest.raises(
        CheckpointError,
        match=r"there is no checkpoint .*step_00000099; --resume .* goes on from the newest that is whole",
    ):
        start(ours, str(folder / "step_00000099"))


def test_a_place_that_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config.yaml"):
        resumed_config(str(tmp_path), [])


def test_the_configuration_of_a_run_that_was_moved(config, tmp_path):
    run = start(config())[0]
    moved = shutil.move(run, tmp_path / "moved")
    assert resumed_config(str(moved), []).run_dir == str(moved)
    assert resumed_config(str(moved / "checkpoints" / "latest"), ["seed=4"]).seed == 4
    assert start(resumed_config(str(moved), []), str(moved)) == (moved, None)


@pytest.mark.parametrize("place", ["run", "run/", "run/checkpoints", "run/checkpoints/step_00000003/"])
def test_split(place):
    run, chosen = split(place)
    assert run == Path("run") and chosen == (Path("run/checkpoints/step_00000003") if "step" in place else None)


TWO_NODES = {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "3"}
LAUNCHES = {
    "python": (1, {}),
    "torchrun --standalone --nproc_per_node=8": (8, {}),
    "torchrun --standalone --nproc_per_node=8 --max-restarts=2": (8, {"TORCHELASTIC_MAX_RESTARTS": "2"}),
    "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --nproc_per_node=4 --max-restarts=3": (
        8,
        TWO_NODES,
    ),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_how_to_go_on(launch, monkeypatch):
    ranks, environment = LAUNCHES[launch]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert how_to_go_on(Path("logs/a"), ranks) == f"{launch} train_gpt2.py --resume logs/a"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is only told


def test_another_configuration_is_listed_against_the_checkpoint(config):
    run = start(config())[0]
    checkpoint(run, config("seed=3"), 3)
    with pytest.raises(ConfigError, match=r"step_00000003 has another configuration \(seed: 3, not 0\)"):
        start(config(), str(run))


def test_without_a_checkpoint_it_is_listed_against_the_run(config):
    run = start(config())[0]
    expected = r"logs/tiny/[^/]* has another configuration \(optim.grad_clip: 1.0, not None; seed: 0, not 5\)"
    with pytest.raises(ConfigError, match=expected):
        start(config("seed=5", "optim.grad_clip=null"), str(run))


def test_other_portions_are_told(config, capsys):
    run = start(config())[0]
    assert start(config("train.micro_batch=2"), str(run)) == (run, None)
    assert "goes on with train.micro_batch=2; it had 8: equal up to rounding" in capsys.readouterr().err


def test_other_tokens_are_refused(config, tokens, tmp_path):
    copy = shutil.copytree(tokens, tmp_path / "tokens")
    ours = config(f"data.path={copy}")
    run = start(ours)[0]
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes() + b" ")
    with pytest.raises(
        ConfigError, match=r"tokens holds other tokens than those that the run began with: .*data_manifest.json"
    ):
        start(ours, str(run))


def test_a_directory_in_use_is_refused_and_free_afterwards(config, tmp_path):
    ours = config(f"run_dir={tmp_path / 'here'}")
    for place in (None, resume.AUTO, str(tmp_path / "here")):
        with run_directory.locked(tmp_path / "here"), pytest.raises(ConfigError, match="in use by process"):
            start(ours, place)
    assert start(ours) == (tmp_path / "here", None)


def test_what_is_refused_leaves_everything_as_it_was(config):
    run = start(config())[0]
    checkpoint(run, config(), 3, 6)
    (run / "checkpoints" / "step_00000009.part").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError):
        start(config("seed=1"), str(run / "checkpoints" / "step_00000003"))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert (run / "checkpoints" / "step_00000009.part").is_dir()


def test_a_run_that_diverged_goes_on_from_a_checkpoint_that_is_named(config):
    ours = config()
    run, _ = start(ours)
    checkpoint(run, ours, 3, 6)
    finish(run, "diverged")
    with pytest.raises(FinishedError):
        start(ours, str(run))
    assert start(ours, str(run / "checkpoints" / "step_00000003")) == (run, 3)
    assert (run / "checkpoints" / "step_00000006.aside").is_dir()


def test_nothing_is_set_aside_before_the_checkpoint_is_known_to_fit(config):
    ours = config()
    run, _ = start(ours)
    checkpoint(run, ours, 3, 6)
    with ExitStack() as held:
        begin(ours, str(run / "checkpoints" / "step_00000003"), RT, held)
    assert (run / "checkpoints" / "step_00000006").is_dir() and not (run / "resumed.jsonl").exists()


def test_a_run_goes_on_in_no_other_directory_but_from_a_checkpoint(config):
    run, _ = start(config())
    with pytest.raises(ConfigError, match=r"goes on in that directory; leave run_dir out, or name the checkpoint to"):
        resumed_config(str(run), ["run_dir=elsewhere"])


def test_the_command_that_goes_on_can_be_pasted():
    assert how_to_go_on(Path("logs/a b"), 1).endswith("--resume 'logs/a b'")


def test_a_damaged_archive_of_the_source_is_only_told(config, capsys):
    ours = config()
    run, _ = start(ours)
    (run / "source.zip").write_bytes(b"not a zip")
    assert start(ours) == (run, None)
    assert "whether the code has changed is not known" in capsys.readouterr().err


def test_another_torch_or_number_of_ranks_is_told(config, capsys):
    ours = config()
    run, _ = start(ours)
    writer = Checkpoints(run, CheckpointConfig(), RT)
    content = {"step": 3, "val_loss": None, "settings": settings(ours), "torch": "1.0", "world_size": 4}
    writer.save(content, {"x": torch.ones(2)}, bool)
    writer.finish()
    assert start(ours) == (run, 3)
    told = capsys.readouterr().err
    assert "it had 1.0: equal up to rounding" in told and "with world_size=1; it had 4" in told


# ---------------------------------------------------------------------------------------------------------------------
# Branches


def branch(place: Path, changes: list[str]) -> tuple[Path, int]:
    """The new run directory and the step it begins at, with the lock given back."""
    with ExitStack() as held:
        run, found, resumed = begin(resumed_config(str(place), changes), str(place), RT, held)
    assert not resumed
    return run, found.step


def test_a_branch_has_a_directory_and_settings_of_its_own_and_names_its_parent(config, capsys, tmp_path):
    ours, new = config(), tmp_path / "new"
    run, _ = start(ours)
    checkpoint(run, ours, 3, 6)
    finish(run, "diverged")
    (run / "metrics.jsonl").write_text("one\n")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    place = run / "checkpoints" / "step_00000003"
    assert branch(place, [f"run_dir={new}", "optim.matrix.lr=0.5"]) == (new, 3)
    assert (
        capsys.readouterr().err == f"warning: the run branches off from {place} with optim.matrix.lr: 0.02, not 0.5\n"
    )
    assert run_directory.parent_of(new) == str(place.resolve()) and run_directory.parent_of(run) is None
    assert (new / "metrics.jsonl").read_text() == "one\n"
    assert load_config(new / "config.yaml").optim.matrix.lr == 0.5
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    assert any("went on from" in note for note in run_directory.redo_notes(new))


def test_a_branch_into_a_run_or_with_other_tokens_is_refused(config, tokens, tmp_path):
    ours = config()
    (run, _), (other, _) = start(ours), start(config("seed=1"))
    checkpoint(run, ours, 3)
    place = run / "checkpoints" / "step_00000003"
    with pytest.raises(ConfigError, match="already holds a run"):
        branch(place, [f"run_dir={other}"])
    copy = shutil.copytree(tokens, tmp_path / "tokens")
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes() + b" ")
    with pytest.raises(ConfigError, match="tokens holds other tokens than those that the run began with"):
        branch(place, [f"run_dir={tmp_path / 'new'}", f"data.path={copy}"])
    assert not (tmp_path / "new").exists()


def test_torchruns_restart_goes_on_from_the_newest_and_not_from_the_checkpoint_named(config, monkeypatch, tmp_path):
    ours, new = config(), tmp_path / "new"
    run, _ = start(ours)
    checkpoint(run, ours, 3)
    place, changes = run / "checkpoints" / "step_00000003", [f"run_dir={new}", "seed=5"]
    assert branch(place, changes) == (new, 3)
    branched = resumed_config(str(place), changes)
    checkpoint(new, branched, 3, 6)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(branched, str(place)) == (new, 6)


def test_auto_takes_no_branch_for_a_run_of_its_settings(config):
    ours = config("seed=7")
    run, _ = start(config())
    checkpoint(run, config(), 3)
    branch(run / "checkpoints" / "step_00000003", ["run_dir=logs/tiny/99999999-branch", "seed=7"])
    assert start(ours)[0].name != "99999999-branch"


@pytest.mark.parametrize(
    ("key", "then"), [("torch", "2.1.0"), ("world_size", 8), ("device", "H100"), ("autocast", "torch.bfloat16")]
)
def test_other_surroundings_are_told(key, then, config, capsys):
    ours = config()
    run, _ = start(ours)
    writer = Checkpoints(run, CheckpointConfig(), RT)
    content = {"step": 3, "val_loss": None, "settings": settings(ours), **resume.surroundings(RT), key: then}
    writer.save(content, {"x": torch.ones(2)}, bool)
    writer.finish()
    start(ours)
    now = resume.surroundings(RT)[key]
    assert (
        capsys.readouterr().err == f"warning: the run goes on with {key}={now}; it had {then}: equal up to rounding\n"
    )
