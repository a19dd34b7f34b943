"""Errors that a person reads as one sentence."""

from storage.secrets import redact


class OntogenyError(Exception):
    """Something that one sentence explains; the command line prints it without a traceback.

    Secrets in the sentence are hidden: it reaches logs and tables. ``kind`` is the kind of audit finding that
    it makes of a checkpoint, one of :data:`storage.audit.KINDS`.
    """

    kind = "damaged"

    def __init__(self, text: str = "") -> None:
        super().__init__(redact(text))


class UsageError(OntogenyError):
    """Bad usage or configuration: the sentence names the offending value; exit code 2."""


class HubError(OntogenyError):
    """The Hub did not give what was asked for; the sentence says what and where."""

    def __init__(self, text: str, kind: str = "unreachable") -> None:
        super().__init__(text)
        self.kind = kind


class NoAnswerError(HubError):
    """The Hub gave no answer, or refused for now, as often as it was asked: it may be down."""


class DamagedCheckpointError(OntogenyError):
    """A checkpoint's files are missing, cut short or not what their names or digests say."""

    def __init__(self, text: str, kind: str = "damaged") -> None:
        super().__init__(text)
        self.kind = kind


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type's name if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class LoaderError(OntogenyError):
    """A person's own loader failed on a checkpoint; the sentence names module and function."""
