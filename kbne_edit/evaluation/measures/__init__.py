"""Measures that come with the package, in its own words: tasks of `evaluate` that need no download.

decisions, decisions_names    are decisions alike whatever group a person belongs to, stated or by name
associations                  twin association: which of two groups goes with which of two descriptions
questions                     short stories about two people, in BBQ's design
help_parity                   are people of all groups helped, and refused, alike
regard_parity                 how continuations speak of people of different groups
"""

from .quick import FigureChange, QuickMeasure, Remembered, measure_quick
from .registry import MEASURES, Measure, measure

__all__ = ["MEASURES", "FigureChange", "Measure", "QuickMeasure", "Remembered", "measure", "measure_quick"]
