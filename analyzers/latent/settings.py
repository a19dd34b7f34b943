"""What the fit of a training map depends on besides its data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from analyzers.latent.parameters import Covariance, Topology
from analyzers.latent.trajectories import ScaleMode

Rule = Literal["agreement", "paper", "bic", "aic", "icl", "heldout"]


class StateSettings(BaseModel):
    """What the fit of a training map depends on besides its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k_max: int = Field(
        8, ge=1, le=100, description="Largest number of states tried; the data may limit it further."
    )
    rule: Rule = Field(
        "agreement",
        description="How the number of states is chosen: agreement (the largest whose best restarts agree "
        "and whose BIC still improves), paper (lowest BIC on held-out runs), bic, aic, icl (lowest on the "
        "training runs), heldout (highest log-likelihood of runs left out in turn). docs/states.md has the "
        "formulas.",
    )
    restarts: int = Field(32, ge=1, description="Seeded restarts of Baum-Welch per number of states.")
    heldout_fraction: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of the runs that the stored model never sees; at least one of several runs.",
    )
    folds: int = Field(
        5,
        ge=0,
        description="Groups of runs left out in turn for the held-out log-likelihood; at most one per run. "
        "0 or 1: not computed.",
    )
    fold_restarts: int = Field(10, ge=1, description="Seeded restarts per group of runs left out.")
    bootstraps: int = Field(
        10, ge=0, description="Refits to training runs drawn with replacement, per number of states."
    )
    surrogates: int = Field(
        10,
        ge=0,
        description="Smooth surrogates of the runs that the same fit is tried on (docs/training_map.md); 0: "
        "none, and nothing says whether smooth curves would do as well.",
    )
    surrogate_restarts: int = Field(
        6, ge=1, description="Seeded restarts per surrogate, and of the observed runs beside them."
    )
    surrogate_selections: int = Field(
        2, ge=0, description="Surrogates on which the rule for the number of states is tried too."
    )
    seed: int = Field(0, ge=0, description="Seed of the split by run, of every restart and every resample.")
    covariance: Covariance = Field("diag", description="Covariance of a state: diagonal or full.")
    topology: Topology = Field(
        "ergodic",
        description="Which transitions can be: any; any, with stays favoured (sticky); none back "
        "(left-to-right).",
    )
    covariance_floor: float = Field(
        1e-3,
        gt=0,
        description="Smallest variance of a scaled metric within a state (full: in any direction).",
    )
    probability_floor: float = Field(
        1e-6,
        ge=0,
        le=1e-3,
        description="Smallest start and transition probability: a run may do what no training run did.",
    )
    scale: ScaleMode = Field(
        "train",
        description="z-score by the training runs, or each run by itself (per-run), which looks ahead.",
    )
    collinear: float = Field(
        0.999,
        gt=0,
        le=1,
        description="A metric whose correlation with an earlier one of the list is above this on the "
        "training frames, in absolute value, is dropped; 1: none is.",
    )
    max_iterations: int = Field(200, ge=2, description="Iterations after which a restart is stopped.")
    tolerance: float = Field(
        1e-6,
        gt=0,
        description="A restart has converged when its log posterior gains less than this (nats per frame).",
    )
