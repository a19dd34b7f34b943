"""The measurements: torch and numpy on tensors that are handed in. No files, no Prefect."""
