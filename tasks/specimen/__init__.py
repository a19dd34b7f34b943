"""The specimen: small GPT-NeoX runs trained on text that every Python install carries. No Prefect here.

Nothing is imported here, so that reading a :class:`~tasks.specimen.config.SpecimenConfig` needs no torch.
"""
