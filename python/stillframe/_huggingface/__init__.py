"""Hugging Face: transformers.Trainer and Accelerate."""
