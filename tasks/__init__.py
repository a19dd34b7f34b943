"""Prefect tasks and what they need of files and models. Ids and keys cross their borders, never tensors."""
