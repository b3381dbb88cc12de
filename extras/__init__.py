"""Commands beside the lesson: `python -m extras.NAME`."""
