import pytest
import torch

from training.config import ConfigError, TrainConfig
from training.runtime import Runtime, start


@pytest.mark.parametrize("units", [True, False])
def test_auto_precision_on_a_cpu_is_bf16_only_where_it_has_the_units(monkeypatch, capsys, units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with start(TrainConfig(device="cpu")) as rt:
        assert rt.autocast == (torch.bfloat16 if units else None)
    assert ("bf16 autocast" if units else "fp32") in capsys.readouterr().out


def test_precision_that_is_asked_for_is_taken():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", None)):
        with start(TrainConfig(device="cpu", precision=name)) as rt:
            assert rt.autocast == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match=r"train.device=cuda.*no GPU"), start(TrainConfig(device="cuda")):
        pass


def test_compile_is_off_on_a_cpu_unless_asked_for():
    for wanted, found in (("auto", False), (True, True), (False, False)):
        with start(TrainConfig(device="cpu", compile=wanted)) as rt:
            assert rt.compile is found


def test_work_of_the_main_rank_gives_its_result_or_its_error():
    rt = Runtime(torch.device("cpu"), rank=0, world_size=1, autocast=None, compile=False)
    assert rt.on_main(lambda: 5) == 5
    with pytest.raises(ConfigError, match="told"):
        rt.on_main(lambda: (_ for _ in ()).throw(ConfigError("told")))
    assert rt.sum(1, torch.tensor(2.5)) == [1.0, 2.5]
    assert rt.peak_memory() > 0.01
