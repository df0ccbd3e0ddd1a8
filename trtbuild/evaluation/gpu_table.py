"""GPUs as NVIDIA publishes them: what a plan compares an engine with."""

from dataclasses import dataclass

# Bytes of a GPU that its driver, and the context of a process, keep for themselves (H100: 480 and 618 MiB).
RESERVED = 1100 << 20


@dataclass(frozen=True)
class GPU:
    """Memory in MiB as `nvidia-smi` shows it, with ECC where that is the default; bandwidth in bytes a second.

    `rates`: operations a second of dense products by the type of what is multiplied, sums in 32 bits; bfloat16 is as
    float16. Types without a rate are widened to float16 first. `device`: what CUDA calls it. `source`: NVIDIA's
    document.
    """

    device: str
    memory_mib: int
    bandwidth: float
    rates: dict[str, float]
    source: str

    @property
    def free(self) -> int:
        """Bytes that an engine finds."""
        return (self.memory_mib << 20) - RESERVED

    def rate(self, dtype: str) -> float:
        return self.rates.get(dtype) or self.rates["float16"]


def _gpu(device: str, memory_mib: int, gigabytes: float, source: str, **teras: float) -> GPU:
    return GPU(device, memory_mib, gigabytes * 1e9, {dtype: tera * 1e12 for dtype, tera in teras.items()}, source)


# Data sheets give tensor cores' rates with 2:4 sparsity where a footnote says so; here they are dense, half of that.
# The L40S' says 362 beside 733 with sparsity, of which half is what its multiprocessors do at the boost clock.
# GeForce: whitepapers' tables, with FP32 accumulation.
GPUS = {
    "t4": _gpu("Tesla T4", 15360, 320, "T4 data sheet", float32=8.1, float16=65, int8=130),
    "a10": _gpu("NVIDIA A10", 23028, 600, "A10 data sheet", float32=31.2, float16=125, int8=250),
    "a10g": _gpu("NVIDIA A10G", 23028, 600, "A10G data sheet (AWS)", float32=35, float16=70, int8=140),
    "a100-40gb": _gpu(
        "NVIDIA A100-SXM4-40GB", 40960, 1555, "A100 data sheet, SXM", float32=19.5, float16=312, int8=624
    ),
    "a100-80gb": _gpu(
        "NVIDIA A100-SXM4-80GB", 81920, 2039, "A100 data sheet, SXM", float32=19.5, float16=312, int8=624
    ),
    "a100-80gb-pcie": _gpu(
        "NVIDIA A100 80GB PCIe", 81920, 1935, "A100 data sheet, PCIe", float32=19.5, float16=312, int8=624
    ),
    "l4": _gpu("NVIDIA L4", 23034, 300, "L4 data sheet", float32=30.3, float16=121, int8=242.5, fp8=242.5),
    "l40s": _gpu("NVIDIA L40S", 46068, 864, "L40S data sheet", float32=91.6, float16=366.5, int8=733, fp8=733),
    "h100-80gb": _gpu(
        "NVIDIA H100 80GB HBM3", 81559, 3350, "H100 data sheet, SXM", float32=67, float16=989.5, int8=1979, fp8=1979
    ),
    "h100-pcie": _gpu(
        "NVIDIA H100 PCIe", 81559, 2039, "H100 whitepaper, PCIe", float32=51, float16=756, int8=1513, fp8=1513
    ),
    "h100-nvl": _gpu(
        "NVIDIA H100 NVL", 95830, 3900, "H100 data sheet, NVL", float32=60, float16=835.5, int8=1670.5, fp8=1670.5
    ),
    "h200": _gpu("NVIDIA H200", 143771, 4800, "H200 data sheet, SXM", float32=67, float16=989.5, int8=1979, fp8=1979),
    "b200": _gpu("NVIDIA B200", 183359, 7700, "HGX B200 data sheet", float32=75, float16=2250, int8=4500, fp8=4500),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 24576, 936, "GA102 whitepaper", float32=35.6, float16=71, int8=284),
    "rtx4090": _gpu(
        "NVIDIA GeForce RTX 4090", 24564, 1008, "Ada whitepaper", float32=82.6, float16=165.2, int8=660.6, fp8=330.3
    ),
    "rtx5090": _gpu(
        "NVIDIA GeForce RTX 5090",
        32607,
        1792,
        "RTX Blackwell whitepaper",
        float32=104.8,
        float16=209.5,
        int8=838,
        fp8=419,
    ),
    "rtx6000-ada": _gpu(
        "NVIDIA RTX 6000 Ada Generation",
        49140,
        960,
        "RTX 6000 Ada data sheet",
        float32=91.1,
        float16=364.2,
        int8=728.5,
        fp8=728.5,
    ),
}


def known(device: str) -> str | None:
    """The name of a GPU whose results call it `cuda: NVIDIA L4`; None of others."""
    return next((name for name, gpu in GPUS.items() if device == f"cuda: {gpu.device}"), None)
