"""The shell: stacking, blocks, missing gradients, options, hooks and checkpoints, seen through Muon and a toy."""

import copy
import io

import pytest
import torch
from torch import nn

from optim import MatrixOptimizer, Muon, Spec, orthogonalizer, shape_scale

from .test_muon import parameters, set_gradients


def clones(params):
    return [p.detach().clone() for p in params]


def run(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step=step)
        optimizer.step()


def saved(optimizer):
    """The state dict after a trip through a file that holds no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class RowSums(MatrixOptimizer):
    """A toy with states of several shapes and dtypes: the gradient over one plus the number of steps so far."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 1.0, "weight_decay": 0.0, "shape_scale": "none", "blocks": 1}, **options)

    def state_spec(self, m, n, group):
        return {"count": Spec((), torch.int64), "rows": Spec((m,))}

    def direction(self, grads, state, group):
        state["count"] += 1
        state["rows"] += grads.sum(dim=-1)
        return grads / state["count"].view(-1, 1, 1)


# ---- the step -------------------------------------------------------------------------------------------------------


def test_stack_equals_one_optimizer_a_parameter():
    together, apart = parameters(), parameters()
    run(Muon(together, weight_decay=0.1), together, range(3))
    for step in range(3):
        set_gradients(apart, step=step)
        if step == 0:
            singles = [Muon([p], weight_decay=0.1) for p in apart]
        for single in singles:
            single.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["original", "spectral", "match_rms_adamw"])
def test_blocks_equal_separate_matrices(scale):
    (fused,) = parameters([(12, 5)])
    separate = [nn.Parameter(block.clone()) for block in fused.detach().chunk(3)]
    options = {"lr": 0.1, "weight_decay": 0.2, "shape_scale": scale}
    whole, parts = Muon([fused], blocks=3, **options), Muon(separate, **options)
    for step in range(3):
        set_gradients([fused], step=step)
        for p, grad in zip(separate, fused.grad.chunk(3), strict=True):
            p.grad = grad.clone()
        whole.step()
        parts.step()
    assert torch.equal(fused, torch.cat(separate))
    assert whole.state[fused]["momentum_buffer"].shape == (3, 4, 5)


def test_parameters_without_gradient_are_left_alone():
    params, apart = parameters([(4, 6)] * 5), parameters([(4, 6)] * 5)
    optimizer, singles = Muon(params, weight_decay=0.1), [Muon([p], weight_decay=0.1) for p in apart]
    for step, missing in enumerate([(), (0, 3), (2,), (0, 1, 2, 3, 4)]):
        set_gradients(params, apart, step=step)
        for i in missing:
            params[i].grad = apart[i].grad = None
        before, states = clones(params), [optimizer.state[p]["momentum_buffer"].clone() for p in params]
        optimizer.step()
        for single in singles:
            single.step()
        for i in missing:
            assert torch.equal(params[i], before[i])
            assert torch.equal(optimizer.state[params[i]]["momentum_buffer"], states[i])
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_zero_gradient_only_decays():
    params = parameters()
    before = clones(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    for p, start in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * start)


def test_half_parameters_step_in_float32_and_round_once():
    half = parameters(dtype=torch.bfloat16)
    full = [nn.Parameter(p.detach().float()) for p in half]
    optimizers = Muon(half, lr=0.1), Muon(full, lr=0.1)
    set_gradients(half)
    for p, q in zip(full, half, strict=True):
        p.grad = q.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(half, full, strict=True):
        assert torch.equal(p, q.bfloat16())


def test_double_parameters_have_double_state_beside_others():
    params = [*parameters([(3, 4)]), *parameters([(3, 4)], dtype=torch.float64)]
    optimizer = Muon(params)
    assert [optimizer.state[p]["momentum_buffer"].dtype for p in params] == [torch.float32, torch.float64]
    run(optimizer, params, range(2))


def test_closure():
    params = parameters([(3, 4)])
    target = torch.ones(3, 4)
    optimizer = Muon(params, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] - target).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


def test_scheduler_and_options_changed_in_mid_run():
    (p,) = parameters([(4, 4)])
    optimizer = Muon([p], lr=0.1, weight_decay=0.1, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0].update(weight_decay=0.0, shape_scale="match_rms_adamw")
        set_gradients([p], step=step)
        lr, decay, scale = 0.1 / (1 + step), *((0.1, 1.0) if step < 2 else (0.0, 0.4))
        expected = (1 - lr * decay) * p.detach() - lr * scale * orthogonalizer("polar_express")(p.grad)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


def test_groups_have_their_own_options():
    a, b = parameters([(4, 6), (4, 6)])
    optimizer = Muon([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.1, "momentum": 0.5}], lr=0.1)
    c, d = parameters([(4, 6), (4, 6)])
    singles = Muon([c], lr=0.5), Muon([d], lr=0.1, weight_decay=0.1, momentum=0.5)
    for step in range(2):
        set_gradients([a, b], [c, d], step=step)
        for o in (optimizer, *singles):
            o.step()
    assert torch.equal(a, c) and torch.equal(b, d)


def test_group_added_later():
    first, second = parameters([(4, 6), (4, 6)])
    optimizer = Muon([("first", first)])
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.5})
    before = clones([first, second])
    run(optimizer, [first, second], range(1))
    assert not torch.equal(first, before[0]) and not torch.equal(second, before[1])
    assert list(optimizer.state_dict()["state"]) == ["first", "second"]


def test_states_of_any_shape_and_dtype():
    params = parameters([(4, 3), (4, 3), (6, 2)])
    optimizer = RowSums([{"params": params[:2]}, {"params": params[2:], "blocks": 2}])
    before = clones(params)
    run(optimizer, params, range(1))
    assert torch.equal(params[2], before[2] - params[2].grad)
    params[0].grad = None
    optimizer.step()
    assert [optimizer.state[p]["count"].tolist() for p in params] == [1, 2, [2, 2]]
    torch.testing.assert_close(optimizer.state[params[1]]["rows"], 2 * params[1].grad.sum(dim=1))
    torch.testing.assert_close(optimizer.state[params[2]]["rows"], 2 * params[2].grad.view(2, 3, 2).sum(dim=2))


@pytest.mark.parametrize("blocks", [1, 2])
def test_stacks_equal_separate_matrices(blocks):
    """Eight experts in two layers, as one tensor."""
    (experts,) = parameters([(2, 4, 6, 5)])
    separate = [nn.Parameter(matrix.clone()) for matrix in experts.detach().view(8, 6, 5)]
    options = {"lr": 0.1, "weight_decay": 0.2, "shape_scale": "spectral", "blocks": blocks}
    whole, parts = Muon([{"params": [experts], "tensors": "stack"}], **options), Muon(separate, **options)
    for step in range(3):
        set_gradients([experts], step=step)
        for p, grad in zip(separate, experts.grad.view(8, 6, 5), strict=True):
            p.grad = grad.clone()
        whole.step()
        parts.step()
    assert torch.equal(experts.view(8, 6, 5), torch.stack(separate))
    assert whole.state[experts]["momentum_buffer"].shape == (8 * blocks, 6 // blocks, 5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flattened_kernel_equals_a_matrix(layout):
    (kernel,) = parameters([(6, 3, 2, 2)])
    matrix = nn.Parameter(kernel.detach().reshape(6, 12))
    kernel.data = kernel.data.to(memory_format=layout)
    flat, plain = Muon([{"params": [kernel], "tensors": "flatten"}], lr=0.1), Muon([matrix], lr=0.1)
    for step in range(3):
        set_gradients([kernel], step=step)
        matrix.grad = kernel.grad.reshape(6, 12)
        flat.step()
        plain.step()
    assert torch.equal(kernel.reshape(6, 12), matrix)
    assert kernel.is_contiguous(memory_format=layout)
    assert flat.state[kernel]["momentum_buffer"].shape == (6, 12)


def test_state_that_starts_as_the_identity():
    class Whitened(RowSums):
        def state_spec(self, m, n, group):
            return {"basis": Spec((n, n), identity=True), "count": Spec((), torch.int64)}

    params = [*parameters([(4, 3), (6, 2)]), *parameters([(5, 3)], dtype=torch.float64)]
    optimizer = Whitened([{"params": [params[0], params[2]]}, {"params": [params[1]], "blocks": 2}])
    assert torch.equal(optimizer.state[params[0]]["basis"], torch.eye(3))
    assert torch.equal(optimizer.state[params[1]]["basis"], torch.eye(2).expand(2, 2, 2))
    assert torch.equal(optimizer.state[params[2]]["basis"], torch.eye(3, dtype=torch.float64))


def test_groups_count_their_steps_and_keep_the_count():
    first, second = parameters([(4, 6), (4, 6)])
    optimizer = Muon([("first", first)])
    run(optimizer, [first], range(2))
    optimizer.add_param_group({"params": [("second", second)]})
    run(optimizer, [first, second], range(3))
    assert [group["step"] for group in optimizer.param_groups] == [5, 3]
    resumed = Muon([{"params": [("second", second)]}, {"params": [("first", first)]}])
    resumed.load_state_dict(saved(optimizer))
    assert [group["step"] for group in resumed.param_groups] == [3, 5]


def test_step_never_waits_for_the_device():
    """Meta tensors have no values: whoever asked for one would raise."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(6, 4), (6, 4), (4, 8)]]
    for p in params:
        p.grad = torch.empty_like(p)
    Muon([{"params": params[:2], "blocks": 3}, {"params": params[2:]}], weight_decay=0.1).step()


@pytest.mark.parametrize(
    "kind, scales",
    [
        ("none", (1, 1, 1, 1)),
        ("original", (1.000, 1.732, 2.000, 1.000)),
        ("spectral", (1.000, 1.732, 2.000, 0.500)),
        ("match_rms_adamw", (5.543, 9.600, 11.085, 11.085)),
    ],
)
def test_shape_scales_of_gpt2_small(kind, scales):
    shapes = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
    assert [shape_scale(kind, m, n) for m, n in shapes] == pytest.approx(scales, abs=1e-3)


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_direction_hook_sees_names_and_directions():
    params = parameters([(4, 6), (9, 3), (4, 6), (5, 5)])
    names = ["a", "qkv", "b", "idle"]
    named = list(zip(names, params, strict=True))
    optimizer = Muon([{"params": [named[0], *named[2:]]}, {"params": [named[1]], "blocks": 3}], lr=0.5)
    seen = {}
    handle = optimizer.register_direction_hook(lambda names, stack: seen.update(zip(names, stack, strict=True)))
    set_gradients(params)
    params[3].grad = None
    before = clones(params)
    optimizer.step()
    assert list(seen) == ["a", "b", "qkv[0]", "qkv[1]", "qkv[2]"]
    torch.testing.assert_close(before[0] - params[0], 0.5 * seen["a"], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[1] - params[1], 0.5 * torch.cat([seen[f"qkv[{i}]"] for i in range(3)]))
    handle.remove()
    seen.clear()
    optimizer.step()
    assert not seen


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def named(order=("a", "b", "c", "d", "e"), seed=0, **options):
    """An optimizer of named parameters made in any order, and the parameters in alphabetical order."""
    params = dict(zip("abcde", parameters(seed=seed), strict=True))
    return Muon([(name, params[name]) for name in order], **options), list(params.values())


def test_state_is_there_from_the_start_under_names():
    optimizer, params = named()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["params"] == list(state["state"]) == list("abcde")
    assert [state["state"][k]["momentum_buffer"].shape for k in "abcde"] == [p.shape for p in params]
    assert list(Muon(params).state_dict()["state"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("order", ["abcde", "ecbda"])
def test_resumes_to_the_same_bits(order):
    optimizer, params = named(weight_decay=0.1)
    run(optimizer, params, range(3))
    resumed, copies = named(order, seed=1, lr=7.0)
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(saved(optimizer))
    assert resumed.param_groups[0]["lr"] == 0.02
    for o, ps in ((optimizer, params), (resumed, copies)):
        run(o, ps, range(3, 5))
    if order == "abcde":
        assert all(torch.equal(p, q) for p, q in zip(copies, params, strict=True))
    for p, q in zip(copies, params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_deep_copy_goes_on_alone_and_alike():
    params = parameters()
    optimizer = Muon(params)
    run(optimizer, params, range(2))
    copies, twin = copy.deepcopy((params, optimizer))
    run(twin, copies, range(2, 4))
    assert not any(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    run(optimizer, params, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_groups_are_found_by_their_parameters():
    a, b = parameters([(4, 6), (4, 6)])
    first = Muon([{"params": [("a", a)], "lr": 0.5}, {"params": [("b", b)], "lr": 0.1}])
    second = Muon([{"params": [("b", b)]}, {"params": [("a", a)]}])
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.5]


def test_state_keeps_its_dtype_through_loading():
    """torch.optim.Muon loads it in the dtype of the parameters."""
    params = parameters(dtype=torch.bfloat16)
    optimizer = Muon(params)
    run(optimizer, params, range(2))
    resumed = Muon(parameters(dtype=torch.bfloat16))
    resumed.load_state_dict(saved(optimizer))
    for old, new in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert new["momentum_buffer"].dtype == torch.float32
        assert torch.equal(new["momentum_buffer"], old["momentum_buffer"])


def test_reads_the_state_of_torch_muon():
    params, copies = parameters(), parameters()
    reference = torch.optim.Muon(params)
    run(reference, params, range(2))
    optimizer = Muon(copies)
    optimizer.load_state_dict(reference.state_dict())
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(reference.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


def rename(state, old, new):
    for group in state["param_groups"]:
        group["params"] = [new if name == old else name for name in group["params"]]


def put(state, name, buffer):
    state["state"][name]["momentum_buffer"] = buffer


def split(state):
    (group,) = state["param_groups"]
    state["param_groups"] = [{**group, "params": list("ab")}, {**group, "params": list("cde")}]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: rename(s, "c", "x"), "lacks 'c'"),
        (lambda s: s["param_groups"][0]["params"].append("x"), "holds the unknown 'x'"),
        (split, "into other groups"),
        (lambda s: s["param_groups"][0].update(momentum=1.5), "momentum must be .* not 1.5"),
        (lambda s: s["param_groups"][0].update(blocks=2), "blocks=2 for 'a' where this optimizer has blocks=1"),
        (lambda s: s["param_groups"][0].update(tensors="stack"), "tensors=stack for 'a' .* has tensors=refuse"),
        (lambda s: s["param_groups"][0].update(step=-1), "step must be .* not -1"),
        (lambda s: s["state"].pop("d"), "no state for 'd'; join .* all ranks"),
        (
            lambda s: s["state"]["d"].update(step=torch.zeros(())),
            r"'d' must be \['momentum_buffer'\], .* with other blocks, tensors$",
        ),
        (lambda s: put(s, "e", torch.zeros(2, 2)), r"'e' must have shape \(3, 12\), not \(2, 2\)"),
        (
            lambda s: put(s, "a", torch.zeros(6, 4).half()),
            "'a' must be torch.float32, not torch.float16; build .* with the dtypes",
        ),
    ],
)
def test_refuses_a_state_that_does_not_fit_and_changes_nothing(damage, message):
    optimizer, params = named()
    run(optimizer, params, range(1))
    state = saved(optimizer)
    state["param_groups"][0]["lr"] = 9.0
    for entry in state["state"].values():
        entry["momentum_buffer"] += 1
    damage(state)
    before = saved(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, entry in before["state"].items():
        assert torch.equal(after["state"][name]["momentum_buffer"], entry["momentum_buffer"])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameter, message",
    [
        (torch.zeros(3), r"'w' of shape \(3,\) .* two dimensions"),
        (torch.zeros(2, 3, 4), r"'w' of shape \(2, 3, 4\) .* set tensors to stack or flatten"),
        (torch.zeros(0, 4), r"'w' of shape \(0, 4\) .* entry"),
        (torch.zeros(4, 4, dtype=torch.complex64), "'w' .* dense and real, not .*complex64"),
        (torch.zeros(4, 4).to_sparse(), "'w' .* dense and real, not torch.sparse_coo"),
        (torch.zeros(7, 4), r"'w' of shape \(7, 4\) .* rows do not divide into blocks=2"),
    ],
)
def test_refuses_what_is_no_matrix_by_name(parameter, message):
    with pytest.raises(ValueError, match=message):
        Muon([("w", parameter)], blocks=2)


def test_refuses_a_parameter_given_twice():
    (p,) = parameters([(3, 4)])
    with pytest.raises(ValueError, match="'b' is given twice"), pytest.warns(UserWarning, match="duplicate"):
        Muon([("a", p), ("b", p)])
    a, b = parameters([(3, 4), (3, 4)])
    with pytest.raises(ValueError, match="'a' is given twice"):
        Muon([("a", a), ("a", b)])


def test_refuses_sparse_gradients():
    (p,) = parameters([(3, 4)])
    p.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(ValueError, match=r"sparse gradient .*parameter 0"):
        Muon([p]).step()


def test_refuses_dtensors(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match=r"'w' of shape .* DTensor"):
            Muon([("w", DTensor.from_local(torch.zeros(4, 4), mesh))])
    finally:
        dist.destroy_process_group()
