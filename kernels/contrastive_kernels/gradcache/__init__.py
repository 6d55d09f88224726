"""GradCache: batches of any size through models that hold a chunk of it at a time; `observer` tells what a step does."""

from .grad_cache import GradCache as GradCache
from .observer import PHASES as PHASES
from .observer import Observer as Observer
from .observer import Phase as Phase
