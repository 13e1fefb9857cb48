"""Training: the phases of a run, its settings, what is refused before it, and what it says of itself."""
