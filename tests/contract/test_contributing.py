"""CONTRIBUTING's example analyzer works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from analyzers import registry
from analyzers.adapters import Adapter
from analyzers.base import ActivationAnalyzer
from analyzers.runner import batches, run_pass

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_example_is_a_whole_analyzer(
    tiny_neox: Any, tiny_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry.load_all()))
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "variance.py", "exec"), {"__name__": "analyzers.variance"})
    analyzer = registry.find("variance")()
    assert isinstance(analyzer, ActivationAnalyzer)

    adapter = Adapter(tiny_neox(torch.float64))
    states = run_pass(adapter, batches(tiny_tokens, 3), analyzer.needs(adapter))
    result = analyzer.measure(states, adapter)

    for row in result.rows:
        captured: list[torch.Tensor] = []
        hook = adapter.module("resid_post", row.layer).register_forward_hook(
            lambda _module, _inputs, output, into=captured: into.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        with torch.inference_mode():
            adapter.model(input_ids=tiny_tokens)
        hook.remove()
        hidden = captured[0].flatten(0, 1)
        assert row.value == pytest.approx(float(hidden.var(0, correction=0).sum()), rel=1e-10)
    assert len(result.rows) == adapter.layers
