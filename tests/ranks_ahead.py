"""What ranks and commands of the tests import, for the process that they are forked from: see `ranks.rank_context`."""

import gc
import importlib
import os

gc.disable()
importlib.import_module("trainers.model.engine").import_deepspeed()
for name in (
    "awkward",  # gigatoken asks pyarrow for it
    "deepspeed.module_inject.auto_ep_layer",  # ranks import these late
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "pandas",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.integrations.deepspeed",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "trainers.checkpoint.checkpointer",
    "trainers.tasks",
    "trainers.worker.rank",
):
    importlib.import_module(name)
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")  # makes all of it
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}  # as the product imports it
for name in ("orchestrator.run", "matplotlib.figure", "mlflow.store.tracking.sqlalchemy_store", "sklearn.metrics"):
    importlib.import_module(name)  # only commands do
gc.freeze()  # as the rank server does
gc.enable()
