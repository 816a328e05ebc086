"""One call: your model and a batch in, a report out."""

from rnngrad.diagnose.call import as_passes, diagnose
from rnngrad.diagnose.result import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "as_passes", "diagnose"]
