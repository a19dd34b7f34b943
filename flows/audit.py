"""Flow: catalogue a series and audit it, without downloading weights."""

from prefect import flow

from flows.artifacts import show_findings
from flows.config import SeriesConfig, default_root
from flows.measure import list_catalogue
from storage.audit import Finding
from storage.store import Store
from tasks.provenance import invocation


@flow(name="audit", flow_run_name="audit {config.name}")
def audit_series(config: SeriesConfig, root: str = default_root()) -> list[Finding]:
    """Write ``checkpoints`` and ``findings``; return the findings."""
    with invocation(Store(root), config.name, "audit", config.model_dump(mode="json")) as counts:
        found = list_catalogue(config, root)
        counts.update(checkpoints=len(found.checkpoints), findings=len(found.findings))
    show_findings(config.name, found.findings)
    return found.findings
