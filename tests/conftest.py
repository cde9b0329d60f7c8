import os

# Small matrices gain nothing from threads, and those of NumPy spin while they wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most of a test's time is compilation: halve it. Must be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

# The reference numbers were recorded at full float32 precision.
jax.config.update("jax_default_matmul_precision", "highest")
