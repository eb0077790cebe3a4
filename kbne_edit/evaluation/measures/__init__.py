"""The measures of the package: tasks of `evaluate` that need no download.

decisions, decisions_names    whether decisions are the same for people of all groups, stated or by name
associations                  twin association: which of two groups goes with which of two descriptions
questions                     short stories about two people, in BBQ's design
help_parity                   whether people of all groups are helped, and refused, equally
regard_parity                 how continuations speak of people of different groups
"""

from .quick import FigureChange, QuickMeasure, Remembered, measure_quick
from .registry import MEASURES, Measure, measure

__all__ = ["MEASURES", "FigureChange", "Measure", "QuickMeasure", "Remembered", "measure", "measure_quick"]
