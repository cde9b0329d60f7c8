import atexit
import os
import shutil
import signal
import tempfile
from importlib import metadata

# Small matrices gain nothing from threads, and those of NumPy spin while they wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What a shell runs in the background ignores Ctrl-C, and so do the processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of a test's time is compilation: halve it. Must be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if metadata.version("jax").startswith("0.10."):  # halve it once more; later ones have no such flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What one test has compiled is there for all, in whichever process of pytest, or of theirs, they are.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="wmjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

# The reference numbers were recorded at full float32 precision.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program takes memory maps, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()
