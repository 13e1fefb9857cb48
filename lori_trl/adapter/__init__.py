"""The adapter on disk, and nothing else knows its form."""
