class GuidanceError(ValueError):
    """Guidance cannot go on. The message says what to do."""
