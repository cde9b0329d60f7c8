"""Stepping into a dream: one page in a browser, on which a person, the agent or a planner plays in the world model.

`game` has what is played as compiled programs, `controls` what a person does as an action, `session` all that a page
may ask for as pure functions, `wire` a moment as bytes, `recording` moments as an animation, and `server` a local
server around them, of one page in `static/`.
"""
