"""Everything about GPUs that is no test: predictions (model) and the check on a real one (check).

Run as ``python benches/gpu COMMAND`` from the repository; ``__main__.py`` lists the commands. The
package is named ``gpu`` with ``benches/`` on the path, as the tests import it too.
"""
