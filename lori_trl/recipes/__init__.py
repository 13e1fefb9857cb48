"""Recipes and tasks: find them, check them, and the data they train on."""
