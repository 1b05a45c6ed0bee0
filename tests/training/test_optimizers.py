"""From configurations to optimizers: what each key changes, and the two that update a whole model."""

import copy
import math
from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.gpt2 import GPT2, GPT2Config
from training.config import Config, ConfigError, MatrixConfig, OptimConfig
from training.config_files import load_config
from training.optimizers import BUILDERS, READS, WHOLE_MODEL, build_optimizers, conventions, keys_read, routing_table
from training.same_run import settings


def gpt2():
    return GPT2(GPT2Config(vocab_size=31, context=8, layers=2, heads=2, width=16))


def optim(optimizer, **keys):
    """The defaults but for these keys, section__key."""
    config = OptimConfig()
    for key, value in {"matrix__optimizer": optimizer, **keys}.items():
        section, _, name = key.partition("__")
        setattr(*(getattr(config, section), name) if name else (config, section), value)
    return config


def take_steps(model, optimizers, count=3):
    """On random gradients: those of a loss lack a rank behind a fresh LayerNorm, and there dual maps follow rounding
    errors, which differ from processor to processor."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers.values():
            optimizer.step()


# ---- keys -----------------------------------------------------------------------------------------------------------

RULES = [replace(rule, lr_scale=0.5) for rule in OptimConfig().rules]
CHANGES = {
    "matrix__lr": 0.5,
    "matrix__weight_decay": 0.5,
    "matrix__momentum": 0.5,
    "matrix__nesterov": False,
    "matrix__momentum_form": "sum",
    "matrix__shape_scale": "spectral",
    "matrix__orthogonalizer": "you",
    "matrix__steps": 3,
    "matrix__dtype": "fp64",
    "matrix__margin": 1.5,
    "matrix__path": "plain",
    "matrix__normalizer": "power",
    "adamw__eps": 1e-6,
    "soap__eps": 1e-6,
    "shampoo__eps": 1e-3,
    "jorge__eps": 1e-3,
    "scion__embedding_radius": 5.0,
    "modular__head_mass": 5.0,
    "rules": RULES,
}


def built(config):
    """All that the configuration settles of the optimizers, readable."""
    optimizers = build_optimizers(gpt2(), config)
    groups = {
        name: [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for name, optimizer in optimizers.items()
    }
    dtypes = [part.dtype for optimizer in optimizers.values() for s in optimizer.state.values() for part in s.values()]
    return repr(
        (groups, dtypes, [repr(getattr(optimizer, "orthogonalizer", None)) for optimizer in optimizers.values()])
    )


def test_every_optimizer_says_what_it_reads():
    choices = get_args(get_type_hints(MatrixConfig)["optimizer"])
    assert set(choices) == set(READS) == {"adamw", *BUILDERS, *WHOLE_MODEL}


@pytest.mark.parametrize("orthogonalizer", ["polar_express", "svd"])
@pytest.mark.parametrize("name", READS)
def test_exactly_the_keys_that_are_read_make_another_optimizer(name, orthogonalizer):
    def config(**change):
        return optim(name, **{"matrix__orthogonalizer": orthogonalizer, **change})

    reads = keys_read(settings(Config(optim=config())))
    before = built(config())
    for key, value in CHANGES.items():
        differs = built(config(**{key: value})) != before
        assert differs == reads(f"optim.{key.replace('__', '.')}"), key


SOAP_CHANGES = {
    "betas": (0.5, 0.5),
    "shampoo_beta": 0.5,
    "eps": 1e-6,
    "orthogonalize": True,
    "storage": "S",
    "preconditioner_dtype": "bf16",
    "precondition_frequency": 3,
    "refresh": "eigh",
    "subspace_fraction": 0.5,
    "subspace_rule": "greedy",
    "polish_interval": 3,
    "transport": "squared",
    "statistics": "before",
    "first_step": "take",
    "eigenvalues": "diagonal",
    "max_dim": 20,
}


@pytest.mark.parametrize("key", [*SOAP_CHANGES, "bias_correction"])
@pytest.mark.parametrize("name", ["soap", "kl_soap", "kl_shampoo"])
def test_keys_that_only_relatives_read_are_refused(name, key):
    """And all others make another optimizer."""
    value = SOAP_CHANGES.get(key, name != "soap")  # of bias_correction null is true in soap and false in kl_soap
    config = optim(name, soap__storage="P")
    before = built(config)
    setattr(config.soap, key, value)
    if keys_read(settings(Config(optim=config)))(f"optim.soap.{key}"):
        assert built(config) != before
    else:
        with pytest.raises(ConfigError, match=rf"^optim.soap.{key}={value} goes with \w+ and \w+, not with {name}$"):
            build_optimizers(gpt2(), config)


@pytest.mark.parametrize("name", ["soap", "kl_soap", "kl_shampoo"])
def test_random_partitions_are_those_of_the_runs_seed(name):
    optimizers = build_optimizers(gpt2(), optim(name), seed=7)
    assert {group["seed"] for group in optimizers[name].param_groups} == {7}


def test_soap_reads_the_orthogonalizer_if_it_orthogonalizes():
    for orthogonalize in (True, False):
        reads = keys_read(settings(Config(optim=optim("soap", soap__orthogonalize=orthogonalize))))
        assert reads("optim.matrix.dtype") == orthogonalize
    assert reads("optim.grad_clip") and reads("train.steps") and not reads("optim.matrix.momentum_form")


def test_an_optimizer_of_another_version_is_told():
    with pytest.raises(ConfigError, match=r"optim.matrix.optimizer=adafactor is unknown; known are muon, "):
        keys_read({"optim.matrix.optimizer": "adafactor"})


# ---- optimizers of a whole model ------------------------------------------------------------------------------------


def polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_scion_steps_in_the_norm_of_each_kind_of_parameter(decay):
    keys = {"matrix__lr": 2**-12, "matrix__weight_decay": decay, "scion__vector_radius": 7.0}
    model = gpt2()
    optimizers = build_optimizers(model, optim("scion", matrix__orthogonalizer="svd", **keys))
    assert list(optimizers) == ["scion"]
    before = copy.deepcopy(model)
    take_steps(model, optimizers, 1)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        if p.ndim == 1:
            expected = q - 2**-12 * 7.0 * p.grad.sign()  # the rules exempt it from decay
        elif name in ("wte.weight", "wpe.weight"):
            expected = (1 - 2**-12 * decay) * q - 2**-12 * 3000 / 16 * p.grad.sign()
        else:
            parts = p.grad.chunk(3 if "c_attn" in name else 1)
            duals = torch.cat([math.sqrt(g.size(0) / g.size(1)) * polar(g) for g in parts])
            expected = (1 - 2**-12 * decay) * q - 2**-12 * 50 * duals
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-5)


def test_modular_shares_a_step_by_the_masses():
    """By hand: two layers whose parts weigh 4.6 and 2.4, in 4 residual branches; last norm and head weigh 1.2."""
    keys = {"modular__embed_mass": 2.0, "modular__blocks_mass": 3.0, "modular__head_mass": 1.0}
    model = gpt2()
    optimizers = build_optimizers(model, optim("modular", matrix__lr=0.3, matrix__orthogonalizer="svd", **keys))
    assert list(optimizers) == ["modular"]
    before = copy.deepcopy(model)
    take_steps(model, optimizers, 1)
    last, first = model.h[1].mlp.c_proj.weight - before.h[1].mlp.c_proj.weight, model.wpe.weight - before.wpe.weight
    assert torch.linalg.matrix_norm(last, 2).item() == pytest.approx(
        0.3 * 3 / 6 * 4 / 14 * math.sqrt(16 / 64), rel=1e-3
    )
    assert first.square().mean(-1).sqrt().max().item() == pytest.approx(0.3 * 2 / 6 / 2 / 16, rel=1e-3)
    tied = model.wte.weight - before.wte.weight
    assert tied.norm(dim=-1).max().item() == pytest.approx(0.3 * 1 / 6 / 1.2 / math.sqrt(16), rel=1e-3)


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("scion", {"matrix__steps": 0}, "optim.matrix: .*steps=0"),
        ("modular", {"matrix__momentum": 1.0}, "optim.matrix: momentum must be .*, not 1.0"),
        ("scion", {"rules": [replace(RULES[0], optimizer="scion")]}, "to scion; known are matrix and adamw"),
    ],
)
def test_what_cannot_be_built_is_told(name, keys, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizers(gpt2(), optim(name, **keys))


@pytest.mark.parametrize("key", ["scion.radius", "scion.vector_radius", "modular.embed_mass"])
def test_radii_and_masses_are_positive(key):
    with pytest.raises(ConfigError, match=f"optim.{key} must be positive, got 0"):
        load_config(None, [f"optim.{key}=0"])


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_what_updates_the_whole_model_is_told(name):
    config = optim(name)
    table = routing_table(model := gpt2(), build_optimizers(model, config))
    assert "AdamW" not in table and table.count("(spectral)") == 4
    told = conventions(config)
    assert "adamw_shares_lr" not in told
    assert {"optimizer": name, "weight_decay": 0.0, **asdict(getattr(config, name))}.items() <= told.items()


@pytest.mark.parametrize(
    "name, betas, correction",
    [("soap", (0.95, 0.95), True), ("kl_soap", (0.9, 0.98), False), ("kl_shampoo", (0.9, 0.98), None)],
)
def test_what_decides_the_result_of_soap_and_its_relatives_is_told(name, betas, correction):
    """Nulls as what they stand for, in the optimizer that is built."""
    config = optim(name, soap__storage="P", soap__first_step="take", matrix__shape_scale="none")
    told = conventions(config)
    expected = {"optimizer": name, "storage": "P", "first_step": "take", "statistics": "after", "refresh": "qr"}
    expected |= {"betas": betas, "shampoo_beta": betas[1], "preconditioner_dtype": "fp32", "shape_scale": "none"}
    assert expected.items() <= told.items() and told.get("bias_correction") == correction
    assert ("eigenvalues" in told) == (name != "soap") and "orthogonalizer" not in told
    [group] = [g for g in build_optimizers(gpt2(), config)[name].param_groups if g["blocks"] == 1]
    assert all(group[key] == told[key] for key in ("betas", "eps", "statistics", "transport", "max_dim"))
    assert conventions(optim(name, soap__shampoo_beta=0.5))["shampoo_beta"] == 0.5


def test_the_orthogonalizer_of_soap_muon_is_told():
    told = conventions(optim("soap", soap__orthogonalize=True, matrix__orthogonalizer="jordan"))
    assert told["orthogonalizer"] == "jordan" and "jordan" in told["iteration"]


@pytest.mark.parametrize("name", ["shampoo", "jorge"])
def test_the_sections_of_other_optimizers_are_told(name):
    config = optim(name)
    assert asdict(getattr(config, name)).items() <= conventions(config).items()


def test_what_has_a_momentum_tells_it():
    assert conventions(optim("sgd"))["momentum"] == "sum 0.95 nesterov"
    assert conventions(optim("jorge"))["momentum"] == "ema 0.95"


def trained(name):
    model = gpt2()
    take_steps(model, build_optimizers(model, optim(name, matrix__lr=0.001)))
    return model.state_dict()


def worker(rank, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    torch.save({name: trained(name) for name in WHOLE_MODEL}, directory / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_each_other_to_the_bit_and_one_process_to_rounding(tmp_path):
    mp.spawn(worker, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in WHOLE_MODEL:
        for key, alone in trained(name).items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key]), (name, key)
            torch.testing.assert_close(ranks[0][name][key], alone, rtol=1e-4, atol=1e-5)
