"""What the tests on an S3-compatible store share besides the fixture ``bucket``."""

from dataclasses import dataclass

SECRET = "this-secret-must-stay-out-of-tables-and-logs"


@dataclass(frozen=True)
class Bucket:
    """A bucket on a server of this machine; ``environment`` is all that a process needs to reach it."""

    url: str
    environment: dict[str, str]
