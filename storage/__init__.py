"""What is on disk: series and their checkpoints, the probe, and the Parquet tables. No torch, no Prefect."""

from storage.errors import OntogenyError, UsageError
from storage.store import Store, open_root

__all__ = ["OntogenyError", "Store", "UsageError", "open_root"]
