"""Flow: which state are the runs of a series in, and how surprising are their checkpoints?"""

from typing import Any

from prefect import flow

from flows.config import default_root
from storage.store import Store
from tasks.decode import DecodeJob, decode_online
from tasks.provenance import invocation


@flow(name="decode", flow_run_name="decode {series}")
def decode_of(
    series: str,
    root: str = default_root(),
    run: str | None = None,
    model: str | None = None,
    of: str | None = None,
) -> dict[str, Any]:
    """Decode what is new with a stored model, without looking ahead; return the task's summary."""
    job = DecodeJob(root=root, series=series, run=run, model=model, of=of)
    with invocation(Store(root), series, "decode", job.model_dump(mode="json", exclude={"root"})) as counts:
        summary: dict[str, Any] = decode_online(job)
        counts["checkpoints_decoded"] = summary["decoded"]
    return summary
