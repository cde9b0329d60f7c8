"""Trained checkpoints as the papers' authors save them: which files, which names and layouts, read as data alone.

Each module of an agent's name has `SOURCE`, the code that writes such files; `PRESET`, whose configuration holds where
shapes do not tell; and three functions:

    read(path) -> Found                       what is there; arrays are not read yet
    fields(found, config) -> (fields, side)   the configuration that shapes tell, and the side of pictures or None
    ours(found, config, spec) -> layers       by our names, in our layout

and, where files say what they are of, `task(found) -> (preset, env, env_args)`; else `EXAMPLE`, an environment's name.
"""
