"""A recorded run as pandas frames: events, phases, faults, samples, downtime, and its figures.

``Run.load(path)`` opens a run folder; ``schema.describe(name)`` documents each frame's columns.
"""

from migkit.analysis.run import Run
from migkit.analysis.summary import Summary
from migkit.errors import TraceWarning

__all__ = ["Run", "Summary", "TraceWarning"]
