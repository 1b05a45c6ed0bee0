"""What the README says is there is there, and its example runs."""

import re
from pathlib import Path

import torch

README = Path("README.md").read_text(encoding="utf-8")
ROOMS = ("data", "model", "optim", "training")


def test_the_optimizer_example_runs_and_moves_every_parameter():
    code = re.search(r"## Only the optimizer.*?```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    model, before = names["model"], [p.clone() for p in names["model"].parameters()]
    model(torch.arange(1000)).square().sum().backward()
    for optimizer in names["optimizers"]:
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_file_map_names_every_file_of_the_rooms_and_none_that_is_not_there():
    named = re.findall(r"^\| `([^`]+)` \|", README.split("## Files")[1], re.MULTILINE)
    assert [name for name in named if not Path(name).exists()] == []
    files = {str(path) for room in ROOMS for path in Path(room).glob("*.py") if path.name != "__init__.py"}
    assert files - set(named) == set()


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and [link for link in links if not Path(link).exists()] == []
