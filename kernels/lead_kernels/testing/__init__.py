"""The kernels' oracle, wrong kernels that it must reject, and what the compiler makes of the right ones."""
