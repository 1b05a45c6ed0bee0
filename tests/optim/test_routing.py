"""Rules, groups and the proof that each parameter is optimized once."""

import math

import pytest
import torch
from torch import nn

from optim import Muon, RoutingError, Rule, Scion, check_coverage, param_groups, route, routing_rows

RULES = [
    Rule(r"c_attn\.weight$", "matrix", blocks=3),
    Rule(r"h\.\d+\..*\.weight$", "matrix"),
    Rule(r"wte|head", "adamw", lr_scale=0.5, weight_decay=0.0),
    Rule(r"", "adamw"),
]


class Tiny(nn.Module):
    """Two blocks of a fused and a plain layer, an embedding tied to the head, a gain."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.h = nn.ModuleList([nn.ModuleDict({"c_attn": nn.Linear(4, 12), "c_proj": nn.Linear(4, 4)}) for _ in "ab"])
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.wte.weight


@pytest.fixture
def model():
    return Tiny()


def optimizers(model, rules=RULES):
    routes = route(model.named_parameters(), rules)
    matrix = Muon(param_groups(routes, "matrix", 0.02, 0.1), shape_scale="spectral")
    return [matrix, torch.optim.AdamW(param_groups(routes, "adamw", 0.001, 0.01))]


def test_first_match_wins(model):
    won = {name: rule for name, _, rule in route(model.named_parameters(), RULES)}
    assert won == {
        "wte.weight": RULES[2],
        "h.0.c_attn.weight": RULES[0],
        "h.0.c_attn.bias": RULES[3],
        "h.0.c_proj.weight": RULES[1],
        "h.0.c_proj.bias": RULES[3],
        "h.1.c_attn.weight": RULES[0],
        "h.1.c_attn.bias": RULES[3],
        "h.1.c_proj.weight": RULES[1],
        "h.1.c_proj.bias": RULES[3],
        "gain": RULES[3],
    }


def test_tied_parameters_count_once_by_their_first_name(model):
    names = [r.name for r in route(model.named_parameters(remove_duplicate=False), RULES)]
    assert "wte.weight" in names and "head.weight" not in names


def test_frozen_parameters_satisfy_rules_but_go_nowhere(model):
    model.wte.weight.requires_grad_(False)
    assert "wte.weight" not in [r.name for r in route(model.named_parameters(), RULES)]
    check_coverage(model.named_parameters(), optimizers(model))
    assert len(routing_rows(model.named_parameters(), optimizers(model))) == 9


def test_groups_carry_names_and_options(model):
    routes = route(model.named_parameters(), RULES)
    fused, plain = param_groups(routes, "matrix", 0.02, 0.1)
    assert [name for name, _ in fused.pop("params")] == ["h.0.c_attn.weight", "h.1.c_attn.weight"]
    assert fused == {"lr": 0.02, "weight_decay": 0.1, "blocks": 3}
    assert plain["params"][0][1] is model.h[0]["c_proj"].weight and "blocks" not in plain
    rest, embedding = param_groups(routes, "adamw", 0.001, 0.01)
    assert (embedding["lr"], embedding["weight_decay"]) == (0.0005, 0.0)
    assert (rest["lr"], rest["weight_decay"], len(rest["params"])) == (0.001, 0.01, 5)
    assert param_groups(routes, "lion", 0.1, 0.0) == []


def test_rules_with_equal_options_share_a_group(model):
    rules = [Rule("c_proj.weight", "matrix"), Rule(r"h\.1\.c_attn.weight", "matrix"), Rule("", "adamw")]
    (group,) = param_groups(route(model.named_parameters(), rules), "matrix", 0.02, 0.1)
    assert len(group["params"]) == 3


@pytest.mark.parametrize(
    "rules, message",
    [
        (RULES[:3], r"no rule matches parameter 'gain' of shape \(4,\)"),
        ([Rule("conv", "matrix"), *RULES], "rule 1, pattern 'conv', matches no parameter"),
        ([*RULES, Rule("gain", "adamw")], "rule 5, pattern 'gain', comes after rules that take all it matches"),
        ([RULES[3], *RULES[:3]], "rule 2, .* comes after rules that take all"),
    ],
)
def test_rules_that_do_not_fit(model, rules, message):
    with pytest.raises(RoutingError, match=message):
        route(model.named_parameters(), rules)


def test_a_pattern_must_be_a_regular_expression():
    with pytest.raises(RoutingError, match=r"'\(' is not a regular expression"):
        Rule("(", "matrix")


def test_coverage_holds_for_routed_parameters(model):
    check_coverage(model.named_parameters(), optimizers(model))


def test_coverage_names_what_is_missing_double_or_foreign(model):
    matrix, adamw = optimizers(model)
    with pytest.raises(RoutingError, match=r"'h.0.c_attn.weight' is in no optimizer"):
        check_coverage(model.named_parameters(), [adamw])
    extra = torch.optim.SGD([model.gain])
    with pytest.raises(RoutingError, match="'gain' is in AdamW and SGD"):
        check_coverage(model.named_parameters(), [matrix, adamw, extra])
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(7))])
    with pytest.raises(RoutingError, match=r"SGD holds a parameter of shape \(7,\) that is not in the model"):
        check_coverage(model.named_parameters(), [matrix, adamw, foreign])


def test_rows_are_read_from_the_optimizers(model):
    both = optimizers(model)
    both[0].param_groups[1]["lr"] = 0.5
    rows = {row["name"]: row for row in routing_rows(model.named_parameters(), both)}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["h.1.c_attn.weight"] == {
        "name": "h.1.c_attn.weight",
        "shape": (3, 4, 4),
        "optimizer": "Muon",
        "scale": 1.0,
        "lr": 0.02,
        "weight_decay": 0.1,
    }
    assert rows["h.0.c_proj.weight"]["lr"] == 0.5
    assert rows["wte.weight"]["shape"] == (11, 4) and rows["wte.weight"]["scale"] == 1.0
    unblocked = Muon([("w", p := nn.Parameter(torch.zeros(12, 3)))], shape_scale="spectral")
    assert routing_rows([("w", p)], [unblocked])[0]["scale"] == 2.0


@pytest.mark.parametrize(("tensors", "shape"), [("flatten", (8, 36)), ("stack", (32, 3, 3))])
def test_kernels_and_experts_go_to_a_matrix_optimizer_as_the_rule_reads_them(tensors, shape):
    model = nn.Conv2d(4, 8, 3, bias=False)
    routes = route(model.named_parameters(), [Rule("weight", "matrix", tensors=tensors)])
    muon = Muon(param_groups(routes, "matrix", 0.1, 0.0))
    [row] = routing_rows(model.named_parameters(), [muon])
    assert row["shape"] == shape
    seen = []
    muon.register_direction_hook(lambda names, found: seen.extend(d.shape for d in found))
    model.weight.grad = torch.randn(8, 4, 3, 3)
    muon.step()
    assert len(seen) == (32 if tensors == "stack" else 1) and {tuple(s) for s in seen} == {shape[-2:]}


def test_norms_and_radii_are_told_and_vectors_read_as_columns():
    weight, bias = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(5))
    groups = [
        {"params": [weight], "blocks": 2, "radius": (1.0, 2.0)},
        {"params": [bias], "norm": "columns", "tensors": "flatten"},
    ]
    fused, vector = routing_rows([("weight", weight), ("bias", bias)], [Scion(groups, 0.1, radius=3.0)])
    assert fused["optimizer"] == "Scion (spectral)" and fused["shape"] == (2, 3, 4) and fused["scale"] == (1.0, 2.0)
    assert vector["optimizer"] == "Scion (columns)" and vector["shape"] == (5, 1) and vector["scale"] == 3.0
    muon = Muon(param_groups(route([("bias", bias)], [Rule("bias", "matrix", tensors="flatten")]), "matrix", 0.1, 0.0))
    assert routing_rows([("bias", bias)], [muon])[0]["scale"] == math.sqrt(5)


def test_an_unknown_reading_of_tensors_is_refused():
    with pytest.raises(RoutingError, match="tensors must be one of refuse, stack, flatten, not 'fold'"):
        Rule("weight", "matrix", tensors="fold")
