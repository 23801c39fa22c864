"""Formats of PyTorch and Keras, written from a checkpoint and read into one."""
