import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import train_gpt2
from data.loader import TrainLoader
from data.shards import TokenStream
from training.finished_run import load_run


def test_saved_gradients_are_those_of_the_batch_before_clipping(tiny, tokens, tmp_path):
    change = ["train.steps=2", "train.save_gradients_at=[0,1]", "train.micro_batch=3", "optim.grad_clip=1e-3"]
    assert train_gpt2.main([*tiny, *change]) == 0
    files = sorted((tmp_path / "run" / "gradients").iterdir())
    assert [file.name for file in files] == ["step_000000.safetensors", "step_000001.safetensors"]
    saved, later = map(load_file, files)

    model, _, _ = load_run(tmp_path / "run")
    model.initialise(0)
    stream = TokenStream(tokens, "train")
    x, y = TrainLoader(stream, context=64, batch_sequences=8, micro_batch=8, steps=2).batch(0)
    F.cross_entropy(model(x[0]).flatten(0, 1), y.flatten()).backward()
    expected = {}
    for i, block in enumerate(model.h):
        qkv = block.attn.c_attn.weight.grad.split(32)
        expected |= {f"h.{i}.attn.c_attn.weight[{j}]": gradient for j, gradient in enumerate(qkv)}
        for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            expected[f"h.{i}.{part}.weight"] = block.get_submodule(part).weight.grad
    assert saved.keys() == expected.keys() == later.keys()
    for name, gradient in expected.items():
        assert saved[name].dtype == torch.float32 and not torch.equal(saved[name], later[name])
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-7)
    with safe_open(files[1], "pt") as file:
        assert file.metadata() == {"step": "1", "name": "tiny"}


def test_no_gradients_are_kept_unless_asked_for_and_adamw_runs_keep_them_too(tiny, tmp_path):
    assert train_gpt2.main([*tiny, "train.steps=1"]) == 0
    assert not (tmp_path / "run" / "gradients").exists()
    change = [f"run_dir={tmp_path / 'adamw'}", "optim.matrix.optimizer=adamw", "train.save_gradients_at=[0]"]
    assert train_gpt2.main([*tiny, *change]) == 0
    assert len(load_file(tmp_path / "adamw" / "gradients" / "step_000000.safetensors")) == 2 * 6
