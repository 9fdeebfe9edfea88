"""A rule for import-linter that it does not have: no cycle among the modules, packages included.

``acyclic_siblings`` looks at the modules of one folder; a module that imports the ``__init__`` of
a package around it, whose ``__init__`` imports that module, is a cycle that it does not see.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import Any

from importlinter import Contract, ContractCheck, output


class NoCycles(Contract):
    """No module imports itself over others; imports inside functions and for types count."""

    type_name = "no_cycles"

    def check(self, graph: Any, verbose: bool) -> ContractCheck:
        """Look for one cycle among all modules of the graph."""
        imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            # graphlib lists who is imported before who imports it.
            return ContractCheck(kept=False, metadata={"cycle": error.args[1][::-1]})
        return ContractCheck(kept=True)

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print the cycle."""
        output.print_error("These modules import each other:")
        output.new_line()
        output.print_error(" ->\n    ".join(check.metadata["cycle"]), bold=False)
