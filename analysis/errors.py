"""The analysis side's one exception. Not the suite's own family: this room imports no other and runs without torch."""


class ResultsError(Exception):
    """Result files that can't be compared or written, in a sentence that names the file, the rule and the fix."""
