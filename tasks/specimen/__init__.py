"""The specimen: small GPT-NeoX runs trained on text that every Python install carries. No Prefect here."""

from tasks.specimen.config import SpecimenConfig
from tasks.specimen.data import PROBE, RECORD, prepare
from tasks.specimen.runs import train_all
from tasks.specimen.train import is_done, train_run

__all__ = ["PROBE", "RECORD", "SpecimenConfig", "is_done", "prepare", "train_all", "train_run"]
