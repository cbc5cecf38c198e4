"""The one error that the command line prints as a clean message."""


class UserError(ValueError):
    """Something that the user can put right: a setting, a file or a folder."""
