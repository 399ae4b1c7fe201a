"""What every method promises, as checks, for the authors of methods.

from tokred.testing import check_method
check_method("norm(keep=0.5)")
"""

from tokred.testing.contract import check_method, idle
from tokred.testing.maps import check_map, check_plan
from tokred.testing.models import TinyText, TinyViT, check_model, compiled
from tokred.testing.sites import make_site, places

__all__ = [
    "TinyText",
    "TinyViT",
    "check_map",
    "check_method",
    "check_model",
    "check_plan",
    "compiled",
    "idle",
    "make_site",
    "places",
]
