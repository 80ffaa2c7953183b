"""The vocabulary and context length that each named size was published with."""

from dsllm.config.sizes import SIZES

PUBLISHED: dict[str, tuple[int, int]] = {
    "llama-300k": (1024, 512),
    "llama-5m": (4096, 512),
    "llama-20m": (8192, 1024),
    "llama-125m": (50304, 1024),
    "llama-350m": (50304, 2048),
    "llama-1b": (128256, 131072),
    "llama-3b": (128256, 131072),
    "llama-7b": (32000, 4096),
    "llama-8b": (128256, 131072),
    "llama-13b": (32000, 4096),
    "llama-70b": (32000, 4096),
    **{name: (50257, 1024) for name in SIZES if name.startswith("gpt2-")},
    **{name: (50304, 2048) for name in SIZES if name.startswith("pythia-")},
    "pythia-6.9b": (50432, 2048),
    "pythia-12b": (50688, 2048),
}
"""(vocabulary, context) with which a size has the parameter count of its name. The Llama shapes below 1 B are our own;
llama-1b and -3b are Llama 3.2, -8b is Llama 3.1, and -7b, -13b and -70b are Llama 2."""
