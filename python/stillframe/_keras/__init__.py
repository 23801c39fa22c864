"""Keras: its variables as memory, the callbacks, and whole models."""
