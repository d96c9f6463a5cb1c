"""What a second thread brings, by the FLOPs of a batch: vision towers of growing size, one and two threads in turn.

    python benchmarks/threads.py --seconds 8
    OMP_WAIT_POLICY=PASSIVE python benchmarks/threads.py --seconds 8    # threads that wait sleep, as those of the command line

On an idle machine it shows where a second thread begins to pay, on a busy one what it costs.
"""

import argparse
import os
import statistics
import time

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 8
TOWERS = ((32, 2, 32), (64, 4, 64), (128, 4, 64), (96, 6, 128), (192, 6, 96), (384, 12, 128))  # width, layers, pixels a side


def tower(width: int, layers: int, pixels: int) -> transformers.CLIPVisionModel:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = transformers.CLIPVisionConfig(**sizes, num_attention_heads=width // 32, image_size=pixels, patch_size=16)
    return transformers.CLIPVisionModel(config).eval()


def flops_of(model: torch.nn.Module, images: torch.Tensor) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def compare(model: torch.nn.Module, images: torch.Tensor, seconds: float) -> dict[int, list[float]]:
    """Milliseconds of each run, by number of threads; in turn, each behind a run to warm up."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[1]) < 4:
        for threads in sorted(taken, reverse=len(taken[1]) % 2 == 1):
            torch.set_num_threads(threads)
            model(images)
            begin = time.perf_counter()
            model(images)
            taken[threads].append(1000 * (time.perf_counter() - begin))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of runs of each tower, at least")
    given = parser.parse_args()
    print(f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY')}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for width, layers, pixels in TOWERS:
        model, images = tower(width, layers, pixels), torch.randn(BATCH, 3, pixels, pixels)
        with torch.inference_mode():
            flops, taken = flops_of(model, images), compare(model, images, given.seconds)
        least, middle = ([of(taken[threads]) for threads in (1, 2)] for of in (min, statistics.median))
        said = f"fastest {least[0]:.1f} and {least[1]:.1f} ms, median {middle[0]:.1f} and {middle[1]:.1f} ms"
        print(f"width {width}, {layers} layers: {flops / 1e9:.2f} GFLOPs a batch; {said}", flush=True)


if __name__ == "__main__":
    main()
