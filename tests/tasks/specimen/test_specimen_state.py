from pathlib import Path

import pytest

from storage import OntogenyError
from tasks.specimen.state import locked


def test_one_process_at_a_time_trains_a_run(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OntogenyError, match="another process"), locked(tmp_path, 0.2):
        pass
    with locked(tmp_path, 0.0):
        pass
