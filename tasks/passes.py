"""The passes over one checkpoint, and over those it is compared with unless their samples are at hand.

One pass over the probe serves all analyzers; those with tokens of their own cost one more each time the
tokens differ.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local

import torch

from analyzers.adapters import ATTENTION_SITES, Model
from analyzers.base import ActivationComparison, PassAnalyzer, TokenSource
from analyzers.harvest import Harvest
from analyzers.reductions import Batch, Spec, State
from analyzers.runner import batches, missing_site, run_replicas
from storage.errors import OntogenyError
from storage.keys import digest
from storage.probe import Probe
from storage.series import Checkpoint
from tasks.job import MeasureJob
from tasks.models import load_model

# What comparisons read, by weights and protocol, newest last: of the first, the previous and the last
# checkpoint, this one, and the one that goes next. It only saves passes: what is not here is computed again.
# Each thread has its own: another walk's checkpoints would push them out.
_SAMPLES_KEPT = 5


class _Samples(local):
    def __init__(self) -> None:
        self.kept: OrderedDict[str, Mapping[Spec, State]] = OrderedDict()


_samples = _Samples()


@dataclass(frozen=True)
class Found:
    """What a pass over a checkpoint left behind; ``absent``: what the model lacks, by analyzer.

    ``replicas`` are the models that ran, one per device.
    """

    replicas: Sequence[Model]
    states: Mapping[Spec, State]
    absent: Mapping[str, str]

    @property
    def shape(self) -> Model:
        """The model."""
        return self.replicas[0]

    def check(self, analyzer: PassAnalyzer) -> None:
        """Refuse an analyzer whose sites the model lacks.

        Raises:
            OntogenyError: it does; the sentence names the site.
        """
        if analyzer.name in self.absent:
            raise OntogenyError(self.absent[analyzer.name])


class Passes:
    """Runs the model over the probe once, for all ``readers`` of it together; ``run`` counts the passes.

    Readers with tokens of their own share a pass where the tokens are equal.

    ``wanted`` are all that the job names, those whose results are there too. Where attention is looked at, it
    is computed by another function, equal up to rounding; so that a result does not depend on which others
    were missing, that function runs whenever the job names an analyzer of attention.
    """

    def __init__(
        self,
        job: MeasureJob,
        probe: Probe | None,
        readers: Sequence[PassAnalyzer],
        wanted: Sequence[PassAnalyzer],
    ) -> None:
        self._job = job
        self._wanted = wanted
        self._probe = probe
        self._readers: dict[TokenSource | None, list[PassAnalyzer]] = {None: []}
        for reader in readers:
            self._readers.setdefault(reader.tokens, []).append(reader)
        self._comparers = [reader for reader in readers if isinstance(reader, ActivationComparison)]
        self._found: Found | None = None
        self._own: dict[TokenSource, Found] = {}
        self.run = 0

    def over(self, checkpoint: Checkpoint, folder: Path) -> Found:
        """Shape and states of the checkpoint that is measured, from its one pass over the probe.

        Where nobody reads the probe, the model is loaded and not run.
        """
        if self._found is None:
            self._found = self._pass(self._load(folder), self._readers[None])
            self._keep(checkpoint, self._found)
        return self._found

    def of(self, analyzer: PassAnalyzer, checkpoint: Checkpoint, folder: Path) -> Found:
        """Shape and states from the pass that the analyzer reads.

        Raises:
            ValueError: the model does not allow the analyzer's own tokens.
        """
        found, source = self.over(checkpoint, folder), analyzer.tokens
        if source is None:
            return found
        if source not in self._own:
            self._own[source] = self._pass(found.replicas, self._readers[source], source)
        return self._own[source]

    def compared(self, checkpoint: Checkpoint, folder: Path) -> Mapping[Spec, State]:
        """What comparisons read of another checkpoint, kept from the pass over it or from a pass now."""
        key = self._key(checkpoint)
        kept = _samples.kept
        if key not in kept:
            self._keep(checkpoint, self._pass(self._load(folder), self._comparers))
        kept.move_to_end(key)
        return kept[key]

    def _load(self, folder: Path) -> list[Model]:
        return [load_model(folder, self._job.dtype, device, self._job.loader) for device in self._job.on]

    def _pass(
        self, replicas: Sequence[Model], readers: Sequence[PassAnalyzer], source: TokenSource | None = None
    ) -> Found:
        model = replicas[0]
        needs = {reader.name: reader.needs(model) for reader in readers}
        # What one analyzer cannot see in this model must not take the others' pass away.
        absent = {name: missing_site(model, specs) for name, specs in needs.items()}
        specs = dict.fromkeys(s for name, found in needs.items() if absent[name] is None for s in found)
        states: Mapping[Spec, State] = {}
        if specs:
            stream = self._stream(model, source)
            self.run += 1
            if source is None:
                specs |= dict.fromkeys(self._attention(model))
            # A pool is written in the order of the probe.
            ordered = any(isinstance(reader, Harvest) for reader in readers)
            states = run_replicas(replicas[:1] if ordered else replicas, stream, specs)
        return Found(replicas, states, {name: why for name, why in absent.items() if why is not None})

    def _attention(self, model: Model) -> list[Spec]:
        readers = [analyzer for analyzer in self._wanted if analyzer.tokens is None]
        needs = [spec for analyzer in readers for spec in analyzer.needs(model)]
        return [s for s in needs if s.site in ATTENTION_SITES and missing_site(model, [s]) is None]

    def _stream(self, model: Model, source: TokenSource | None) -> Iterator[Batch]:
        if source is not None:
            return batches(source.draw(model), self._job.batch)
        if self._probe is None:
            raise ValueError("an analyzer reads activations, and there is no probe")
        return batches(torch.from_numpy(self._probe.tokens), self._job.batch, self._probe.domains)

    def _keep(self, checkpoint: Checkpoint, found: Found) -> None:
        if self._comparers:
            seen = [reader for reader in self._comparers if reader.name not in found.absent]
            specs = [spec for reader in seen for spec in reader.needs(found.shape)]
            key = self._key(checkpoint)
            kept = _samples.kept
            kept[key] = {spec: found.states[spec] for spec in specs}
            kept.move_to_end(key)  # it may have been there from an earlier call
            while len(kept) > _SAMPLES_KEPT:
                kept.popitem(last=False)

    def _key(self, checkpoint: Checkpoint) -> str:
        comparers = [[c.name, c.version, c.parameters.model_dump(mode="json")] for c in self._comparers]
        probe = None if self._probe is None else self._probe.digest
        job = self._job
        return digest([checkpoint.weights_sha256, comparers, probe, job.dtype, job.loader])
