"""Oracle for the kernels, wrong kernels that it must reject, and the compiler's resource use of the right ones."""
