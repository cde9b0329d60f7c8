"""One step of a run's dream as a program of its own: what it computes, its formats, and their check against JAX."""
