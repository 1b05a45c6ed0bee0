"""The trees of the models in model/: they compute what the models do, and their radii keep to the recipe."""

import math

import pytest
import torch

import training.modular_trees  # noqa: F401 (modular_tree knows the models from here)
from model.gpt2 import GPT2, MLP, Attention, GPT2Config
from optim.modular import ModularDual, atom_tensors, modular_tree
from optim.modules import Linear
from tests.optim.test_modular import steepest, vectors


def gpt2(**sizes):
    return GPT2(GPT2Config(**{"vocab_size": 31, "context": 8, "layers": 2, "heads": 2, "width": 16, **sizes}))


def test_the_published_head_starts_far_outside_of_the_unit_ball():
    """Rows are 0.02 chi long, where chi is about N(sqrt(width), 1/2), and the longest of 512 is 3.03 deviations out."""
    for width, measured in ((64, 1.6), (128, 3.0)):
        model = gpt2(vocab_size=512, width=width)
        head = modular_tree(model).atoms[-1]
        norm = head.length(model.wte.weight.detach()).item()
        assert norm == pytest.approx(measured, abs=0.05)
        assert norm == pytest.approx(0.02 * math.sqrt(width) * (math.sqrt(width) + 3.03 / math.sqrt(2)), rel=0.03)


def tokens(seed=0, length=8):
    return torch.randint(31, (3, length), generator=torch.Generator().manual_seed(seed))


def radii(model):
    tree = modular_tree(model)
    return dict(zip([atom.name for atom in tree.atoms], tree.radii(), strict=True))


@pytest.mark.parametrize("sizes", [{}, {"layers": 3, "heads": 4}, {"vocab_multiple": 8, "width": 12}])
def test_the_tree_computes_what_gpt2_does(sizes):
    model = gpt2(**sizes)
    for i, p in enumerate(model.parameters()):  # biases and gains too
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    tree = modular_tree(model)
    weights = atom_tensors(tree, dict(model.named_parameters()))
    for x in (tokens(), tokens(length=5)):
        torch.testing.assert_close(tree(x, weights)[..., :31], model(x), rtol=1e-4, atol=1e-5)


def test_every_parameter_has_atoms_and_the_step_is_shared_as_in_the_recipe():
    model = gpt2(layers=3)
    tree = modular_tree(model)
    assert {atom.name.split("[")[0] for atom in tree.atoms} == {name for name, _ in model.named_parameters()}
    masses = {}
    for atom in tree.atoms[2:-1]:
        part = atom.name.split(".")[0]
        masses[part] = masses.get(part, 0.0) + atom.mass
    first, second, last = tree.atoms[0], tree.atoms[1], tree.atoms[-1]
    assert (first.name, second.name, last.name) == ("wte.weight", "wpe.weight", "wte.weight")
    assert first.mass + second.mass == pytest.approx(1)
    assert masses["h"] == pytest.approx(5)
    assert masses["ln_f"] + last.mass == pytest.approx(1)


def test_radii_do_not_change_with_depth_and_those_of_the_blocks_not_with_width():
    shallow, deep, wide = radii(gpt2()), radii(gpt2(layers=6)), radii(gpt2(width=64, heads=8))
    for name, radius in shallow.items():
        assert deep[name.replace("h.1.", "h.5.")] == pytest.approx(radius)
        if name.startswith("h."):
            assert wide[name] == pytest.approx(radius)
    assert wide["wpe.weight"] == pytest.approx(shallow["wpe.weight"] / 4)


@pytest.mark.parametrize("part", [Attention(6, 1), MLP(6)], ids=["attention", "mlp"])
def test_branches_keep_to_their_sensitivity(part):
    """With weights in the ball; of what the published initialisation draws, most are far inside."""
    tree = modular_tree(part.double())
    weights = [p.detach() for p in atom_tensors(tree, dict(part.named_parameters()))]
    for atom, weight, projected in zip(tree.atoms, weights, tree.project([9 * w for w in weights]), strict=True):
        if isinstance(atom, Linear):
            weight.copy_(projected)  # into the parameter, of which it is a view
    assert steepest(part, (1, 5, 6), (vectors, vectors)) <= tree.sensitivity * (1 + 1e-9)


def test_modular_dual_trains_gpt2_with_steps_of_length_lr():
    model = gpt2()
    tree = modular_tree(model)
    optimizer = ModularDual(model.named_parameters(), tree, lr=1.0, momentum=0.8, orthogonalizer="svd")
    x, losses = tokens(1), []
    for _ in range(40):
        before = [w.detach().clone() for w in atom_tensors(tree, dict(model.named_parameters()))]
        optimizer.zero_grad()
        loss = model(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after = atom_tensors(tree, dict(model.named_parameters()))
        steps = [(p - q).detach() for p, q in zip(after, before, strict=True)]
        assert tree.norm(steps).item() == pytest.approx(1.0, rel=1e-3)
    assert losses[-1] < 0.5 * losses[0]
