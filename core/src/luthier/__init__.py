"""Luthier: fine-tune language models out of interchangeable parts. Importing it loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "luthier.api": ("train", "continual", "multi_run", "plan", "inspect", "generate", "merge", "export"),
    "luthier.artifact_api": ("evaluate", "load", "combine", "unmerge", "push"),
    "luthier.training.run": ("Run",),
    "luthier.training.trained.open_chat": ("open_chat",),
    "luthier.model.generation.conversation": ("Conversation", "Reply"),
    "luthier.model.benchmark_model": ("BenchmarkModel",),
    "luthier.model.load": ("find_model_folder",),
    "luthier.model.offline_import": ("import_offline",),
    "luthier.model.operations.tensor_source": ("TensorSource", "find_source"),
    "luthier.precision.weight_dtypes": ("wide_weight",),
    "luthier.model.weights.base_copies": ("drop_base_copies",),
    "luthier.model.weights.dense_layers": ("check_finite_weights", "choose_dense_layers", "replace_dense_layers"),
    "luthier.model.weights.token_rows": (
        *("EmbeddingRows", "TokenRows", "check_token_rows", "find_row_places", "place_token_rows"),
    ),
    "luthier.model.generation.generate": ("Sampling",),
    "luthier.data.batches.batch": ("Batch",),
    "luthier.data.batches.unit": ("Passage", "Unit"),
    "luthier.plugins.on": ("on",),
    "luthier.recipe": ("Recipe",),
    "luthier.errors": ("LuthierError",),
    "luthier.peft_files": (
        *("PEFT_CONFIG", "PEFT_WEIGHTS", "PeftFields", "peft_misfit", "read_peft_config", "read_peft_object"),
        *("read_peft_tensors", "write_peft_files"),
    ),
    "luthier.state_tree": ("check_tensors", "fill_tensors"),
    "luthier.logs": ("get_logger",),
    "luthier.plugins.hookspecs": ("hookimpl",),
    "luthier.plugins.events": ("event",),
    "luthier.plugins.options": ("option",),
    "luthier.plugins.records": (
        "AdapterRecord",
        "LossRecord",
        "OptimizerRecord",
        "QuantizerRecord",
        "ProviderRecord",
        "CallbackRecord",
        "OperationRecord",
        "ExporterRecord",
        "MetricRecord",
        "PenaltyRecord",
        "TrainerRecord",
        "BenchmarkRecord",
        "EngineRecord",
    ),
    "luthier.plugins.contracts.protocols": ("Adapter", "Callback", "Loss", "Optimizer", "Provider", "Quantizer"),
    "luthier.plugins.providing.job_records": (
        *("Capabilities", "CostEstimate", "DataFile", "DataRules", "EventPage", "Finding", "Job", "JobArtifact"),
        *("JobEvent", "JobMetrics", "JobProgress", "JobSpec", "JobStatus", "ServiceRow", "SettingRule", "TokenPrice"),
    ),
    "luthier.plugins.providing.job_state": ("JobState",),
    "luthier.jobs.clock": ("current_clock",),
    "luthier.jobs.manager": ("Manager",),
    "luthier.jobs.restoring": ("provider",),
    "luthier.jobs.provider_error": ("ProviderError",),
    "luthier.jobs.secret": ("Secret", "check_reference", "read_secret"),
    "luthier.jobs.answer_values": ("drop_missing", "elapsed_seconds", "read_number", "read_time", "require_text"),
    "luthier.jobs.rows.service_rows": ("wire_row",),
    "luthier.jobs.transport.answer_errors": ("read_refused",),
    "luthier.jobs.transport.archive": ("unpack_archive",),
    "luthier.jobs.transport.file_download": ("Wanted", "download_file", "place_inside"),
    "luthier.jobs.transport.page_reading": ("read_pages",),
    "luthier.jobs.transport.request_auth": ("Signer",),
    "luthier.jobs.transport.service_client": ("Call", "ServiceClient", "check_address"),
    "luthier.jobs.desk.desk_service": ("DeskPlace", "DeskService"),
    "luthier.jobs.desk.desk_words": ("desk_words", "read_desk"),
    "luthier.jobs.desk.sent_run": (
        *("Parcel", "ToldRun", "join_parcel", "pack_parcel", "parcel_variables", "read_told", "sent_words"),
    ),
    "luthier.jobs.wire.wire_service": ("WireService", "WireTerms"),
    "luthier.plugins.contracts.side_protocols": (
        *("Benchmark", "Engine", "Exporter", "Metric", "Operation", "Penalty", "Trainer"),
    ),
    "luthier.training.trainers.trainer_session": ("TrainerSession",),
    "luthier.data.prompt_rows": ("PromptRow",),
    "luthier.plugins.contracts.policy_protocol": ("Policy",),
    "luthier.plugins.contracts.run_view": ("RunView",),
    "luthier.plugins.contracts.values": (
        "BenchmarkScore",
        "Context",
        "EngineQuestion",
        "Group",
        "LossOutput",
        "Multipliers",
        "Progress",
        "TokenStatistics",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from luthier.api import continual, export, generate, inspect, merge, multi_run, plan, train
    from luthier.artifact_api import combine, evaluate, load, push, unmerge
    from luthier.data.batches.batch import Batch
    from luthier.data.batches.unit import Passage, Unit
    from luthier.data.prompt_rows import PromptRow
    from luthier.errors import LuthierError
    from luthier.jobs.answer_values import drop_missing, elapsed_seconds, read_number, read_time, require_text
    from luthier.jobs.clock import current_clock
    from luthier.jobs.desk.desk_service import DeskPlace, DeskService
    from luthier.jobs.desk.desk_words import desk_words, read_desk
    from luthier.jobs.desk.sent_run import (
        Parcel,
        ToldRun,
        join_parcel,
        pack_parcel,
        parcel_variables,
        read_told,
        sent_words,
    )
    from luthier.jobs.manager import Manager
    from luthier.jobs.provider_error import ProviderError
    from luthier.jobs.restoring import provider
    from luthier.jobs.rows.service_rows import wire_row
    from luthier.jobs.secret import Secret, check_reference, read_secret
    from luthier.jobs.transport.answer_errors import read_refused
    from luthier.jobs.transport.archive import unpack_archive
    from luthier.jobs.transport.file_download import Wanted, download_file, place_inside
    from luthier.jobs.transport.page_reading import read_pages
    from luthier.jobs.transport.request_auth import Signer
    from luthier.jobs.transport.service_client import Call, ServiceClient, check_address
    from luthier.jobs.wire.wire_service import WireService, WireTerms
    from luthier.logs import get_logger
    from luthier.model.benchmark_model import BenchmarkModel
    from luthier.model.generation.conversation import Conversation, Reply
    from luthier.model.generation.generate import Sampling
    from luthier.model.load import find_model_folder
    from luthier.model.offline_import import import_offline
    from luthier.model.operations.tensor_source import TensorSource, find_source
    from luthier.model.weights.base_copies import drop_base_copies
    from luthier.model.weights.dense_layers import check_finite_weights, choose_dense_layers, replace_dense_layers
    from luthier.model.weights.token_rows import (
        EmbeddingRows,
        TokenRows,
        check_token_rows,
        find_row_places,
        place_token_rows,
    )
    from luthier.peft_files import (
        PEFT_CONFIG,
        PEFT_WEIGHTS,
        PeftFields,
        peft_misfit,
        read_peft_config,
        read_peft_object,
        read_peft_tensors,
        write_peft_files,
    )
    from luthier.plugins.contracts.policy_protocol import Policy
    from luthier.plugins.contracts.protocols import Adapter, Callback, Loss, Optimizer, Provider, Quantizer
    from luthier.plugins.contracts.run_view import RunView
    from luthier.plugins.contracts.side_protocols import (
        Benchmark,
        Engine,
        Exporter,
        Metric,
        Operation,
        Penalty,
        Trainer,
    )
    from luthier.plugins.contracts.values import (
        BenchmarkScore,
        Context,
        EngineQuestion,
        Group,
        LossOutput,
        Multipliers,
        Progress,
        TokenStatistics,
    )
    from luthier.plugins.events import event
    from luthier.plugins.hookspecs import hookimpl
    from luthier.plugins.on import on
    from luthier.plugins.options import option
    from luthier.plugins.providing.job_records import (
        Capabilities,
        CostEstimate,
        DataFile,
        DataRules,
        EventPage,
        Finding,
        Job,
        JobArtifact,
        JobEvent,
        JobMetrics,
        JobProgress,
        JobSpec,
        JobStatus,
        ServiceRow,
        SettingRule,
        TokenPrice,
    )
    from luthier.plugins.providing.job_state import JobState
    from luthier.plugins.records import (
        AdapterRecord,
        BenchmarkRecord,
        CallbackRecord,
        EngineRecord,
        ExporterRecord,
        LossRecord,
        MetricRecord,
        OperationRecord,
        OptimizerRecord,
        PenaltyRecord,
        ProviderRecord,
        QuantizerRecord,
        TrainerRecord,
    )
    from luthier.precision.weight_dtypes import wide_weight
    from luthier.recipe import Recipe
    from luthier.state_tree import check_tensors, fill_tensors
    from luthier.training.run import Run
    from luthier.training.trained.open_chat import open_chat
    from luthier.training.trainers.trainer_session import TrainerSession


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
