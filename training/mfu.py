"""Model FLOPs utilisation: the share of a device's peak that the model's own arithmetic uses. Never a guess."""

import re

# Dense bf16 tensor-core peak in FLOP/s by the vendor's data sheet, without sparsity.
BF16_PEAK = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


# Names that contain one of the table's and are another, slower thing.
OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b")


def bf16_peak(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None for a device that the table does not know."""
    if OTHERS.search(device_name):
        return None
    longest_first = sorted(BF16_PEAK, key=len, reverse=True)
    return next((BF16_PEAK[name] for name in longest_first if re.search(rf"\b{name}\b", device_name)), None)


def utilisation(tokens_per_second: float, flops_per_token: float, device_name: str, devices: int) -> float | None:
    """Share of the peak of all devices, or None where the peak is unknown."""
    peak = bf16_peak(device_name)
    return tokens_per_second * flops_per_token / (peak * devices) if peak else None
