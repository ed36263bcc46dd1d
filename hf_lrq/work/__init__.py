"""The work on a model as values: sites, a plan, jobs, and how matrices flow from a source to a sink."""

from hf_lrq.work.budget import Budget, Spent
from hf_lrq.work.census import Census, take_census
from hf_lrq.work.executor import Executor, Inline, Threads
from hf_lrq.work.flow import Deferred, Held, ModelSink, ModelSource, Sink, Source, compress_sites
from hf_lrq.work.job import Job
from hf_lrq.work.plan import Inventory, Plan, excluded, make_plan
from hf_lrq.work.records import CompressionReport, LayerRecord
from hf_lrq.work.sites import Site, find_sites, sites_of
from hf_lrq.work.tables import EmbeddingSite, HeadSite
from hf_lrq.work.thresholds import with_ranks

__all__ = [
    "Budget",
    "Census",
    "CompressionReport",
    "Deferred",
    "EmbeddingSite",
    "Executor",
    "HeadSite",
    "Held",
    "Inline",
    "Inventory",
    "Job",
    "LayerRecord",
    "ModelSink",
    "ModelSource",
    "Plan",
    "Sink",
    "Site",
    "Source",
    "Spent",
    "Threads",
    "compress_sites",
    "excluded",
    "find_sites",
    "make_plan",
    "sites_of",
    "take_census",
    "with_ranks",
]
