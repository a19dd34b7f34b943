"""Errors that a person reads as one sentence."""


class OntogenyError(Exception):
    """Something that one sentence explains; the command line prints it without a traceback."""


class UsageError(OntogenyError):
    """Bad usage or configuration: the sentence names the offending value; exit code 2."""


class LoaderError(OntogenyError):
    """A person's own loader failed on a checkpoint; the sentence names module and function."""
