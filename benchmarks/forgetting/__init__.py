"""The study behind `docs/results.md`'s second part: what a second task takes from a first one, at equal gain."""
