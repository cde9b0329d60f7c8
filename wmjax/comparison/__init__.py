"""Agents side by side, and an agent without its parts: one report over seeds, with intervals."""
