"""The prediction type that a scheduler config of diffusers names; imports no jax."""

from collections.abc import Mapping
from typing import Any

FLOW = "FlowMatchEulerDiscreteScheduler"
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


def stored_prediction_type(config: Mapping[str, Any]) -> str:
    """The prediction type in a scheduler_config.json, or the default of its class."""
    default = "flow_prediction" if config.get("_class_name") == FLOW else "epsilon"
    name = str(config.get("prediction_type", default))
    if config.get("_class_name") in EDM and name == "epsilon":
        return "edm"  # so they call EDM's own
    return name
