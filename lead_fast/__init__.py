import os

# Set before torch is imported: allocations of varying sizes leave fewer gaps. vLLM turns it off for its own pools.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
