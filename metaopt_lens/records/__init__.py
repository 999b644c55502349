"""The published implementation's record files: read, measured by the statistics of `metaopt_lens.analysis`, written."""

from metaopt_lens.records._analyze import analyze_records as analyze_records
from metaopt_lens.records._query_record import DemoRecord as DemoRecord
from metaopt_lens.records._query_record import QueryRecord as QueryRecord
from metaopt_lens.records._query_record import read_demos as read_demos
from metaopt_lens.records._query_record import read_queries as read_queries
from metaopt_lens.records._query_record import write_records as write_records
from metaopt_lens.records._record_analysis import LayerMetric as LayerMetric
from metaopt_lens.records._record_analysis import RecordAnalysis as RecordAnalysis
from metaopt_lens.records._record_analysis import RecordShapes as RecordShapes
from metaopt_lens.records._record_run import write_run_records as write_run_records

__all__ = [
    "DemoRecord",
    "LayerMetric",
    "QueryRecord",
    "RecordAnalysis",
    "RecordShapes",
    "analyze_records",
    "read_demos",
    "read_queries",
    "write_records",
    "write_run_records",
]
