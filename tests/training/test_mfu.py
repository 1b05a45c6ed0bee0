import pytest

from training.mfu import bf16_peak, utilisation


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peaks_by_the_names_drivers_report(name, tflops):
    assert bf16_peak(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    ["cpu (2 threads)", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_device_that_is_not_in_the_table_gives_none_and_no_guess(name):
    assert bf16_peak(name) is None
    assert utilisation(1e6, 1e9, name, 1) is None


def test_utilisation_is_per_device():
    assert utilisation(2 * 989e12 / 1e9, 1e9, "NVIDIA H200", 2) == pytest.approx(1.0)
