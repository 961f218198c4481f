"""The prediction type that a scheduler config of diffusers names; imports no jax."""

from collections.abc import Mapping
from typing import Any

FLOW = "FlowMatchEulerDiscreteScheduler"


def stored_prediction_type(config: Mapping[str, Any]) -> str:
    """The prediction type in a scheduler_config.json, or the default of its class."""
    default = "flow_prediction" if config.get("_class_name") == FLOW else "epsilon"
    return str(config.get("prediction_type", default))
