"""Two bases for MFU: the measured speed of a large bf16 matrix product of random numbers, and the figure of the data sheet."""

import argparse
import json
import statistics
import time

import torch

from dsllm.engine.processes.device import peak_flops

WARM_UPS, REPEATS = 3, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    size = parser.parse_args().size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))  # zeros would be faster
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    sheet, origin = peak_flops(device, "bf16", None)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "gemm_flops": 2 * size**3 / statistics.median(seconds[WARM_UPS:]),
        "sheet_flops": sheet,
        "sheet_origin": origin,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
