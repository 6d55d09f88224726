"""GradCache: batches of any size through models that hold a chunk of it at a time."""

from .grad_cache import GradCache as GradCache
