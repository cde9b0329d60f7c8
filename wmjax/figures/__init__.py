"""Pictures of a run: what its world model dreams, how it plays, and how it learned.

`windows` measures what a model expects and what happened, `dream` shows it; `episode` is a video of play, `learning`
the curves of training. `frames` draws animations, `charts` writes charts.
"""

from wmjax.figures.charts import picture_path, show
from wmjax.figures.dream import plot_horizon_errors, write_dream_gif, write_dream_strip, write_reconstructions
from wmjax.figures.episode import suffix, with_pictures, write_episode
from wmjax.figures.learning import (
    Labelled,
    fitness_curves,
    plot_fitness_curves,
    plot_learning_curves,
)
from wmjax.figures.windows import (
    OpenLoop,
    horizon_errors,
    open_loop,
    play,
    predictor,
    reconstruction_errors,
    window_records,
)

__all__ = [
    "Labelled",
    "OpenLoop",
    "fitness_curves",
    "horizon_errors",
    "open_loop",
    "picture_path",
    "play",
    "plot_fitness_curves",
    "plot_horizon_errors",
    "plot_learning_curves",
    "predictor",
    "reconstruction_errors",
    "show",
    "suffix",
    "window_records",
    "with_pictures",
    "write_dream_gif",
    "write_dream_strip",
    "write_episode",
    "write_reconstructions",
]
