"""Latent-state models of training: a hidden Markov model over the trajectories of several runs."""

from analyzers.latent.engine import Parameters
from analyzers.latent.fit import Candidate, Edge, RunStates, StateFit, StateSettings, fit_states
from analyzers.latent.trajectories import ScaleMode, Scaler, Trajectories, Transform, from_long

__all__ = [
    "Candidate",
    "Edge",
    "Parameters",
    "RunStates",
    "ScaleMode",
    "Scaler",
    "StateFit",
    "StateSettings",
    "Trajectories",
    "Transform",
    "fit_states",
    "from_long",
]
