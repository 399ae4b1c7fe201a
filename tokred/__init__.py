"""tokred: a torch.compile backend that computes fewer tokens.

torch.compile(model, backend="tokred", options={"recipe": "tome(r=13)"})
"""

from tokred.backend import backend, compile, reports, reset
from tokred.calibrate import calibrate
from tokred.compiler.calibration import Calibration
from tokred.compiler.report import Refusal, Report
from tokred.errors import TokredError
from tokred.explain import explain
from tokred.registry.attention import AttentionRewrite, Effort
from tokred.registry.frames import FrameFusion, Frames
from tokred.registry.maps import Keep, Merge, Soft, TokenMap
from tokred.registry.method import Method, Reduction
from tokred.registry.neurons import Blockwise, Chosen, Neurons, Sparsity, Threshold
from tokred.registry.recipe import Recipe
from tokred.registry.register import methods, register, register_pass
from tokred.registry.site import Place, Site
from tokred.registry.skip import Skip

__all__ = [
    "AttentionRewrite",
    "Blockwise",
    "Calibration",
    "Chosen",
    "Effort",
    "FrameFusion",
    "Frames",
    "Keep",
    "Merge",
    "Method",
    "Neurons",
    "Place",
    "Recipe",
    "Reduction",
    "Refusal",
    "Report",
    "Site",
    "Skip",
    "Soft",
    "Sparsity",
    "Threshold",
    "TokenMap",
    "TokredError",
    "backend",
    "calibrate",
    "compile",
    "explain",
    "methods",
    "register",
    "register_pass",
    "reports",
    "reset",
]
__version__ = "0.1.0"
