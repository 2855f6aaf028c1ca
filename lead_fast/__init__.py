import os

# Before torch is imported: fewer gaps between allocations of changing sizes. vLLM switches it off in pools of its own.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
