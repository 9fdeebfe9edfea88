"""Other libraries as providers, in a registry with those of moso_fast and plain PyTorch.

Each adapter imports its library when it is asked for a job: none of them need be installed. What
they need is in requirements.txt, which ``make bench-peers`` installs into an environment of its
own; requirements-no-deps.txt names those whose own requirements the comparison does not use.
"""

from __future__ import annotations

from moso_fast.bench.providers import PROVIDERS as OWN
from moso_fast.bench.providers import Provider

from .bergson import PROVIDERS as BERGSON
from .captum import PROVIDERS as CAPTUM
from .libraries import PROVIDERS as LIBRARIES

__all__ = ["PROVIDERS"]

PROVIDERS: tuple[Provider, ...] = (*OWN, *CAPTUM, *LIBRARIES, *BERGSON)
