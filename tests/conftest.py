import os

# Most of a test's time is compilation: halve it. Must be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

# The reference numbers were recorded at full float32 precision.
jax.config.update("jax_default_matmul_precision", "highest")
