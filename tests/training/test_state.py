"""Weights, optimizer state and random numbers through a checkpoint, to the bit and to another number of ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim import Muon
from training import checkpoints
from training.checkpoints import Checkpoint, CheckpointError, Checkpoints
from training.config import CheckpointConfig
from training.runtime import Runtime
from training.state import gather_state, options, restore_state

CPU = torch.device("cpu")


def runtime(rank: int = 0, ranks: int = 1) -> Runtime:
    return Runtime(CPU, rank, ranks, None, False)


def build(seed: int = 0, width: int = 6, **muon) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
    """Five matrices of two shapes for Muon, one of them three, and the rest for AdamW in two groups."""
    torch.manual_seed(seed)
    layers = [nn.Linear(width, width) for _ in range(3)] + [nn.Linear(width, 3 * width), nn.Linear(3 * width, 4)]
    model = nn.Sequential(*layers)
    named = dict(model.named_parameters())
    matrices = [(name, p) for name, p in named.items() if p.ndim == 2 and name != "3.weight"]
    groups = [{"params": matrices}, {"params": [("3.weight", named["3.weight"])], "blocks": 3}]
    biases = [p for p in named.values() if p.ndim == 1]
    adamw = [{"params": biases[:2]}, {"params": biases[2:], "weight_decay": 0.1}]
    return model, {"muon": Muon(groups, lr=0.1, **muon), "adamw": torch.optim.AdamW(adamw, lr=0.01)}


def train(model: nn.Module, optimizers: dict, steps: int) -> None:
    """Steps on random gradients, of which the generator decides."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        for optimizer in optimizers.values():
            optimizer.step()


def save(folder: Path, model: nn.Module, optimizers: dict, rt: Runtime) -> Path:
    content = {"step": 3, "val_loss": None, "options": options(optimizers)}
    writer = Checkpoints(folder, CheckpointConfig(), rt)
    writer.save(content, gather_state(model, optimizers, rt), lambda: None)
    writer.finish()
    return folder / "checkpoints" / "step_00000003"


def everything(model: nn.Module, optimizers: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_state(model, optimizers, runtime()).items()}


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_run_goes_on_to_the_same_bits(state_dtype, tmp_path):
    model, optimizers = build(state_dtype=state_dtype)
    train(model, optimizers, 3)
    path = save(tmp_path, model, optimizers, runtime())
    saved = everything(model, optimizers)
    train(model, optimizers, 3)

    again, theirs = build(seed=1, state_dtype=state_dtype)
    restore_state(again, theirs, checkpoints.read(path), runtime())
    assert_same_bits(everything(again, theirs), saved)
    assert {t.dtype for name, t in saved.items() if "optimizer.muon" in name} == {state_dtype}
    train(again, theirs, 3)
    assert_same_bits(everything(again, theirs), everything(model, optimizers))


def test_the_number_of_steps_comes_back_and_other_options_are_the_configurations(tmp_path):
    model, optimizers = build()
    train(model, optimizers, 3)
    optimizers["adamw"].param_groups[1]["lr"] = 0.125
    path = save(tmp_path, model, optimizers, runtime())
    model, optimizers = build(seed=1)
    restore_state(model, optimizers, checkpoints.read(path), runtime())
    assert [group["step"] for group in optimizers["muon"].param_groups] == [3, 3]
    assert [group["blocks"] for group in optimizers["muon"].param_groups] == [1, 3]
    assert [group["lr"] for group in optimizers["adamw"].param_groups] == [0.01, 0.01]


def test_before_the_first_step_there_is_nothing_of_adamw(tmp_path):
    model, optimizers = build()
    path = save(tmp_path, model, optimizers, runtime())
    train(model, optimizers, 2)
    again, theirs = build(seed=1)
    restore_state(again, theirs, checkpoints.read(path), runtime())
    train(again, theirs, 2)
    assert_same_bits(everything(again, theirs), everything(model, optimizers))


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def forged(path: Path, without: str = "", **content) -> Checkpoint:
    """The checkpoint without one tensor, or with other content."""

    class Forged(Checkpoint):
        def tensors(self, wanted):
            return {name: t for name, t in super().tensors(wanted).items() if name != without}

    found = checkpoints.read(path)
    return Forged(found.path, found.content | content, found.files)


@pytest.mark.parametrize(
    "name",
    [
        "model.1.weight",
        "optimizer.muon.1.weight/momentum_buffer",
        "optimizer.adamw.1.bias/exp_avg",
        "optimizer.adamw.1.bias/step",
    ],
)
def test_a_missing_tensor_is_named(name, tmp_path):
    model, optimizers = build()
    train(model, optimizers, 3)
    path = save(tmp_path, model, optimizers, runtime())
    with pytest.raises(CheckpointError, match=r"step_00000003 is not of this model: .*1\.(weight|bias)"):
        restore_state(*build(), forged(path, without=name), runtime())


@pytest.mark.parametrize(
    "changed",
    [{}, {"muon": []}, {"muon": [{}, {}], "adamw": [{}]}, {"muon": 3, "adamw": 3}, {"muon": [{}, {"blocks": 1}]}],
    ids=str,
)
def test_options_of_another_form_are_refused(changed, tmp_path):
    model, optimizers = build()
    path = save(tmp_path, model, optimizers, runtime())
    whole = json.loads((path / "manifest.json").read_text())["content"]["options"]
    with pytest.raises(CheckpointError, match="is not of this model"):
        restore_state(*build(), forged(path, options=whole | changed if changed else {}), runtime())


def test_another_model_is_refused_in_one_line(tmp_path):
    model, optimizers = build()
    train(model, optimizers, 3)
    path = save(tmp_path, model, optimizers, runtime())
    with pytest.raises(CheckpointError, match="is not of this model") as caught:
        restore_state(*build(width=4), checkpoints.read(path), runtime())
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Another number of ranks


def worker(rank: int, folder: Path) -> None:
    """Two ranks save after 3 steps; then they take up what one process saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, optimizers = build()
    train(model, optimizers, 3)
    save(folder / "two", model, optimizers, runtime(rank, 2))
    model, optimizers = build(seed=1)
    restore_state(model, optimizers, checkpoints.read(folder / "one/checkpoints/step_00000003"), runtime(rank, 2))
    if rank == 1:  # it was not there, so it keeps its own random numbers, which are another's
        torch.set_rng_state(torch.load(folder / "random.pt"))
    train(model, optimizers, 2)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process and two saved, and where two got to from what one had saved."""
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizers = build()
    train(model, optimizers, 3)
    save(folder / "one", model, optimizers, runtime())
    torch.save(torch.get_rng_state(), folder / "random.pt")
    mp.spawn(worker, args=(folder,), nprocs=2)
    train(model, optimizers, 2)
    torch.save(model.state_dict(), folder / "one.pt")
    return folder


def test_two_ranks_hold_each_part_once(folder):
    path = folder / "two/checkpoints/step_00000003"
    found = checkpoints.read(path)
    assert found.files == ("rank_0.safetensors", "rank_1.safetensors")
    names = [[], []]
    for rank, file in enumerate(found.files):
        part = Checkpoint(path, found.content, (file,))
        names[rank] = list(part.tensors(lambda name: not name.startswith("random.")))
    assert not set(names[0]) & set(names[1])
    owned = [[name for name in part if name.startswith("optimizer.muon.")] for part in names]
    assert all(owned) and sum(map(len, owned)) == 5 and set(names[1]) == set(owned[1])


def test_what_two_ranks_saved_loads_on_one(folder):
    model, optimizers = build(seed=1)
    restore_state(model, optimizers, checkpoints.read(folder / "two/checkpoints/step_00000003"), runtime())
    ours = everything(model, optimizers)
    one = checkpoints.read(folder / "one/checkpoints/step_00000003").tensors(bool)
    assert ours.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_what_one_saved_loads_on_two_ranks(folder):
    one, first, second = (torch.load(folder / f"{name}.pt") for name in ("one", "0", "1"))
    for name, weights in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=0, atol=1e-6)
