"""Ratios measured side by side in one process: ``python -m benchmarks NAME|all|--list [--write]``."""
