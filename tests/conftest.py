import jax

# The reference numbers were recorded at full float32 precision.
jax.config.update("jax_default_matmul_precision", "highest")
