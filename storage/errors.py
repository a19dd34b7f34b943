"""Errors that a person reads as one sentence."""


class OntogenyError(Exception):
    """Something that one sentence explains; the command line prints it without a traceback."""


class UsageError(OntogenyError):
    """Bad usage or configuration: the sentence names the offending value; exit code 2."""
